// The model view: a miniature map of every head on one canvas. A click or the arrow keys choose layer and head.

let view = null; // { canvas, map, heads, layers, size, pooled }

async function buildMaps() {
  const body = $("maps-body");
  if (!hasMap()) {
    body.append(lacking("weights_map"));
    return;
  }
  const map = await table("weights_map");
  const [layers, heads] = map.shape;
  const canvas = element("canvas", {
    id: "model-view", class: "model-view", tabindex: 0, role: "application",
    "aria-label": "Maps of all heads, layers from top to bottom, heads side by side; arrow keys choose",
  });
  const frame = element("div", { class: "scroller" }, canvas);
  const pooled = mapPoolsHeads();
  const words = [
    "One small map per head: layers from top to bottom, heads side by side. In each map queries go down and keys to the right. ",
    "A bright left edge is an attention sink, a bright diagonal attention to neighbours. Colours follow the square root, from 0 (dark) to 1 (bright)",
    map.width > 1 ? `; a cell holds ${map.width} × ${map.width} tokens.` : ".",
    pooled ? " Single heads were left out to keep the file small: each map is the mean over heads." : "",
  ];
  body.append(
    element("p", { class: "muted lead" }, words.join("")),
    element("div", { class: "views" }, frame,
      element("div", { class: "pair" }, element("div", { id: "map", class: "chart square" }), element("div", { id: "distance", class: "chart" }))),
  );
  view = { canvas, map, heads, layers, size: 0, pooled };
  new ResizeObserver(drawView).observe(body);
  canvas.addEventListener("click", (event) => { const at = cellAt(event); if (at) choose(at); });
  canvas.addEventListener("pointermove", (event) => {
    const at = cellAt(event);
    if (at) showTip(`layer ${report.layers[at.layer]}, ${at.head === MEAN ? "mean over heads" : `head ${report.heads[at.head]}`}`, event.clientX, event.clientY);
    else hideTip();
  });
  canvas.addEventListener("pointerleave", hideTip);
  canvas.addEventListener("keydown", (event) => {
    const [across, down] = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] }[event.key] || [0, 0];
    if (!across && !down) return;
    event.preventDefault();
    const limit = (value, count) => Math.max(0, Math.min(count - 1, value));
    choose({ layer: limit(chosen.layer + down, layers), head: pooled ? MEAN : chosen.head === MEAN ? 0 : limit(chosen.head + across, heads) });
  });
}

const MARGIN = { left: 28, top: 18 };
// Maps smaller than this are hard to see and to hit; where they do not fit side by side, the view scrolls [pixels].
const SMALLEST_MAP = 24, LARGEST_MAP = 36;

function cellAt(event) {
  const layer = Math.floor((event.offsetY - MARGIN.top) / view.size);
  const head = Math.floor((event.offsetX - MARGIN.left) / view.size);
  if (layer < 0 || layer >= view.layers || head < 0 || head >= view.heads) return null;
  return { layer, head: view.pooled ? MEAN : head };
}

// The colours of one head's map, made once.
const pictures = new Map();

function picture(layer, head) {
  const key = layer * view.heads + head;
  if (!pictures.has(key)) {
    const bins = view.map.shape[2];
    const cells = view.map.part(layer, head);
    const small = element("canvas", { width: bins, height: bins });
    const image = new ImageData(bins, bins);
    for (let i = 0; i < cells.length; i++) {
      if (!Number.isNaN(cells[i])) image.data.set([...viridis(Math.sqrt(Math.max(0, cells[i]))), 255], 4 * i);
    }
    small.getContext("2d").putImageData(image, 0, 0);
    pictures.set(key, small);
  }
  return pictures.get(key);
}

function drawView() {
  const { canvas, layers, heads } = view;
  const room = $("maps-body").clientWidth - MARGIN.left - 1;
  const size = Math.max(SMALLEST_MAP, Math.min(LARGEST_MAP, Math.floor(room / heads)));
  const inner = size - Math.max(1, Math.round(size / 12));
  const [width, height] = [MARGIN.left + heads * size + 1, MARGIN.top + layers * size + 1];
  const dense = window.devicePixelRatio || 1;
  view.size = size;
  Object.assign(canvas, { width: width * dense, height: height * dense });
  Object.assign(canvas.style, { width: `${width}px`, height: `${height}px` });
  const context = canvas.getContext("2d");
  context.scale(dense, dense);
  context.font = "11px system-ui, sans-serif";
  context.textAlign = "center";
  context.textBaseline = "middle";
  const [ink, empty, accent] = [themed("muted"), themed("no-data"), themed("chosen")];
  for (let layer = 0; layer < layers; layer++) {
    const y = MARGIN.top + layer * size;
    context.fillStyle = ink;
    context.fillText(report.layers[layer], MARGIN.left / 2 - 2, y + inner / 2);
    for (let head = 0; head < heads; head++) {
      const x = MARGIN.left + head * size;
      context.fillStyle = empty;
      context.fillRect(x, y, inner, inner);
      context.drawImage(picture(layer, head), x, y, inner, inner);
      if (layer === chosen.layer && (head === chosen.head || chosen.head === MEAN)) {
        context.strokeStyle = accent;
        context.lineWidth = 2;
        context.strokeRect(x - 1, y - 1, inner + 2, inner + 2);
      }
    }
  }
  context.fillStyle = ink;
  for (let head = 0; head < heads; head++) {
    context.fillText(view.pooled ? "mean" : report.heads[head], MARGIN.left + head * size + inner / 2, MARGIN.top / 2);
  }
}

// The map of the chosen head, large.
async function mapChart(room) {
  const map = await table("weights_map");
  const [, heads, bins] = map.shape;
  const pooled = mapPoolsHeads();
  const wanted = chosenHeads(heads);
  const cells = new Float32Array(bins * bins);
  for (const head of wanted) map.part(chosen.layer, head).forEach((cell, i) => { cells[i] += cell / wanted.length; });
  const rows = [...Array(bins).keys()];
  const middles = rows.map((bin) => report.mapStart + bin * map.width + (map.width - 1) / 2);
  const value = (row, column) => cells[row * bins + column];
  const of = (bin) => `${runWords(ofBin(bin))} ${map.width === 1 ? forPlotly(bin) : ""}`;
  return {
    data: [{
      type: "heatmap", x: middles, y: middles,
      // Colours follow the square root; what is written is the weight.
      z: rows.map((row) => rows.map((column) => { const cell = value(row, column); return Number.isNaN(cell) ? null : Math.sqrt(Math.max(0, cell)); })),
      text: rows.map((row) => rows.map((column) => `query ${of(row)}<br>key ${of(column)}<br>attention ${number(value(row, column))}`)),
      hovertemplate: "%{text}<extra></extra>", colorscale: viridisScale, zmin: 0, zmax: 1,
      colorbar: colourBar([0, 0.05, 0.2, 0.5, 1].map((tick) => [Math.sqrt(tick), String(tick)])),
    }],
    title: `Attention [probability], layer ${layerName()}, ${pooled ? "mean over heads" : headName()}`,
    layout: {
      xaxis: { title: "key [token]", range: [-0.5, report.length - 0.5], constrain: "domain", constraintoward: "left", showgrid: false, zeroline: false },
      yaxis: { title: "query [token]", range: [report.length - 0.5, -0.5], scaleanchor: "x", constrain: "domain", constraintoward: "top", showgrid: false, zeroline: false },
      height: Math.min(400, room - 30), dragmode: false,
    },
  };
}

onChange((changed) => { if (view && (changed.has("layer") || changed.has("head"))) drawView(); });
