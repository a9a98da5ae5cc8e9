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

const gridsOf = () => report.statistics.filter(({ name }) => `grid ${name}` in report.arrays);

async function gridChart(room) {
  const wanted = $("grid-statistic").value;
  if (wanted === "roles") return rolesChart(room);
  const statistic = gridsOf().find(({ name }) => name === wanted);
  const means = await table(`grid ${wanted}`);
  const heads = statistic.headAxis === "head" ? report.heads : report.kvHeads;
  const kind = statistic.headAxis === "head" ? "head" : "KV head";
  return {
    data: [{
      type: "heatmap", x: heads.map(String), y: report.layers.map(String), z: report.layers.map((_, layer) => nullable(means.part(layer))), colorscale: viridisScale, xgap: 1, ygap: 1, hoverongaps: false,
      hovertemplate: `layer %{y}, ${kind} %{x}<br>%{z:.4g} ${statistic.unit}<extra></extra>`, colorbar: colourBar(),
    }],
    title: `${sentence(plain(wanted))} [${statistic.unit}], mean over tokens${ofPart()}`,
    layout: gridLayout(report.layers, heads, kind, room),
    onclick: ({ x, y }) => chooseCell(y, x),
  };
}

function rolesChart(room) {
  const roles = Object.keys(ROLES);
  const colours = roles.flatMap((role, i) => [[i / roles.length, ROLES[role]], [(i + 1) / roles.length, ROLES[role]]]);
  const counts = roles.map((role) => report.roles.flat().filter((each) => each === role).length);
  return {
    data: [{
      type: "heatmap", x: report.heads.map(String), y: report.layers.map(String), xgap: 1, ygap: 1, hoverongaps: false, showscale: false,
      z: report.roles.map((layer) => layer.map((role) => (role === null ? null : roles.indexOf(role)))),
      text: report.roles.map((layer) => layer.map((role) => plain(role || "no data"))),
      hovertemplate: "layer %{y}, head %{x}<br>%{text}<extra></extra>", zmin: -0.5, zmax: roles.length - 0.5, colorscale: colours,
    }, ...roles.map((role, i) => ({ // The legend.
      type: "scatter", mode: "markers", x: [null], y: [null], name: `${plain(role)}: ${counts[i]}`, marker: { color: ROLES[role], symbol: "square", size: 11 },
    }))],
    title: `Role of each head${ofPart()}`,
    layout: gridLayout(report.layers, report.heads, "head", room),
    onclick: ({ x, y }) => chooseCell(y, x),
  };
}

function chooseCell(layer, head) {
  const [at, of] = [report.layers.findIndex((name) => String(name) === String(layer)), report.heads.findIndex((name) => String(name) === String(head))];
  const kv = gridsOf().find(({ name }) => name === $("grid-statistic").value)?.headAxis === "kv_head";
  if (at >= 0) choose(kv || of < 0 ? { layer: at } : { layer: at, head: of });
}

async function profileChart(room) {
  const statistic = report.statistics.find(({ name }) => name === $("profile-statistic").value);
  const summaries = await table(`layers ${statistic.name}`);
  const hidden = statistic.layerAxis === "hidden_layer";
  const numbers = hidden ? report.hiddenLayers : report.layers;
  const names = numbers.map((layer) => (hidden && layer === report.numLayers ? "output" : String(layer)));
  const spread = statistic.headAxis === null ? "tokens" : statistic.headAxis === "head" ? "heads" : "KV heads";
  const [mean, std, low, high] = [0, 1, 2, 3].map((at) => names.map((_, layer) => summaries.part(layer)[at]));
  // Not beyond the smallest and largest: of skewed numbers the deviation would reach where none is.
  const near = mean.map((value, i) => Math.max(value - std[i], low[i]));
  const far = mean.map((value, i) => Math.min(value + std[i], high[i]));
  const blue = isDark() ? OKABE_ITO.sky : OKABE_ITO.blue;
  const band = (lower, upper, name, opacity) => [
    { x: names, y: nullable(lower), mode: "lines", line: { width: 0 }, hoverinfo: "skip", showlegend: false },
    { x: names, y: nullable(upper), mode: "lines", line: { width: 0 }, fill: "tonexty", fillcolor: `rgba(${channels(blue).join()},${opacity})`, hoverinfo: "skip", name },
  ];
  return {
    data: [
      ...band(low, high, `smallest to largest of ${spread}`, 0.15), ...band(near, far, "± standard deviation", 0.25),
      {
        x: names, y: nullable(mean), mode: "lines+markers", line: { color: blue, width: 2 }, marker: { size: 5 }, name: `mean over ${spread}`,
        customdata: names.map((_, i) => [std[i], low[i], high[i]]),
        hovertemplate: `layer %{x}<br>mean %{y:.4g} ${statistic.unit}<br>std %{customdata[0]:.3g}, from %{customdata[1]:.3g} to %{customdata[2]:.3g}<extra></extra>`,
      },
    ],
    title: `${sentence(plain(statistic.name))} through the layers${ofPart()}`,
    layout: {
      xaxis: namesAxis("layer", names, room), height: 340,
      yaxis: { title: `${plain(statistic.name)} [${statistic.unit}]`, ...valueAxis([...low, ...mean, ...high]) },
    },
    onclick: ({ pointIndex }) => { const at = report.layers.indexOf(numbers[pointIndex]); if (at >= 0) choose({ layer: at }); },
  };
}

// Along the text, at most so many points are drawn; of more, the largest of each neighbourhood.
const MOST_POINTS = 4096;

