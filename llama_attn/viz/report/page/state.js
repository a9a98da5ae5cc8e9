// What is chosen, in one place; whoever shows it is told when it changes.

const MEAN = -1;
// Indices into report.layers and report.heads, and the position of a token.
const chosen = { layer: 0, head: MEAN, token: null, shade: 0 };
const listeners = [];
// Positions of the measured queries, and where each stands on their axis.
let queryPositions = [];
let queryPlaces = new Map();

function openQueries() {
  const { first, stride, count, positions } = report.queries;
  queryPositions = positions ?? Array.from({ length: count }, (_, index) => first + index * stride);
  queryPlaces = new Map(queryPositions.map((position, index) => [position, index]));
}

// `listener` runs after every change, with the names of what changed.
const onChange = (listener) => listeners.push(listener);

function choose(changes) {
  const changed = new Set(Object.keys(changes).filter((name) => chosen[name] !== changes[name]));
  if (!changed.size) return;
  Object.assign(chosen, changes);
  for (const listener of listeners) listener(changed);
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

function bindSelect(id, name, entries) {
  const select = $(id);
  options(select, entries, chosen[name]);
  select.addEventListener("change", () => choose({ [name]: Number(select.value) }));
  onChange((changed) => { if (changed.has(name)) select.value = chosen[name]; });
}
