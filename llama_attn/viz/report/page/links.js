// Which tokens the chosen one attends to, and which attend to it: from lists of the most attended keys, and from maps.

const SHOWN = 8;
const hasMap = () => "weights_map" in report.arrays;
const hasKeys = () => "topk_weight" in report.arrays;
const hasLinks = () => hasMap() || hasKeys();

// One row (what the token attends to) or column (what attends to it) of the map, one number per bin.
async function mapLine(position, direction) {
  const map = await table("weights_map");
  if (!map) return null;
  const [, heads, bins] = map.shape;
  const bin = Math.floor(position / map.width);
  const pools = heads === 1 && report.heads.length > 1;
  const chosenHeads = pools ? [0] : chosen.head === MEAN ? [...Array(heads).keys()] : [chosen.head];
  const line = new Float32Array(bins);
  for (const head of chosenHeads) {
    const cells = map.part(chosen.layer, head);
    for (let i = 0; i < bins; i++) line[i] += (direction === "from" ? cells[bin * bins + i] : cells[i * bins + bin]) / chosenHeads.length;
  }
  return { line, map, width: map.width, poolsHeads: pools && chosen.head !== MEAN };
}

// The lists of the chosen layer and head: calls `each(query bin, key, weight)`, weights averaged over the heads.
async function eachKey(each, query = null) {
  const [weights, positions] = await Promise.all([table("topk_weight"), table("topk_position")]);
  const [, heads, bins, ranks] = weights.shape;
  for (const head of chosen.head === MEAN ? [...Array(heads).keys()] : [chosen.head]) {
    const [weight, position] = [weights.part(chosen.layer, head), positions.part(chosen.layer, head)];
    const [first, last] = query === null ? [0, bins] : [query, query + 1];
    for (let i = first * ranks; i < last * ranks; i++) {
      if (position[i]) each(Math.floor(i / ranks), position[i] - 1, weight[i] / (chosen.head === MEAN ? heads : 1));
    }
  }
  return { width: weights.width, ranks };
}

// The strongest links of a token, largest first, as { start, width, weight }, and in words where they come from.
async function links(position, direction) {
  const exact = hasMap() && (await table("weights_map")).width === 1;
  if (!hasKeys() || exact) return linksOfMap(position, direction);
  const found = new Map();
  const queryAxis = { tokenAxis: "query" };
  const index = indexOf(queryAxis, position);
  const { width } = await table("topk_weight");
  const add = (at, weight) => found.set(at, (found.get(at) || 0) + weight);
  if (direction === "from") {
    if (index >= 0) await eachKey((query, key, weight) => add(key, weight), Math.floor(index / width));
  } else {
    await eachKey((query, key, weight) => { if (key === position) add(query, weight); });
  }
  const ranks = (await table("topk_weight")).shape[3];
  const { first, stride } = report.queries;
  const list = [...found].map(([at, weight]) => (direction === "from"
    ? { start: at, width: 1, weight }
    : { start: first + at * width * stride, width: 1 + (width - 1) * stride, weight }));
  const bin = width > 1 ? `, on average over ${width} neighbouring queries` : "";
  return { list: largest(list), words: `From the ${ranks} most attended keys of each query${chosen.head === MEAN ? " and head" : ""}${bin}.` };
}

async function linksOfMap(position, direction) {
  const { line, width, poolsHeads } = await mapLine(position, direction);
  const list = Array.from(line, (weight, bin) => ({ start: bin * width, width, weight })).filter(({ weight }) => weight > 0);
  const pooled = width > 1 ? ` in bins of ${width} tokens` : "";
  return { list: largest(list), words: `From the attention map${pooled}${poolsHeads ? ", mean over heads" : ""}.` };
}

const largest = (list) => list.sort((a, b) => b.weight - a.weight || a.start - b.start).slice(0, SHOWN);

// Shades for the whole text from the chosen token.
async function linkShade(direction) {
  const values = new Float32Array(report.length).fill(NaN);
  const label = direction === "from" ? "attention of the chosen token" : "attention to the chosen token";
  const shade = { values, scale: scaleOf(values, ""), unit: "probability", label, layer: chosen.layer, source: null };
  if (chosen.token === null) return { ...shade, note: "Choose a token first." };
  if (hasMap()) {
    const { line, map, width, poolsHeads } = await mapLine(chosen.token, direction);
    for (let i = 0; i < report.length; i++) values[i] = line[Math.floor(i / width)];
    const pooled = width > 1 ? `, in bins of ${width} tokens` : "";
    Object.assign(shade, { source: map, note: `From the attention map of layer ${layerName()}, ${poolsHeads ? "mean over heads" : headName()}${pooled}.` });
  } else {
    const { list, words } = await links(chosen.token, direction);
    for (const { start, width, weight } of list) values.fill(weight, start, start + width);
    Object.assign(shade, { source: await table("topk_weight"), note: words });
  }
  return { ...shade, scale: scaleOf(values, "probability") };
}

