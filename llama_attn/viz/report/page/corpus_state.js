// What is chosen of a corpus: a head, and what is shown of it. All are places on the axes of the report.

const chosen = { layer: 0, head: 0, statistic: 0, examples: 0 };

const layerName = () => report.layers[chosen.layer];
const headName = () => `layer ${layerName()}, head ${report.heads[chosen.head]}`;

// Where the numbers of the chosen head are in the arrays of a statistic: KV heads are those that it reads.
function placeOf({ kind, heads }) {
  if (kind === null) return [chosen.layer];
  if (kind === "head") return [chosen.layer, chosen.head];
  return [chosen.layer, Math.floor((report.heads[chosen.head] * heads) / report.numHeads)];
}

// Whose numbers these are, in words.
function whose(statistic) {
  if (statistic.hidden) return `what enters layer ${layerName()}`;
  if (statistic.kind === null) return `layer ${layerName()}`;
  return statistic.kind === "head" ? headName() : `layer ${layerName()}, KV head ${placeOf(statistic)[1]}`;
}

const scoreNamed = (name) => report.scores.find((score) => score.name === name);
const titleOf = ({ name, unit }) => `${plain(name)} [${unit}]`;

// All numbers of a score, head by head, layer by layer.
const valuesOf = async (name) => (await table(`score ${name}`)).codes;
const textsWord = (count) => `${count.toLocaleString("en")} ${count === 1 ? "text" : "texts"}`;
