// Which tokens the chosen one attends to, and which attend to it: the panel beside the text.

const SHOWN = 8;
const largest = (list) => list.sort((a, b) => b.weight - a.weight || a.start - b.start).slice(0, SHOWN);
// The strongest links of a token, largest first, as { start, last, weight }, for lists with bounds, whose they are, and where they come from.
async function links(position, direction) {
  if (direction === "to" && listsTellQueries()) return { list: largest(await queriesOf(position)), words: wordsTo() };
  if (direction === "from" && hasKeys() && !mapIsExact()) {
    const source = sourceOf(position);
    if (!source) return { list: [], words: `Token ${position} is no measured query.` };
    if (source.kind !== "map") {
      const { list, ranks, rest } = await keysOf(source);
      const shown = largest(list);
      // Of the others, those that some heads list may have most.
      const most = Math.max(rest, ...list.slice(SHOWN).map((each) => each.most));
      return { list: shown, of: source.of, words: wordsOf(source, ranks, most) };
    }
  }
  return linksOfMap(position, direction);
}

const ofHeads = () => (chosen.head === MEAN && report.heads.length > 1 ? " of each head" : "");

// What a list of keys is, and what is not in it.
function wordsOf({ kind, of }, ranks, most) {
  if (kind === "topk" || of.start === of.last) {
    const means = ofHeads() ? " A mean is at least what is given (≥) where some head does not list the key." : "";
    const others = Number.isFinite(most) && most > 0 ? ` No other key gets more than ${atMost(most)}.` : "";
    return `From its own ${ranks} most attended keys${ofHeads()}.${means}${others}`;
  }
  return `The mean over ${runWords(of)}, counting the ${poolWidth() > 1 ? report.topK : ranks} most attended keys of each query${ofHeads()}, so that it is at least what is given (≥). ` +
    `Its own keys were left out to keep the file small: report(…, exact=[${chosen.token}]) keeps them.`;
}

function ownWords() {
  const [own, all] = [ownQueries.length, report.queries.count].map((count) => count.toLocaleString("en"));
  const rest = poolWidth() === 1 ? `, the others ${report.arrays.pooled_weight.shape[3]} each` : "";
  return `${own} of ${all} have lists of their own, with ${report.topK} keys${rest}`;
}

function wordsTo() {
  const lists = `From the most attended keys of each query${ofHeads()}`;
  const others = "A query whose list leaves the token out may give it something too, and more than one that is listed.";
  if (allKeepLists()) return `${lists}. ${others}`;
  return `${lists}: ${ownWords()}${poolWidth() > 1 ? `, the others are means over ${poolWidth()} queries` : poolWidth() ? "" : ", the others were left out to keep the file small"}. ${others}`;
}

async function linksOfMap(position, direction) {
  const { line, table: map, poolsHeads } = await mapLine(position, direction);
  const list = Array.from(line, (weight, bin) => ({ ...ofBin(bin), weight })).filter(({ weight }) => weight > 0);
  const pooled = map.width > 1 ? ` in bins of ${map.width} tokens` : "";
  return { list: largest(list), of: ofBin(binOf(position)), words: `From the attention map${pooled}${poolsHeads ? ", mean over heads" : ""}.` };
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
    const [from, to] = [await links(position, "from"), await links(position, "to")];
    const words = [...new Set([from.words, to.words]), "Shares are of the attention of the query."].join(" ");
    parts.push(element("div", { class: "both" }, await linkList(position, from, "from"), await linkList(position, to, "to")));
    parts.push(element("p", { class: "muted small source" }, words));
  } else {
    parts.push(element("p", { class: "muted small" }, "Where its attention goes was not measured: that needs weights_map, or topk_weight and topk_position."));
  }
  if (mine === linkRequest) panel.replaceChildren(...parts);
}

// Every statistic of the token, in the chosen layer and head.
async function numbersOf(position) {
  const list = element("dl", { class: "numbers-of" });
  let known = 0;
  for (const statistic of report.statistics) {
    const { values, source, layer, poolsHeads } = await along(statistic);
    const value = values[position];
    list.append(element("dt", {}, plain(statistic.name)), element("dd", {
      "data-statistic": statistic.name, ...(Number.isFinite(value) && { "data-value": value, "data-error": source.error(layer, value) }),
    }, Number.isFinite(value) ? withUnit(value, statistic.unit) : "–", ...Number.isFinite(value) ? [poolsHeads && ", mean over heads", source.width > 1 && `, mean over ${source.width} tokens`].filter(Boolean) : []));
    known += Number.isFinite(value);
  }
  const missing = known ? null : element("p", { class: "muted small" }, "No data: padding, or no measured query.");
  return element("details", {}, element("summary", {}, `Numbers of this token, layer ${layerName()}, ${headName()}`), list, missing);
}

// Whose list it is, where it is not only the chosen token's.
function headingOf(of, direction) {
  if (!of || of.last === of.start) return direction === "to" ? "Attended to by" : "It attends to";
  return direction === "to" ? `${sentence(runWords(of))}, attended to by` : `${sentence(meanWords(of))}, attend to`;
}

async function linkList(position, { list, of }, direction) {
  const top = Math.max(...list.map(({ weight }) => weight), 1e-9);
  const bins = list.some(({ start, last }) => last > start);
  const rows = list.map((each) => element("li", {}, element("button", {
    type: "button", class: "link", "data-start": each.start, "data-last": each.last, "data-weight": each.weight, "data-least": each.least, "data-most": each.most,
    onclick: () => { choose({ token: each.start }); focusToken(each.start, true); },
  },
  element("span", { class: "place" }, each.last > each.start ? `${each.start}–${each.last}` : String(each.start)),
  report.tokens ? element("bdi", { class: "chip" }, token(each.start) || "(empty)", each.last > each.start ? " …" : "") : null,
  element("span", { class: "weight" }, each.open ? atLeast(each.least) : percent(each.weight)),
  element("span", { class: "meter", style: `width:${(100 * each.weight) / top}%` }))));
  const heading = headingOf(of, direction);
  return element("section", { class: `links ${direction}` },
    element("h4", {}, heading),
    rows.length ? element("ol", { class: bins ? "bins" : null }, ...rows) : element("p", { class: "muted small" }, hasKeys() && direction === "to" ? "It is not among the keys listed for any query." : "Nothing."),
    await strip(position, direction));
}

// The line of the map along the whole text, as a thin picture.
async function strip(position, direction) {
  const found = await mapLine(position, direction);
  if (!found || found.line.length < 2) return null;
  const { line, table: { width } } = found;
  const bin = ofBin(binOf(position));
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
    const at = Math.min(line.length - 1, Math.max(0, Math.floor((event.offsetX / canvas.clientWidth) * line.length)));
    showTip(`${runWords(ofBin(at))}: ${Number.isFinite(line[at]) ? percent(line[at]) : "no data"}`, event.clientX, event.clientY);
  });
  canvas.addEventListener("pointerleave", hideTip);
  const note = width > 1 ? element("p", { class: "muted small" }, `From the map, along the text: ${direction === "to" ? `attention to ${runWords(bin)}` : meanWords(bin)}, in bins of ${width}.`) : null;
  return element("div", {}, canvas, note);
}

onChange((changed) => { if (["token", "layer", "head"].some((name) => changed.has(name))) showToken(); });