let linkRequest = 0;

async function showToken() {
  const panel = $("token");
  const mine = ++linkRequest;
  const position = chosen.token;
  if (position === null) {
    panel.replaceChildren(element("p", { class: "muted" }, "No token is chosen yet."));
    return;
  }
  const heading = element("h3", {}, `Token ${position} `, tokenChip(position));
  // Until its numbers have been unpacked; those of the token before stay, which flickers less.
  if (!panel.querySelector("h3")) panel.replaceChildren(heading, element("p", { class: "muted" }, "Unpacking its numbers …"));
  const parts = [heading, await numbersOf(position)];
  if (hasLinks()) {
    parts.push(element("div", { class: "both" }, await linkList(position, "from"), await linkList(position, "to")));
    parts.push(element("p", { class: "muted small source" }, `${(await links(position, "from")).words} Shares are of the attention of the query.`));
  } else {
    parts.push(element("p", { class: "muted small" }, "Where its attention goes was not measured: that needs weights_map, or topk_weight and topk_position."));
  }
  if (mine === linkRequest) panel.replaceChildren(...parts);
}

// Every statistic of the token, in the chosen layer and head.
async function numbersOf(position) {
  const list = element("dl", { class: "numbers-of" });
  for (const statistic of report.statistics) {
    const { values, source, layer } = await along(statistic);
    const value = values[position];
    if (!Number.isFinite(value)) continue;
    list.append(element("dt", {}, plain(statistic.name)), element("dd", {
      "data-statistic": statistic.name, "data-value": value, "data-error": source.error(layer, value),
    }, withUnit(value, statistic.unit)));
  }
  const missing = list.children.length ? null : element("p", { class: "muted small" }, "No data: padding, or no measured query.");
  return element("details", {}, element("summary", {}, `Numbers of this token, layer ${layerName()}, ${headName()}`), list, missing);
}

async function linkList(position, direction) {
  const { list } = await links(position, direction);
  const top = Math.max(...list.map(({ weight }) => weight), 1e-9);
  const rows = list.map(({ start, width, weight }) => element("li", {}, element("button", {
    type: "button", class: "link", "data-start": start, "data-weight": weight,
    onclick: () => { choose({ token: start }); focusToken(start, true); },
  },
  element("span", { class: "place" }, width > 1 ? `${start}–${Math.min(start + width, report.length) - 1}` : String(start)),
  report.tokens ? element("bdi", { class: "chip" }, token(start) || "(empty)", width > 1 ? " …" : "") : null,
  element("span", { class: "weight" }, percent(weight)),
  element("span", { class: "meter", style: `width:${(100 * weight) / top}%` }))));
  return element("section", { class: `links ${direction}` },
    element("h4", {}, direction === "from" ? "It attends to" : "Attended to by"),
    rows.length ? element("ol", { class: list[0].width > 1 ? "bins" : null }, ...rows) : element("p", { class: "muted small" }, hasKeys() && direction === "to" ? "It is not among the keys listed for any query." : "Nothing."),
    await strip(position, direction));
}

// The line of the map along the whole text, as a thin picture.
async function strip(position, direction) {
  const found = await mapLine(position, direction);
  if (!found || found.line.length < 2) return null;
  const { line, width } = found;
  const scale = scaleOf(line, "probability");
  const canvas = element("canvas", { class: "strip", width: line.length, height: 1, role: "img", "aria-label": "Attention along the text, from the map" });
  const context = canvas.getContext("2d");
  const picture = context.createImageData(line.length, 1);
  line.forEach((weight, i) => {
    const share = scale.share(weight);
    picture.data.set(Number.isNaN(share) ? [128, 128, 128, 90] : [...viridis(share), 255], 4 * i);
  });
  context.putImageData(picture, 0, 0);
  canvas.addEventListener("pointermove", (event) => {
    const bin = Math.min(line.length - 1, Math.max(0, Math.floor((event.offsetX / canvas.clientWidth) * line.length)));
    showTip(`${binLabel(bin * width, width)}: ${Number.isFinite(line[bin]) ? percent(line[bin]) : "no data"}`, event.clientX, event.clientY);
  });
  canvas.addEventListener("pointerleave", hideTip);
  return canvas;
}

onChange((changed) => { if (["token", "layer", "head"].some((name) => changed.has(name))) showToken(); });
