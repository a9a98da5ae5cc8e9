// Charts: drawn by plotly when they come into view, and again when what they show changes.

const drawn = new Map(); // id -> { title, plot, make, depends, near, stale }

function chart(id, depends, make) {
  const [title, plot] = [element("p", { class: "chart-title" }), element("div", { class: "plot" })];
  $(id).replaceChildren(title, plot);
  const entry = { title, plot, make, depends, near: false, stale: true };
  drawn.set(id, entry);
  new IntersectionObserver(([seen]) => {
    entry.near = seen.isIntersecting;
    if (entry.near && entry.stale) draw(id);
  }, { rootMargin: "300px" }).observe($(id));
}

async function draw(id) {
  const entry = drawn.get(id);
  entry.stale = false;
  const mine = (entry.request = (entry.request || 0) + 1);
  const [Plotly, figure] = await Promise.all([charts(), entry.make(entry.plot.clientWidth)]);
  if (mine !== entry.request) return;
  entry.title.textContent = figure.title;
  entry.onclick = figure.onclick;
  await Plotly.react(entry.plot, figure.data, styled(figure.layout), { displayModeBar: false, responsive: true });
  if (!entry.clickable) {
    entry.clickable = true;
    entry.plot.on("plotly_click", ({ points }) => entry.onclick?.(points[0]));
  }
  $(id).dataset.drawn = mine;
}

function redraw(names) {
  for (const [id, entry] of drawn) {
    if (names !== null && !entry.depends.some((name) => names.has(name))) continue;
    entry.stale = true;
    if (entry.near) draw(id);
  }
}

function styled(layout) {
  const [ink, muted, line] = [themed("ink"), themed("muted"), themed("line")];
  const axis = (given = {}) => ({
    gridcolor: line, zerolinecolor: line, linecolor: line, tickcolor: line, tickfont: { color: muted }, automargin: true,
    ...given, title: { text: given.title, font: { color: ink, size: 12 }, standoff: 8 },
  });
  return {
    height: 320, hovermode: "closest", dragmode: layout.grey || matchMedia("(pointer: coarse)").matches ? false : "zoom", ...layout,
    font: { family: "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", size: 12, color: ink },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: layout.grey ? themed("no-data") : "rgba(0,0,0,0)",
    margin: { l: 48, r: 16, t: 12, b: 44 },
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { color: ink }, ...layout.legend },
    hoverlabel: { font: { family: "system-ui, sans-serif" }, align: "left" },
    xaxis: axis(layout.xaxis), yaxis: axis(layout.yaxis),
  };
}

const colourBar = (ticks) => ({
  thickness: 12, outlinewidth: 0, tickfont: { size: 11 },
  ...(ticks ? { tickvals: ticks.map(([at]) => at), ticktext: ticks.map(([, text]) => text) } : {}),
});

const nullable = (values) => Array.from(values, (value) => (Number.isFinite(value) ? value : null));

// Layers and heads as names, so that the axis has one place for each that was measured.
function namesAxis(title, names, room) {
  const every = Math.ceil(names.length / Math.max(4, (room - 100) / 30));
  return { title, type: "category", tickangle: 0, tickvals: names.filter((_, i) => i % every === 0).map(String) };
}

// Axes of a picture of layer × head as in the figures of llama_attn.viz: layers from top to bottom, heads side by side.
function gridLayout(layers, heads, kind, room) {
  const height = 60 + Math.max(200, Math.min(60, layers.length) * 20);
  return {
    xaxis: { ...namesAxis(kind, heads, room), showgrid: false }, grey: true, height,
    yaxis: { ...namesAxis("layer", layers, height + 160), autorange: "reversed", showgrid: false },
  };
}

// Ticks of a logarithmic axis, each written in full: 1, 2 and 5 of every decade, or of many decades the powers of ten.
function logAxis(values) {
  const known = values.filter((value) => Number.isFinite(value) && value > 0);
  const [low, high] = [Math.floor(Math.log10(Math.min(...known))), Math.ceil(Math.log10(Math.max(...known)))];
  const ticks = [];
  for (let power = low; power <= high; power++) for (const digit of high - low > 3 ? [1] : [1, 2, 5]) ticks.push(digit * 10 ** power);
  return { type: "log", tickvals: ticks, ticktext: ticks.map(number) };
}

const valueAxis = (values) => (isSpiky(values) ? logAxis(values) : { type: "linear" });

// What a title of numbers of all layers ends with if they are not all of the model's.
const ofPart = () => (report.part ? `, ${report.part}` : "");

onChange(redraw);
