// One head: where its scores lie among those of all heads, how they spread over texts, and along them.

const NUMBERS = ["score", "this head", "among all heads", "place", "std over texts", "smallest to largest text", "texts"];

// All heads as thin lines, the chosen one as a thick one.
function strip(values, at) {
  const canvas = element("canvas", { width: 120, height: 16, role: "img", "aria-label": "where it lies among all heads" });
  const context = canvas.getContext("2d");
  const known = values.filter(Number.isFinite);
  const [low, high] = known.reduce(([least, most], value) => [Math.min(least, value), Math.max(most, value)], [Infinity, -Infinity]);
  const log = isSpiky(values);
  const share = (value) => (high > low ? (log ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low)) : 0.5);
  const line = (value, width) => context.fillRect(Math.round(2 + share(value) * 115 - width / 2), width > 1 ? 0 : 4, width, width > 1 ? 16 : 8);
  context.fillStyle = themed("muted");
  context.globalAlpha = 0.5;
  for (const value of known) line(value, 1);
  context.globalAlpha = 1;
  context.fillStyle = themed("chosen");
  if (Number.isFinite(values[at])) line(values[at], 3);
  return canvas;
}

let numbersRequest = 0;

async function showNumbers() {
  const mine = ++numbersRequest;
  const at = chosen.layer * report.heads.length + chosen.head;
  const rows = await Promise.all(report.scores.map(async ({ name, unit, meaning, spread }) => {
    const values = await valuesOf(name);
    const [, std, low, high, count] = spread ? (await table(`texts ${name}`)).part(chosen.layer, chosen.head) : [NaN, NaN, NaN, NaN, NaN];
    const known = values.filter(Number.isFinite).length;
    const rank = Number.isFinite(values[at]) ? 1 + values.filter((value) => value > values[at]).length : null;
    return element("tr", { "data-score": name, "data-value": values[at], "data-std": std, "data-low": low, "data-high": high, "data-count": count, "data-rank": rank },
      element("td", { title: meaning }, plain(name)), element("td", {}, withUnit(values[at], unit)), element("td", {}, strip(values, at)),
      element("td", {}, rank === null ? "–" : `${rank} of ${known}`), element("td", {}, number(std)),
      element("td", {}, Number.isFinite(low) ? `${number(low)} – ${number(high)}` : "–"), element("td", {}, number(count)));
  }));
  if (mine !== numbersRequest) return;
  $("numbers").replaceChildren(element("thead", {}, element("tr", {}, ...NUMBERS.map((name) => element("th", { scope: "col" }, name)))), element("tbody", {}, ...rows));
  $("numbers").dataset.head = `${chosen.layer} ${chosen.head}`;
}

// The share of texts in which the head has its most frequent role.
async function showRole() {
  const role = report.roles[chosen.layer]?.[chosen.head] ?? null;
  const share = role && scoreNamed(`${role}_share`) ? (await table(`score ${role}_share`)).part(chosen.layer)[chosen.head] : NaN;
  const words = role === null ? "role: no data" : `${plain(role)} in ${percent(share)} of the texts`;
  $("chosen").textContent = words;
  $("one-title").textContent = sentence(headName());
  $("one-role").textContent = `${sentence(words)}. Below are its scores over ${textsWord(report.texts)}${ofPart()}; its place counts from the highest.`;
}

const chosenStatistic = () => report.statistics[chosen.statistic];
const binned = (label) => ({ type: "category", showgrid: false, ...label });

async function overTextsChart(room) {
  const statistic = chosenStatistic();
  const counts = await table(`histogram ${statistic.name}`);
  const { edges } = counts.about;
  const names = edges.slice(1).map((end, i) => (edges[i] === null ? `below ${number(end)}` : end === null ? `${number(edges[i])} or more` : `${number(edges[i])} – ${number(end)}`));
  const every = Math.ceil(names.length / Math.max(4, (room - 100) / 45));
  const shown = names.filter((_, i) => i % every === 0);
  return {
    data: [{
      type: "bar", x: names, y: [...counts.part(...placeOf(statistic))], marker: { color: isDark() ? OKABE_ITO.sky : OKABE_ITO.blue },
      hovertemplate: `%{x} ${statistic.unit}<br>%{y} texts<extra></extra>`,
    }],
    title: `Mean ${plain(statistic.name)} of each text, ${whose(statistic)}`,
    layout: { xaxis: binned({ title: titleOf(statistic), tickvals: shown, ticktext: shown.map((name) => name.split(" – ")[0]), tickangle: 0 }), yaxis: { title: "texts", rangemode: "tozero" }, bargap: 0.05 },
  };
}

async function byPositionChart() {
  const statistic = chosenStatistic();
  const numbers = await table(`positions ${statistic.name}`);
  const all = numbers.part(...placeOf(statistic));
  const places = report.positions.map((_, bin) => bin);
  const [mean, std, low, high] = [0, 1, 2, 3].map((of) => places.map((bin) => all[4 * bin + of]));
  const names = report.positions.map((start, i) => {
    const last = Math.min(report.positions[i + 1] ?? report.maxTokens, report.maxTokens) - 1;
    return last > start ? `${start}–${last}` : String(start);
  });
  return {
    data: spreadLines(names, { mean, std, low, high }, statistic.of, "token %{x}", statistic.unit),
    title: `${sentence(plain(statistic.name))} by position, ${whose(statistic)}`,
    layout: { xaxis: binned({ title: "position [token]" }), yaxis: { title: titleOf(statistic), ...valueAxis([...low, ...mean, ...high]) } },
  };
}

function buildHead() {
  // The first layers have no sinks yet: the middle says more about the model.
  chosen.layer = Math.floor(report.layers.length / 2);
  bindSelect("layer", "layer", report.layers.map((layer, value) => ({ value, label: String(layer) })));
  bindSelect("head", "head", report.heads.map((head, value) => ({ value, label: String(head) })));
  if (!report.statistics.length) return;
  chosen.statistic = Math.max(0, report.statistics.findIndex(({ name }) => name === "entropy"));
  bindSelect("statistic", "statistic", report.statistics.map(({ name }, value) => ({ value, label: plain(name) })));
  for (const [id, name, make] of [["over-texts", "histogram", overTextsChart], ["by-position", "positions", byPositionChart]]) {
    if (report.statistics.every((statistic) => `${name} ${statistic.name}` in report.arrays)) chart(id, ["layer", "head", "statistic"], make);
    else $(id).replaceWith(element("p", { class: "note" }, "Left out to keep the file small."));
  }
  const note = () => {
    const { meaning, name } = chosenStatistic();
    $("statistic-note").textContent = `${sentence(meaning || plain(name))}. Over texts: one number of each, its mean. By position: the numbers of all ${chosenStatistic().of} of all texts, in bins of positions.`;
  };
  onChange((changed) => {
    if (changed.has("statistic")) note();
    if (changed.has("layer") || changed.has("head")) { showNumbers(); showRole(); }
  });
  note();
}
