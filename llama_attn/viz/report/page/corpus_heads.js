// Pictures of all heads: two scores of each as a point, and one as a cell of a grid.

const NO_ROLE = "no data";

function chooseHead(layer, head) {
  if (layer >= 0 && head >= 0) choose({ layer, head });
}

async function scatterChart() {
  const [across, upwards] = ["across", "upwards"].map((id) => scoreNamed($(id).value));
  const [x, y] = await Promise.all([valuesOf(across.name), valuesOf(upwards.name)]);
  const heads = report.heads.length;
  const roles = report.roles.flat();
  const point = (at) => [report.layers[Math.floor(at / heads)], report.heads[at % heads]];
  // The darkest colour of a role would not be seen on a dark page.
  const edge = themed(isDark() ? "muted" : "card");
  const traces = [...Object.keys(ROLES), null].map((role) => {
    const places = roles.flatMap((each, at) => (each === role && Number.isFinite(x[at]) && Number.isFinite(y[at]) ? [at] : []));
    return {
      type: "scatter", mode: "markers", x: places.map((at) => x[at]), y: places.map((at) => y[at]), customdata: places.map((at) => [...point(at), at]),
      name: `${plain(role ?? NO_ROLE)}: ${places.length}`, marker: { color: role ? ROLES[role] : themed("hatch"), size: 8, opacity: 0.85, line: { width: 0.8, color: edge } },
      hovertemplate: `layer %{customdata[0]}, head %{customdata[1]}<br>${plain(across.name)} %{x:.4g} ${across.unit}<br>${plain(upwards.name)} %{y:.4g} ${upwards.unit}<br>${plain(role ?? NO_ROLE)}<extra></extra>`,
    };
  }).filter((trace) => trace.x.length);
  const here = chosen.layer * heads + chosen.head;
  const missing = roles.filter((_, at) => !Number.isFinite(x[at]) || !Number.isFinite(y[at])).length;
  return {
    data: [...traces, {
      type: "scatter", mode: "markers", x: nullable([x[here]]), y: nullable([y[here]]), hoverinfo: "skip", showlegend: false,
      marker: { color: "rgba(0,0,0,0)", size: 16, line: { width: 3, color: themed("chosen") } },
    }],
    title: `${sentence(plain(upwards.name))} against ${plain(across.name)}, means over ${textsWord(report.texts)}${ofPart()}${missing ? `; ${missing} heads without data` : ""}`,
    layout: { height: 460, xaxis: { title: titleOf(across), ...valueAxis(x) }, yaxis: { title: titleOf(upwards), ...valueAxis(y) } },
    onclick: ({ customdata }) => { if (customdata) chooseHead(Math.floor(customdata[2] / heads), customdata[2] % heads); },
  };
}

async function gridChart(room) {
  const wanted = $("grid-score").value;
  const onclick = ({ x, y }) => chooseHead(report.layers.findIndex((each) => String(each) === String(y)), report.heads.findIndex((each) => String(each) === String(x)));
  if (wanted === "roles") return { ...roleGrid(report.roles, room), title: `Role that each head has in most of ${textsWord(report.texts)}${ofPart()}`, onclick };
  const score = scoreNamed(wanted);
  const values = await table(`score ${wanted}`);
  return {
    ...scoreGrid(report.layers.map((_, layer) => nullable(values.part(layer))), report.heads, "head", score.unit, room),
    title: `${sentence(titleOf(score))}, ${score.spread ? "mean over" : "of"} ${textsWord(report.texts)}${ofPart()}`, onclick,
  };
}

function buildHeads() {
  const names = report.scores.map(({ name }) => ({ value: name, label: plain(name) }));
  if (!names.length || !report.heads.length) {
    for (const id of ["all", "heads"]) $(id).querySelector(".controls").remove();
    for (const id of ["scatter", "grid"]) $(id).replaceWith(element("p", { class: "note" }, "No score of heads was measured."));
    return;
  }
  const first = (...wanted) => [...wanted, names[0].value].find(scoreNamed);
  options($("across"), names, first("sink_mass"));
  options($("upwards"), names, first("entropy", names.at(-1).value));
  for (const id of ["across", "upwards"]) $(id).addEventListener("change", () => draw("scatter"));
  chart("scatter", ["layer", "head"], scatterChart);
  const grids = report.roles.flat().some(Boolean) ? [{ value: "roles", label: "role (what the head does)" }, ...names] : names;
  options($("grid-score"), grids, first("sink_rate"));
  $("grid-score").addEventListener("change", () => draw("grid"));
  chart("grid", [], gridChart);
}
