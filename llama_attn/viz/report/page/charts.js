// Charts of a run.

const gridsOf = () => report.statistics.filter(({ name }) => `grid ${name}` in report.arrays);

async function gridChart(room) {
  const wanted = $("grid-statistic").value;
  if (wanted === "roles") return rolesChart(room);
  const statistic = gridsOf().find(({ name }) => name === wanted);
  const means = await table(`grid ${wanted}`);
  const ofHeads = statistic.headAxis === "head";
  return {
    ...scoreGrid(report.layers.map((_, layer) => nullable(means.part(layer))), ofHeads ? report.heads : report.kvHeads, ofHeads ? "head" : "KV head", statistic.unit, room),
    title: `${sentence(plain(wanted))} [${statistic.unit}], mean over tokens${ofPart()}`,
    onclick: ({ x, y }) => chooseCell(y, x),
  };
}

function rolesChart(room) {
  return { ...roleGrid(report.roles, room), title: `Role of each head${ofPart()}`, onclick: ({ x, y }) => chooseCell(y, x) };
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
  return {
    data: spreadLines(names, { mean, std, low, high }, spread, "layer %{x}", statistic.unit),
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
