// Puts the page of a corpus together.

function buildFacts() {
  $("model").textContent = report.model || "A model";
  document.title = ["Corpus report", report.model, textsWord(report.texts)].filter(Boolean).join(" · ");
  const cut = report.cut === report.texts ? "all" : count(report.cut);
  const facts = [
    textsWord(report.texts), `${count(report.tokensRead)} tokens`,
    report.cut && `${cut} cut to ${count(report.maxTokens)} tokens`,
    report.skipped && `${count(report.skipped)} ${report.skipped === 1 ? "record" : "records"} skipped`,
    report.part || `${report.layers.length} layers · ${report.heads.length} heads`,
  ];
  $("facts").textContent = facts.filter(Boolean).join(" · ");
}

// What was rounded and left out.
function detailWords() {
  const names = Object.keys(report.arrays);
  const rounded = names.filter((name) => report.arrays[name].rounding).map((name) => [plain(name.replace("positions ", "")), report.arrays[name].rounding]);
  const without = (kind) => report.statistics.filter(({ name }) => !(`${kind} ${name}` in report.arrays)).map(({ name }) => plain(name));
  const fewer = report.examplesOf.flatMap((name) => ["strongest", "deciles"].flatMap((kind) => {
    const all = kind === "strongest" ? report.ranks : report.each;
    const kept = report.arrays[`${kind} ${name} score`]?.count ?? 0;
    return kept < all ? [`${plain(name)}, ${kind === "strongest" ? "strongest" : "each tenth"}: ${kept} of ${all}`] : [];
  }));
  const lost = [["histogram", "Spread over texts"], ["positions", "Numbers by position"]].flatMap(([kind, words]) => (without(kind).length ? [`${words} were left out of: ${without(kind).join(", ")}. `] : []));
  return [
    "Scores of heads are neither rounded nor pooled. ",
    rounded.length ? `Numbers by position were rounded to keep the file small, by this share of the number or of the median of its layer: ${rounded.map(([name, share]) => `${name} ± ${Number((100 * share).toPrecision(2))}%`).join(", ")}. ` : "",
    ...lost,
    fewer.length ? `Texts were left out to keep the file small. Kept are of ${fewer.join("; ")}. ` : "",
    rounded.length || lost.length || fewer.length ? "" : "Nothing was left out. ",
    "Infinite numbers count as no data; grey means “no data”.",
  ].join("");
}

function buildMethod() {
  const rows = report.scores.map(({ name, unit, meaning, source }) => [plain(name), unit, [...new Set([meaning, source])].filter(Boolean).join("; ")]);
  const header = element("tr", {}, ...["score", "unit", "meaning and source"].map((text) => element("th", { scope: "col" }, text)));
  $("method-body").append(
    element("p", { id: "pooling" }, detailWords()),
    element("details", {}, element("summary", {}, "Meaning of every score"), element("div", { class: "scroller" }, element("table", {}, element("thead", {}, header), element("tbody", {}, ...rows.map((cells) => element("tr", {}, ...cells.map((text) => element("td", {}, text)))))))),
  );
}

async function main() {
  buildFacts();
  buildTheme(() => { if (report.heads.length) showNumbers(); shadeExamples(); });
  buildHead();
  buildHeads();
  buildExamples();
  if (report.heads.length) await Promise.all([showNumbers(), showRole(), report.examplesOf.length && showExamples()]);
  buildSinks();
  buildKeys();
  buildMassive();
  buildMethod();
  document.documentElement.dataset.ready = "all";
}

begin(main);
