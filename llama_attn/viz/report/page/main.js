// Puts the page together: findings, selects, sections, theme.

let real = null;

const lacking = (...names) => element("p", { class: "note" }, `Not shown: ${names.join(", ")} ${names.length > 1 ? "were" : "was"} not measured. Ask for it with AttentionStatsConfig(statistics=(…, ${names.map((name) => `"${name}"`).join(", ")})).`);

const tokensWord = () => `${report.unasked ? "at least " : ""}${(report.length - report.unasked).toLocaleString("en")} tokens`;

function buildHead() {
  $("model").textContent = report.model || "A model";
  document.title = ["Attention report", report.model, report.opening && `“${report.opening}”`].filter(Boolean).join(" · ");
  $("opening").append(report.opening && element("bdi", {}, `“${report.opening}”`));
  const facts = [
    report.layers.length && (report.part || `${report.numLayers} layers`),
    report.withoutAttention && `${report.withoutAttention} without attention weights`,
    report.heads.length && `${report.heads.length} heads`, tokensWord(),
    report.rows > 1 && `row ${report.row} of ${report.rows}`,
    report.backend && `backend ${report.backend}`, report.engine && `measured by ${report.engine}`,
    report.replayed && "from a second forward over what was generated",
  ];
  $("facts").textContent = facts.filter(Boolean).join(" · ");
}

function buildFindings() {
  $("answers").append(...report.findings.map(({ question, figure, caption, words, missing }) => {
    if (missing.length) return element("article", { class: "card answer" }, element("h3", {}, question), lacking(...missing));
    const text = words.map((word) => (typeof word === "string" ? word : tokenChip(word.token)));
    return element("article", { class: "card answer" },
      element("h3", {}, question),
      element("p", { class: "figure" }, element("strong", {}, figure), " ", element("span", { class: "muted" }, caption)),
      element("p", {}, ...text));
  }));
}

function buildSelects() {
  // The first layers have no sinks yet: the middle says more about the model.
  chosen.layer = Math.floor(report.layers.length / 2);
  bindSelect("layer", "layer", report.layers.map((layer, value) => ({ value, label: String(layer) })));
  bindSelect("head", "head", [{ value: MEAN, label: "mean" }, ...report.heads.map((head, value) => ({ value, label: String(head) }))]);
  $("generated").hidden = report.generated === null;
  const entries = shades();
  const first = Math.max(0, report.statistics.findIndex(({ name }) => name === "received"));
  chosen.shade = entries.length ? entries[report.statistics.length ? first : 0].value : 0;
  options($("shade"), entries, chosen.shade);
  $("shade").addEventListener("change", ({ target }) => choose({ shade: /^\d+$/.test(target.value) ? Number(target.value) : target.value }));
  onChange((changed) => {
    const { token: position } = chosen;
    $("chosen").replaceChildren(...(position === null ? [] : ["Token ", tokenChip(position), ` at ${position}`]));
    if (changed.has("shade")) $("shade").value = chosen.shade;
  });
}

function buildCharts() {
  const grids = gridsOf().map(({ name }) => ({ value: name, label: plain(name) }));
  if (report.roles) grids.unshift({ value: "roles", label: "role (what the head does)" });
  if (hasMap()) chart("map", ["layer", "head"], mapChart);
  if (hasMap() && "distance_histogram" in report.arrays) chart("distance", ["layer", "head"], distanceChart);
  else $("distance")?.remove();
  if (grids.length) {
    options($("grid-statistic"), grids, grids.some(({ value }) => value === "sink_mass") ? "sink_mass" : grids[0].value);
    $("grid-statistic").addEventListener("change", () => draw("grid"));
    chart("grid", [], gridChart);
  } else {
    $("heads").querySelector(".controls").remove();
    $("grid").replaceWith(lacking("received"));
  }
  const profiles = report.statistics.map(({ name }) => ({ value: name, label: plain(name) }));
  if (profiles.length) {
    options($("profile-statistic"), profiles, profiles.some(({ value }) => value === "entropy") ? "entropy" : profiles[0].value);
    $("profile-statistic").addEventListener("change", () => draw("profile"));
    chart("profile", [], profileChart);
  } else {
    $("layers").querySelector(".controls").remove();
    $("profile").replaceWith(lacking("entropy"));
  }
  const body = $("norms-body");
  const places = [
    ["hidden", ["hidden_norm"], () => alongChart(`Residual stream entering layer ${layerName()}`, ["hidden_norm"])],
    ["kv", ["key_norm", "value_norm"], () => alongChart(`Keys and values, layer ${layerName()}`, ["key_norm", "value_norm"])],
  ];
  for (const [id, names, make] of places) {
    const there = names.filter(named);
    body.append(there.length ? element("div", { id, class: "chart" }) : lacking(...names));
    if (there.length) chart(id, ["layer"], make);
  }
  body.append(report.massive ? element("div", { id: "massive", class: "chart" }) : lacking("hidden_max", "hidden_max_channel", "hidden_median"));
  if (report.massive) chart("massive", [], massiveChart);
}

