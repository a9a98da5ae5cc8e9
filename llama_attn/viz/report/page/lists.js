// Who attends to whom, from the best that the page holds: exact maps, lists of single queries, lists of bins, maps in bins.

const hasMap = () => "weights_map" in report.arrays;
const hasKeys = () => "topk_weight" in report.arrays || "pooled_weight" in report.arrays;
const hasLinks = () => hasMap() || hasKeys();

// Places on the query axis that have lists of their own, where these stand, and the earliest key that each query sees.
let ownQueries = [];
let ownPlace = new Map();
let firstSeen = null;

async function openLists() {
  ownQueries = [...((await table("topk_query"))?.codes ?? [])];
  ownPlace = new Map(ownQueries.map((index, place) => [index, place]));
  firstSeen = await table("first_seen");
}

// How many queries share a list where they are pooled; 0 if none do.
const poolWidth = () => report.arrays.pooled_weight?.width ?? 0;
const mapWidth = () => report.arrays.weights_map?.width ?? 0;
const mapPoolsHeads = () => report.arrays.weights_map.shape[1] === 1 && report.heads.length > 1;
// Whether the map has a cell of its own for each query and key of what is chosen.
const mapIsExact = () => mapWidth() === 1 && !(mapPoolsHeads() && chosen.head !== MEAN);

const chosenHeads = (heads) => (chosen.head === MEAN || heads === 1 ? [...Array(heads).keys()] : [chosen.head]);
const queryIndex = (position) => indexOf({ tokenAxis: "query" }, position);

// Runs of positions: measured queries from a place on their axis, and the tokens of a bin of the map.
function ofQueries(index, width) {
  const end = Math.min(index + width, report.queries.count);
  return { start: queryPositions[index], last: queryPositions[end - 1], count: end - index };
}
function ofBin(bin) {
  const from = report.mapStart + bin * mapWidth();
  const [start, end] = [Math.max(0, from), Math.min(from + mapWidth(), report.length)];
  return { start, last: end - 1, count: end - start };
}
const binOf = (position) => Math.floor((position - report.mapStart) / mapWidth());

// Where the attention of a token is looked up, and of which tokens that is the mean; null if it was not measured.
function sourceOf(position) {
  const index = queryIndex(position);
  if (index >= 0 && !mapIsExact()) {
    if (ownPlace.has(index)) return { kind: "topk", at: ownPlace.get(index), of: ofQueries(index, 1) };
    const width = poolWidth();
    if (width) return { kind: "pooled", at: Math.floor(index / width), of: ofQueries(index - (index % width), width) };
  }
  if (!hasMap() || (index < 0 && mapWidth() === 1)) return null;
  return { kind: "map", of: ofBin(binOf(position)) };
}

const allKeepLists = () => ownQueries.length === report.queries.count;
// Who attends to a token is told by lists if all queries have some; else by the map, where there is one.
const listsTellQueries = () => hasKeys() && !mapIsExact() && (poolWidth() > 0 || allKeepLists() || !hasMap());

// Whether a query sees a key in the chosen layer. Where the page does not know the mask, it may.
function canSee(query, key) {
  if (!real[key]) return false;
  if (!firstSeen) return true;
  const index = queryIndex(query);
  return key <= query && (index < 0 || key >= firstSeen.part(firstSeen.shape[0] === 1 ? 0 : chosen.layer, index)[0]);
}

const listsOf = (kind) => Promise.all([table(`${kind}_weight`), table(`${kind}_position`)]);

