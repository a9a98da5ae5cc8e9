// Tables of tokens and channels, and how many keys matter.

// A table that a click on a heading sorts, largest first. Columns are [heading, words of a row, number of a row].
function sortable(columns, rows, by) {
  const body = element("tbody");
  const headings = columns.map(([name, , value], at) => element("th", { scope: "col" }, value ? element("button", { type: "button", onclick: () => sort(at) }, name) : name));
  const lines = rows.map((row) => ({ row, line: element("tr", {}, ...columns.map(([, words]) => element("td", {}, words(row)))) }));
  const sort = (at) => {
    headings.forEach((heading, i) => { if (i === at) heading.setAttribute("aria-sort", "descending"); else heading.removeAttribute("aria-sort"); });
    const value = columns[at][2];
    body.append(...[...lines].sort((a, b) => value(b.row) - value(a.row)).map(({ line }) => line));
  };
  sort(by);
  return element("div", { class: "scroller card lines", tabindex: 0 }, element("table", {}, element("thead", {}, element("tr", {}, ...headings)), body));
}

const count = (value) => value.toLocaleString("en");
const others = (left, what) => (left ? ` ${count(left)} more ${what} have fewer and are left out.` : "");

function buildSinks() {
  if (!report.sinksKnown) {
    $("sinks-note").textContent = "Unknown: received was not measured.";
    return;
  }
  const heads = report.layers.length * report.heads.length;
  const rows = report.sinks.map(([, first, behind, timesFirst, timesBehind], i) => ({ name: report.tokens[report.sinkTokens[i]], first, behind, timesFirst, timesBehind }));
  const rate = (sinks, times) => (times ? sinks / (times * heads) : NaN);
  const rateFirst = ({ first, timesFirst }) => rate(first, timesFirst);
  const rateBehind = ({ behind, timesBehind }) => rate(behind, timesBehind);
  const known = (value) => (Number.isNaN(value) ? -1 : value);
  $("sinks-note").textContent = `A token is a sink of a head if it receives more than ${report.epsilon} of the attention of the queries that see it, on average. Its rate is over all heads${ofPart()} and all its occurrences, as the first token of a text and further behind.${others(report.otherSinks, "tokens")}`;
  $("sinks-body").replaceChildren(sortable([
    ["token", ({ name }) => element("bdi", { class: "chip" }, name || "(empty)")],
    ["times first", ({ timesFirst }) => count(timesFirst), ({ timesFirst }) => timesFirst],
    ["rate when first", (row) => percent(rateFirst(row)), (row) => known(rateFirst(row))],
    ["times behind", ({ timesBehind }) => count(timesBehind), ({ timesBehind }) => timesBehind],
    ["rate behind", (row) => percent(rateBehind(row)), (row) => known(rateBehind(row))],
    ["sinks in all", ({ first, behind }) => count(first + behind), ({ first, behind }) => first + behind],
  ], rows, 5));
}

function buildMassive() {
  if (!report.massiveKnown) {
    $("massive-note").textContent = "Unknown: hidden_max, hidden_max_channel and hidden_layer_median were not measured.";
    return;
  }
  const channels = new Set(report.massive.map(([, channel]) => channel)).size;
  $("massive-note").textContent = report.massive.length
    ? `Numbers of the residual stream above 100 and 1,000 × the median of their layer: in ${channels} ${channels === 1 ? "channel" : "channels"}. A layer is named by what enters it.${others(report.otherMassive, "channels of layers")}`
    : `No number of the residual stream is above 100 and 1,000 × the median of its layer in any of ${textsWord(report.texts)}.`;
  if (!report.massive.length) return;
  $("massive-body").replaceChildren(sortable([
    ["layer", ({ layer }) => (layer === report.numLayers ? "output" : String(layer)), ({ layer }) => -layer],
    ["channel", ({ channel }) => String(channel), ({ channel }) => -channel],
    ["tokens", ({ tokens }) => count(tokens), ({ tokens }) => tokens],
    ["of all tokens", ({ tokens }) => percent(tokens / report.tokensRead), ({ tokens }) => tokens],
    ["texts", ({ texts }) => count(texts), ({ texts }) => texts],
    ["of all texts", ({ texts }) => percent(texts / report.texts), ({ texts }) => texts],
  ], report.massive.map(([layer, channel, tokens, texts]) => ({ layer, channel, tokens, texts })), 4));
}

async function keysChart(room) {
  const bounds = await table("keys");
  const heads = report.heads.length;
  const of = (bound) => report.layers.map((_, layer) => [...bounds.part(bound, layer)].filter(Number.isFinite));
  const [least, most] = [of(0), of(1)];
  const mean = (list) => (list.length ? list.reduce((sum, value) => sum + value, 0) / list.length : NaN);
  const names = report.layers.map(String);
  const blue = isDark() ? OKABE_ITO.sky : OKABE_ITO.blue;
  const line = (y, name, more) => ({ x: names, y: nullable(y), name, mode: "lines", hovertemplate: `layer %{x}<br>${name}: %{y:.4g} keys<extra></extra>`, ...more });
  const all = [...least, ...most].flat();
  return {
    data: [
      line(least.map((list) => Math.min(...list)), "fewest", { line: { width: 0 }, showlegend: false, hoverinfo: "skip", hovertemplate: null }),
      line(most.map((list) => Math.max(...list)), `all ${heads} heads`, { line: { width: 0 }, fill: "tonexty", fillcolor: `rgba(${channels(blue).join()},0.15)`, hoverinfo: "skip", hovertemplate: null }),
      line(most.map(mean), "mean over heads, at most", { mode: "lines+markers", line: { color: blue, width: 2 }, marker: { size: 5 } }),
      line(least.map(mean), "mean over heads, at least", { line: { color: blue, width: 1.5, dash: "dash" } }),
    ],
    title: `Keys per query that hold ${percent(report.share)} of the attention, chosen best${ofPart()}`,
    layout: { xaxis: namesAxis("layer", names, room), yaxis: { title: "keys per query [keys]", ...valueAxis(all) }, height: 340 },
  };
}

function buildKeys() {
  if ("keys" in report.arrays) chart("keys", [], keysChart);
  else $("keys").replaceWith(element("p", { class: "note" }, "Unknown: weight_count and weight_mass were not measured."));
}