async function lineAlong(statistic, name, colour, kvHead = null) {
  const layer = layerOf(statistic);
  const source = await table(kvHead === null ? `mean ${statistic.name}` : `heads ${statistic.name}`);
  const numbers = layer < 0 ? [] : kvHead === null ? source.part(layer) : source.part(layer, kvHead);
  const ofKeys = statistic.tokenAxis === "key";
  const every = Math.ceil(numbers.length / MOST_POINTS);
  const [x, y, text] = [[], [], []];
  for (let start = 0; start < numbers.length; start += every) {
    let best = start;
    for (let i = start; i < Math.min(start + every, numbers.length); i++) if (!(numbers[i] <= numbers[best])) best = i;
    const position = ofKeys ? best * source.width : queryPositions[best * source.width];
    x.push(position);
    y.push(Number.isFinite(numbers[best]) ? numbers[best] : null);
    text.push(`${ofKeys ? binLabel(position, source.width) : runWords(ofQueries(best * source.width, source.width))} ${source.width === 1 ? forPlotly(position) : ""}`);
  }
  return {
    x, y, text, name, mode: x.length > 1 ? "lines" : "markers", line: { color: colour, width: kvHead === null ? 2 : 1 }, opacity: kvHead === null ? 1 : 0.5,
    showlegend: kvHead === null, hovertemplate: `%{text}<br>${name} %{y:.4g} ${statistic.unit}<extra></extra>`,
  };
}

const named = (name) => report.statistics.find((statistic) => statistic.name === name);

async function alongChart(title, names) {
  const found = names.map(named).filter(Boolean);
  const colours = isDark() ? [OKABE_ITO.sky, OKABE_ITO.amber] : [OKABE_ITO.blue, OKABE_ITO.orange];
  const data = [];
  for (const [i, statistic] of found.entries()) {
    data.push(await lineAlong(statistic, plain(statistic.name), colours[i]));
    if (statistic.headAxis === "kv_head" && `heads ${statistic.name}` in report.arrays && report.kvHeads.length > 1) {
      for (const at of report.kvHeads.keys()) data.push(await lineAlong(statistic, `${plain(statistic.name)}, KV head ${report.kvHeads[at]}`, colours[i], at));
    }
  }
  const every = Math.ceil(Math.max(...(await Promise.all(found.map(({ name }) => table(`mean ${name}`)))).map(({ shape }) => shape[1])) / MOST_POINTS);
  const all = data.flatMap(({ y }) => y.filter((value) => value !== null));
  return {
    data, title: title + (every > 1 ? `: of every ${every} tokens the largest` : ""), onclick: ({ x }) => choose({ token: x }),
    layout: {
      xaxis: { title: "position [token]" }, height: 300, showlegend: found.length > 1,
      yaxis: { title: `L2 norm [${found[0].unit}]`, ...valueAxis(all) },
    },
  };
}

async function massiveChart(room) {
  const { largest, median, bound, position, channel } = report.massive;
  const names = report.hiddenLayers.map((layer) => (layer === report.numLayers ? "output" : String(layer)));
  const text = names.map((_, i) => `token ${position[i]} ${forPlotly(position[i])}, channel ${channel[i]}`);
  const [blue, green, orange] = isDark() ? [OKABE_ITO.sky, OKABE_ITO.green, OKABE_ITO.amber] : [OKABE_ITO.blue, OKABE_ITO.green, OKABE_ITO.orange];
  const line = (y, name, colour, more = {}) => ({
    x: names, y, name, mode: "lines+markers", line: { color: colour, width: 2 }, marker: { size: 5 }, hovertemplate: `layer %{x}<br>${name} %{y:.4g} activation<extra></extra>`, ...more,
  });
  return {
    data: [
      line(largest, "largest magnitude", blue, { text, hovertemplate: "layer %{x}<br>%{y:.4g} activation<br>%{text}<extra></extra>" }),
      line(median, "median", green),
      line(bound, "massive beyond", orange, { mode: "lines", line: { color: orange, width: 1.5, dash: "dash" } }),
    ],
    title: "Largest magnitude in the residual stream that enters each layer" + ofPart(),
    layout: {
      xaxis: namesAxis("layer", names, room),
      yaxis: { title: "magnitude [activation]", ...([...largest, ...median].every((value) => value === null || value > 0) ? logAxis([...largest, ...median, ...bound]) : { type: "linear" }) },
    },
  };
}

async function distanceChart() {
  const histogram = await table("distance_histogram");
  const bins = report.distances;
  const heads = report.heads.map((_, head) => histogram.part(chosen.layer, head));
  const shown = chosen.head === MEAN ? bins.map((_, bin) => heads.reduce((sum, head) => sum + head[bin] / heads.length, 0)) : heads[chosen.head];
  const names = bins.map((start, i) => {
    const last = Math.min(i + 1 < bins.length ? bins[i + 1] - 1 : report.length - 1, report.length - 1);
    return last > start ? `${start}–${last}` : String(start);
  });
  return {
    data: [{ type: "bar", x: names, y: nullable(shown), marker: { color: isDark() ? OKABE_ITO.sky : OKABE_ITO.blue }, hovertemplate: "%{x} tokens<br>%{y:.4f} of the attention<extra></extra>" }],
    title: `Attention by distance, layer ${layerName()}, ${headName()}`,
    layout: { xaxis: { title: "distance from query to key [tokens]", type: "category", showgrid: false }, yaxis: { title: "attention [probability]", rangemode: "tozero" }, height: 400 },
  };
}

onChange(redraw);