// The keys of a list as { start, last, weight, least, most }. Weights are means over the chosen heads. One that not every
// head lists may have more, up to `most`, and one that none lists up to `rest`; of a bin of queries the page cannot tell.
// Bounds allow for what rounding may have changed.
async function keysOf({ kind, at }) {
  const [weights, positions] = await listsOf(kind);
  const heads = chosenHeads(weights.shape[1]);
  const found = new Map();
  const error = (weight) => weights.error(chosen.layer, weight);
  let rest = 0;
  for (const head of heads) {
    const [weight, keys] = [weights.part(chosen.layer, head, at), positions.part(chosen.layer, head, at)];
    const last = weightOfLast(weight, keys, keys.length);
    const unlisted = last ? (last + error(last)) / heads.length : 0;
    rest += unlisted;
    keys.forEach((key, rank) => {
      if (!key || !(weight[rank] > 0)) return;
      const entry = found.get(key - 1) ?? { weight: 0, error: 0, covered: 0 };
      entry.weight += weight[rank] / heads.length;
      entry.error += error(weight[rank]) / heads.length;
      entry.covered += unlisted;
      found.set(key - 1, entry);
    });
  }
  const known = weights.width === 1;
  const list = [...found].map(([key, { weight, error: off, covered }]) => (
    { start: key, last: key, weight, ...bounds(weight, off, known ? rest - covered : Infinity) }));
  return { list, rest: known ? rest : Infinity, table: weights, ranks: weights.shape[3] };
}

// The smallest weight of a list, which no key outside it exceeds; 0 if the list names all keys.
const weightOfLast = (weight, keys, end) => (keys[end - 1] ? weight[end - 1] : 0);

// Between what a weight lies; `open` if what heads do not list may change how it is written.
function bounds(weight, error, unlisted) {
  return { least: Math.max(0, weight - error), most: weight + error + unlisted, open: percent(weight + unlisted) !== percent(weight) };
}

// The queries that list a key, in the same form: single ones, and bins of which some query has no list of its own.
async function queriesOf(key) {
  const list = [];
  for (const kind of ["topk", "pooled"]) {
    if (!(`${kind}_weight` in report.arrays)) continue;
    const [weights, positions] = await listsOf(kind);
    const [, all, bins, ranks] = weights.shape;
    const heads = chosenHeads(all);
    const [sum, error, unlisted, listed] = [new Float64Array(bins), new Float64Array(bins), new Float64Array(bins), new Uint8Array(bins)];
    for (const head of heads) {
      const [weight, keys] = [weights.part(chosen.layer, head), positions.part(chosen.layer, head)];
      for (let bin = 0; bin < bins; bin++) {
        const end = (bin + 1) * ranks;
        let i = bin * ranks;
        while (i < end && keys[i] !== key + 1) i++;
        if (i < end && weight[i] > 0) {
          sum[bin] += weight[i] / heads.length;
          error[bin] += weights.error(chosen.layer, weight[i]) / heads.length;
          listed[bin] = 1;
        } else if (i === end) unlisted[bin] += weightOfLast(weight, keys, end) / heads.length;
      }
    }
    for (let bin = 0; bin < bins; bin++) {
      const of = kind === "topk" ? ofQueries(ownQueries[bin], 1) : ofQueries(bin * weights.width, weights.width);
      if (!listed[bin] || (kind === "pooled" && allHaveOwn(bin, weights.width))) continue;
      list.push({ ...of, weight: sum[bin], ...bounds(sum[bin], error[bin], weights.width === 1 ? unlisted[bin] : Infinity) });
    }
  }
  return list;
}

function allHaveOwn(bin, width) {
  const last = Math.min((bin + 1) * width, report.queries.count);
  for (let index = bin * width; index < last; index++) if (!ownPlace.has(index)) return false;
  return true;
}

// One row (what the token attends to) or column (what attends to it) of the map, one number per bin.
async function mapLine(position, direction) {
  const map = await table("weights_map");
  if (!map) return null;
  const bins = map.shape[2];
  const bin = binOf(position);
  const heads = chosenHeads(map.shape[1]);
  const line = new Float32Array(bins);
  for (const head of heads) {
    const cells = map.part(chosen.layer, head);
    for (let i = 0; i < bins; i++) line[i] += (direction === "from" ? cells[bin * bins + i] : cells[i * bins + bin]) / heads.length;
  }
  return { line, table: map, poolsHeads: mapPoolsHeads() && chosen.head !== MEAN };
}