// Which arrays hold means over how many tokens, in words.
function pooledWords() {
  const byWidth = new Map();
  for (const [name, { width }] of Object.entries(report.arrays)) {
    const [kind, ...rest] = name.split(" ");
    const words = {
      mean: `mean ${plain(rest.join(" "))}`, heads: `${plain(rest.join(" "))} of single heads`,
      pooled_weight: `the most attended keys${ownQueries.length ? `, beside ${ownQueries.length.toLocaleString("en")} tokens that keep their own` : ""}`,
    }[kind];
    if (words && width > 1) byWidth.set(width, [...(byWidth.get(width) || []), words]);
  }
  return [...byWidth].sort(([a], [b]) => a - b).map(([width, names]) => `In bins of ${width} tokens: ${names.join(", ")}. `).join("");
}

// What was rounded, pooled, left out and not measured.
// Less than the last digit that is shown anywhere is nothing.
const rounded = ({ rounding }) => (rounding < 1e-6 ? "" : `, ± ${Number((100 * rounding).toPrecision(2))}%`);

function buildMethod() {
  const body = $("method-body");
  const detail = (name) => {
    const about = report.arrays[name];
    if (!about) return null;
    const bins = about.width > 1 ? `bins of ${about.width} tokens` : "every token";
    return `${bins}${rounded(about)}`;
  };
  const rows = report.statistics.map(({ name, unit, headAxis, meaning, source }) => [
    plain(name), unit, detail(`mean ${name}`), headAxis === null ? "–" : detail(`heads ${name}`) || "left out", [...new Set([meaning, source])].filter(Boolean).join("; "),
  ]);
  const map = report.arrays.weights_map;
  if (map) rows.push(["weights map", "probability", map.shape[1] === 1 ? detail("weights_map") : "–", map.shape[1] === 1 && report.heads.length > 1 ? "left out" : detail("weights_map"), "attention weight of a bin of queries on a bin of keys"]);
  const listed = ["topk_weight", "topk_position"].some((name) => report.missing.includes(name));
  const listDetail = (name, whose) => (name in report.arrays ? `${report.arrays[name].shape[3]} keys of ${whose}${rounded(report.arrays[name])}` : null);
  const each = allKeepLists() ? "every query" : `${ownQueries.length.toLocaleString("en")} queries`;
  const kept = [listDetail("topk_weight", each), listDetail("pooled_weight", poolWidth() > 1 ? `bins of ${poolWidth()} queries` : "every query")].filter(Boolean);
  if (!listed) rows.push(["most attended keys", "probability", "–", kept.join("; ") || "left out", "the keys with the largest weights of each query"]);
  const header = element("tr", {}, ...["statistic", "unit", "mean over heads", "single heads", "meaning and source"].map((text) => element("th", { scope: "col" }, text)));
  const leftOut = report.statistics.filter(({ name, headAxis }) => headAxis !== null && !(`heads ${name}` in report.arrays)).map(({ name }) => plain(name));
  if (map && mapPoolsHeads()) leftOut.push("the attention maps");
  const words = [
    "Numbers are rounded to 16 bits, or to 8 where the file would grow too large, on a scale that is logarithmic for large numbers and linear for small ones. ",
    "“±” bounds the rounding, as a share of the number or of the median magnitude of its layer, whichever is larger. ",
    pooledWords() && `To keep the file small, neighbouring tokens were pooled to their mean. ${pooledWords()}`,
    leftOut.length ? `Single heads were left out of: ${leftOut.join(", ")}. ` : "",
    !listed && !allKeepLists() ? `The most attended keys: ${hasKeys() ? ownWords() : "left out"}. ` : "",
    answerWords(),
    mapWidth() > 1 ? `Attention maps are in bins of ${mapWidth()} × ${mapWidth()} tokens. ` : "",
    pooledWords() || leftOut.length || answerWords() || mapWidth() > 1 || !(listed || allKeepLists()) ? "" : "Nothing was pooled: every token and head has its own numbers. ",
    "The head grids and layer profiles are neither rounded nor pooled. Infinite numbers count as no data; grey means “no data”.",
  ];
  body.append(element("p", { id: "pooling" }, words.join("")));
  if (report.missing.length) body.append(element("p", { id: "missing" }, `Not measured, and so not on this page: ${report.missing.join(", ")}. Ask for them with AttentionStatsConfig(statistics=(…), norms=True).`));
  if (report.notShown.length) body.append(element("p", { id: "not-shown" }, `Measured, but without a place on this page: ${report.notShown.join(", ")}.`));
  if (!report.tokens) body.append(element("p", {}, "The token strings are unknown: AttentionStats.with_tokens adds them."));
  body.append(element("details", {}, element("summary", {}, "Detail and meaning of every statistic"), element("div", { class: "scroller" }, element("table", {}, element("thead", {}, header), element("tbody", {}, ...rows.map((cells) => element("tr", {}, ...cells.map((text) => element("td", {}, text)))))))));
}

async function main() {
  real = (await table("real")).codes;
  openQueries();
  await openLists();
  buildHead();
  buildTheme(() => { if (view) drawView(); if (shading) { drawLegend(); chunks.forEach(paint); } paintAnswer(); });
  buildFindings();
  buildSelects();
  buildText();
  await Promise.all([shadeText(), showToken()]);
  document.documentElement.dataset.ready = "text";
  performance.mark("interactive");
  await buildAnswer();
  await buildMaps();
  buildCharts();
  buildMethod();
  document.documentElement.dataset.ready = "all";
}

begin(main);
