// What is chosen of a run, and where it stands on the axes of its statistics.

const MEAN = -1;
// Indices into report.layers and report.heads, and the position of a token.
const chosen = { layer: 0, head: MEAN, token: null, shade: 0 };
// Positions of the measured queries, and where each stands on their axis.
let queryPositions = [];
let queryPlaces = new Map();

function openQueries() {
  const { first, stride, count, positions } = report.queries;
  queryPositions = positions ?? Array.from({ length: count }, (_, index) => first + index * stride);
  queryPlaces = new Map(queryPositions.map((position, index) => [position, index]));
}

const layerName = () => report.layers[chosen.layer];
const headName = () => (chosen.head === MEAN ? "mean over heads" : `head ${report.heads[chosen.head]}`);

// Where the chosen layer stands on the layer axis of a statistic; −1 if it is not there.
function layerOf(statistic) {
  return statistic.layerAxis === "layer" ? chosen.layer : report.hiddenLayers.indexOf(layerName());
}

// Where a token stands on the token axis of a statistic; −1 if it was no measured query.
function indexOf(statistic, position) {
  if (statistic.tokenAxis === "key") return position;
  return queryPlaces.get(position) ?? -1;
}

// One number per token of a statistic in the chosen layer and head.
async function along(statistic) {
  const one = statistic.headAxis === "head" && chosen.head !== MEAN;
  const { layer, head } = { layer: layerOf(statistic), head: chosen.head };
  const mean = await table(`mean ${statistic.name}`);
  const heads = one ? await table(`heads ${statistic.name}`) : null;
  const values = new Float32Array(report.length).fill(NaN);
  const source = heads || mean;
  if (layer >= 0) {
    const numbers = heads ? heads.part(layer, head) : mean.part(layer);
    for (let position = 0; position < report.length; position++) {
      const index = indexOf(statistic, position);
      if (index >= 0) values[position] = numbers[Math.floor(index / source.width)];
    }
  }
  return { values, source, layer, poolsHeads: one && !heads };
}
