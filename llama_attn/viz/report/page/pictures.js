// Pictures that several pages draw: grids of layer × head, and lines with their spread.

// One colour per layer and head; null is "no data".
function scoreGrid(z, heads, kind, unit, room) {
  return {
    data: [{
      type: "heatmap", x: heads.map(String), y: report.layers.map(String), z, colorscale: viridisScale, xgap: 1, ygap: 1, hoverongaps: false,
      hovertemplate: `layer %{y}, ${kind} %{x}<br>%{z:.4g} ${unit}<extra></extra>`, colorbar: colourBar(),
    }],
    layout: gridLayout(report.layers, heads, kind, room),
  };
}

// The role of each head, a list of heads for each layer; null is "no data".
function roleGrid(ofHeads, room) {
  const roles = Object.keys(ROLES);
  const colours = roles.flatMap((role, i) => [[i / roles.length, ROLES[role]], [(i + 1) / roles.length, ROLES[role]]]);
  const counts = roles.map((role) => ofHeads.flat().filter((each) => each === role).length);
  return {
    data: [{
      type: "heatmap", x: report.heads.map(String), y: report.layers.map(String), xgap: 1, ygap: 1, hoverongaps: false, showscale: false,
      z: ofHeads.map((layer) => layer.map((role) => (role === null ? null : roles.indexOf(role)))),
      text: ofHeads.map((layer) => layer.map((role) => plain(role || "no data"))),
      hovertemplate: "layer %{y}, head %{x}<br>%{text}<extra></extra>", zmin: -0.5, zmax: roles.length - 0.5, colorscale: colours,
    }, ...roles.map((role, i) => ({ // The legend.
      type: "scatter", mode: "markers", x: [null], y: [null], name: `${plain(role)}: ${counts[i]}`, marker: { color: ROLES[role], symbol: "square", size: 11 },
    }))],
    layout: gridLayout(report.layers, report.heads, "head", room),
  };
}

// A line of means over what `spread` names, with their deviation and extremes. `place` is how plotly is to name a point.
function spreadLines(x, { mean, std, low, high }, spread, place, unit) {
  // Not beyond the smallest and largest: of skewed numbers the deviation would reach where none is.
  const near = mean.map((value, i) => Math.max(value - std[i], low[i]));
  const far = mean.map((value, i) => Math.min(value + std[i], high[i]));
  const blue = isDark() ? OKABE_ITO.sky : OKABE_ITO.blue;
  const band = (lower, upper, name, opacity) => [
    { x, y: nullable(lower), mode: "lines", line: { width: 0 }, hoverinfo: "skip", showlegend: false },
    { x, y: nullable(upper), mode: "lines", line: { width: 0 }, fill: "tonexty", fillcolor: `rgba(${channels(blue).join()},${opacity})`, hoverinfo: "skip", name },
  ];
  return [
    ...band(low, high, `smallest to largest of ${spread}`, 0.15), ...band(near, far, "± standard deviation", 0.25),
    {
      x, y: nullable(mean), mode: "lines+markers", line: { color: blue, width: 2 }, marker: { size: 5 }, name: `mean over ${spread}`,
      customdata: mean.map((_, i) => [std[i], low[i], high[i]]),
      hovertemplate: `${place}<br>mean %{y:.4g} ${unit}<br>std %{customdata[0]:.3g}, from %{customdata[1]:.3g} to %{customdata[2]:.3g}<extra></extra>`,
    },
  ];
}
