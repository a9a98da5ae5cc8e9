// What the boxes of the text are shaded by: a statistic, or the attention of, or to, the chosen token.

const FROM = "from", TO = "to", MAP_FROM = "map from", MAP_TO = "map to";

// What boxes can be shaded by. What is pooled says so here, where it is chosen.
function shades() {
  const entries = report.statistics.map((_, value) => ({ value, label: labelOf(value) }));
  if (!hasLinks()) return entries;
  entries.push({ value: FROM, label: labelOf(FROM) }, { value: TO, label: labelOf(TO) });
  if (hasKeys() && mapWidth() > 1) entries.push({ value: MAP_FROM, label: labelOf(MAP_FROM) }, { value: MAP_TO, label: labelOf(MAP_TO) });
  return entries;
}

// Whether links are read from the map: where that is asked for or knows best, or where there are no lists.
function isOfMap(shade) {
  if (shade === MAP_FROM || shade === MAP_TO || mapIsExact() || !hasKeys()) return true;
  return shade === TO ? !listsTellQueries() : chosen.token !== null && sourceOf(chosen.token)?.kind === "map";
}

function labelOf(shade) {
  if (typeof shade === "number") {
    const { name, headAxis } = report.statistics[shade];
    const { width } = (headAxis === "head" && chosen.head !== MEAN && report.arrays[`heads ${name}`]) || report.arrays[`mean ${name}`];
    return `${plain(name)}${width > 1 ? `, in bins of ${width} tokens` : ""}`;
  }
  const word = shade === FROM || shade === MAP_FROM ? "of" : "to";
  const position = chosen.token;
  if (mapWidth() > 1 && isOfMap(shade)) {
    const words = word === "of" ? meanWords : runWords;
    const whose = position === null ? "the chosen token" : words(ofBin(binOf(position)));
    return `attention ${word} ${whose}, in bins of ${mapWidth()} tokens`;
  }
  const of = position === null || shade === TO ? null : sourceOf(position)?.of;
  if (of && of.last > of.start) return `attention of ${meanWords(of)}`;
  return `attention ${word} the chosen token${shade === TO && poolWidth() > 1 && !mapIsExact() ? `, partly in bins of ${poolWidth()} tokens` : ""}`;
}

// The words of the control follow what is chosen.
function nameShades() {
  for (const option of $("shade").options) option.textContent = labelOf(/^\d+$/.test(option.value) ? Number(option.value) : option.value);
}

async function shadeOf(shade) {
  if (typeof shade === "number") return statisticShade(shade);
  const direction = shade === FROM || shade === MAP_FROM ? "from" : "to";
  const values = new Float32Array(report.length).fill(NaN);
  const result = { values, scale: scaleOf(values, ""), unit: "probability", label: labelOf(shade), layer: chosen.layer, source: null };
  const position = chosen.token;
  if (position === null) return { ...result, note: "Choose a token first." };
  const sees = direction === "from" ? (at) => canSee(position, at) : (at) => canSee(at, position);
  const unseen = direction === "from" ? `not seen by token ${position}` : `does not see token ${position}`;
  const found = await (isOfMap(shade) ? mapShade : listShade)(position, direction, values);
  for (let at = 0; at < report.length; at++) if (!sees(at)) values[at] = NaN;
  const isQuery = (at) => direction === "from" || queryIndex(at) >= 0;
  const blank = (at) => (!sees(at) ? { name: "unseen", words: unseen } : isQuery(at) ? found.rest : null);
  return { ...result, ...found, blank, scale: scaleOf(values, "probability") };
}

async function mapShade(position, direction, values) {
  const { line, table: source, poolsHeads } = await mapLine(position, direction);
  for (let i = 0; i < report.length; i++) values[i] = line[binOf(i)];
  const pooled = source.width > 1 ? `, in bins of ${source.width} tokens: each value is that of a whole bin` : "";
  return { source, note: `From the attention map of layer ${layerName()}, ${poolsHeads ? "mean over heads" : headName()}${pooled}.` };
}

// From lists: those who are not listed get less than those who are, and the page may know how much at most.
async function listShade(position, direction, values) {
  if (direction === "from") {
    const from = sourceOf(position);
    if (!from) return { note: `Token ${position} is no measured query.` };
    const { list, rest, table: source, ranks } = await keysOf(from);
    for (const { start, weight } of list) values[start] = weight;
    const most = Number.isFinite(rest) ? `: at most ${atMost(rest)}` : "";
    return {
      source, least: new Map(list.filter(({ open }) => open).map(({ start, least }) => [start, least])), note: wordsOf(from, ranks, rest),
      rest: { name: "rest", words: `not among the ${ranks} most attended keys${most}` },
    };
  }
  const list = await queriesOf(position);
  const least = new Map();
  // Bins first, and not on those who keep their own lists.
  for (const each of list.sort((a, b) => (b.last - b.start) - (a.last - a.start))) {
    for (let at = each.start; at <= each.last; at++) {
      if (each.last > each.start && (queryIndex(at) < 0 || ownPlace.has(queryIndex(at)))) continue;
      values[at] = each.weight;
      if (each.open) least.set(at, each.least); else least.delete(at);
    }
  }
  const [source] = await listsOf("topk_weight" in report.arrays ? "topk" : "pooled");
  return { source, least, note: wordsTo(), rest: { name: "rest", words: "does not list it among its most attended keys" } };
}

async function statisticShade(index) {
  const statistic = report.statistics[index];
  if (!statistic) {
    return { values: new Float32Array(report.length).fill(NaN), scale: scaleOf([], ""), unit: "", label: "", note: "No statistic of tokens was measured.", layer: 0 };
  }
  const { values, source, layer, poolsHeads } = await along(statistic);
  const notes = [`${statistic.meaning || plain(statistic.name)}, layer ${layerName()}, ${where(statistic)}.`];
  if (layer < 0) notes.push("Not measured in this layer.");
  if (poolsHeads) notes.push("Single heads were left out to keep the file small: this is the mean over heads.");
  if (source.width > 1) notes.push(`Each value is the mean over ${source.width} tokens.`);
  return { values, source, layer, unit: statistic.unit, label: labelOf(index), scale: scaleOf(values, statistic.unit), note: sentence(notes.join(" ")) };
}

function where(statistic) {
  if (statistic.headAxis === null) return "which has no heads";
  return statistic.headAxis === "kv_head" ? "mean over KV heads" : headName();
}
