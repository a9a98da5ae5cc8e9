// What the answer draws on: shares of its segments as cards, and the text shaded by the attention that wrote a token.

const ALL = -1, WHOLE = -1;
// Indices into report.layers, report.heads and the tokens of the answer; whether the sink is taken out.
const picked = { layer: ALL, head: MEAN, token: WHOLE, without: false };
const wordBoxes = []; // Chunks of the text.
const segmentStarts = new Map(); // Where the segment changes, and to which.
let partOf = []; // Number of the segment of each token; −1 for none.
let answerShade = null; // What the text is shaded by: { values, scale, table, layer, width, partial, token }
let answerRequest = 0;

const written = (at) => report.answer.queries[at] + 1;
const isLast = (at) => written(at) >= report.length;
const sinkTokens = () => (report.answer.sink.keys.length === 1 ? "the first token" : `the first ${report.answer.sink.keys.length} tokens`);
const wholeWords = () => (report.answer.queries.length === 1 ? "The whole answer" : `The whole answer, mean over ${report.answer.queries.length.toLocaleString("en")} tokens`);
const placeWords = () => (picked.layer === ALL ? "mean over layers and heads" : `layer ${report.layers[picked.layer]}, ${picked.head === MEAN ? "mean over heads" : `head ${report.heads[picked.head]}`}`);

async function buildAnswer() {
  const { answer } = report;
  if (!answer) { $("answer").remove(); return; }
  $("answer").hidden = false;
  options($("answer-layer"), [{ value: ALL, label: "all, mean" }, ...report.layers.map((layer, value) => ({ value, label: String(layer) }))], ALL);
  options($("answer-head"), [{ value: MEAN, label: "all, mean" }, ...report.heads.map((head, value) => ({ value, label: String(head) }))], MEAN);
  $("answer-head").disabled = true;
  $("answer-layer").addEventListener("change", ({ target }) => {
    picked.layer = Number(target.value);
    // A number of a head means something else in another layer: of all layers there is the mean over heads.
    if (picked.layer === ALL) { picked.head = MEAN; $("answer-head").value = MEAN; }
    $("answer-head").disabled = picked.layer === ALL;
    showAnswer();
  });
  $("answer-head").addEventListener("change", ({ target }) => { picked.head = Number(target.value); showAnswer(); });
  $("answer-sink").addEventListener("change", ({ target }) => { picked.without = target.checked; showAnswer(); });
  if (!answer.sink) $("answer-without").replaceWith(element("span", { class: "muted small" }, "The sink cannot be taken out: what it gets of each segment is not known."));
  partOf = Array(report.length).fill(-1);
  answer.runs.forEach(([start, segment], i) => {
    segmentStarts.set(start, segment);
    partOf.fill(segment, start, answer.runs[i + 1]?.[0] ?? report.length);
  });
  buildWritten();
  buildWords();
  await showAnswer();
}

function buildWritten() {
  const list = $("answer-tokens");
  const item = (at, ...children) => element("span", { class: "written-token", role: "option", "data-at": at, tabindex: at === WHOLE ? 0 : -1, "aria-selected": at === WHOLE ? "true" : "false" }, ...children);
  list.append(item(WHOLE, "The whole answer"), ...report.answer.queries.map((_, at) => item(at, isLast(at) ? element("bdi", { title: "The last token, which the model wrote and never read: the run does not say which it is" }, "(last)") : element("bdi", {}, token(written(at)) || "(empty)"))));
  const itemOf = (event) => event.target.closest(".written-token");
  list.addEventListener("click", (event) => { if (itemOf(event)) chooseWritten(Number(itemOf(event).dataset.at)); });
  list.addEventListener("pointerover", (event) => { if (itemOf(event)) showShares(Number(itemOf(event).dataset.at)); });
  list.addEventListener("pointerleave", () => showShares(picked.token));
  list.addEventListener("keydown", (event) => {
    const count = report.answer.queries.length;
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -count - 1, End: count + 1 }[event.key];
    if (!step || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    chooseWritten(Math.max(WHOLE, Math.min(count - 1, picked.token + step))).focus();
  });
}

function chooseWritten(at) {
  const list = $("answer-tokens");
  const before = list.querySelector('[aria-selected="true"]');
  before.setAttribute("aria-selected", "false");
  before.setAttribute("tabindex", -1);
  const now = list.querySelector(`[data-at="${at}"]`);
  now.setAttribute("aria-selected", "true");
  now.setAttribute("tabindex", 0);
  picked.token = at;
  showAnswer();
  return now;
}

async function showAnswer() {
  await Promise.all([showShares(picked.token), shadeAnswer()]);
}

// Attention on each segment, on none and on the sink of each, from the best that the page holds: { shares, at, pooled }.
async function sharesOf(at, head = picked.head) {
  const layer = picked.layer + 1;
  const [single, ofHeads, mean] = await Promise.all(["answer shares", "answer head shares", "answer mean"].map(table));
  if (at !== WHOLE) {
    if (head !== MEAN && ofHeads) return { shares: ofHeads.part(picked.layer, head, at), at };
    if (head === MEAN && single) return { shares: single.part(layer, at), at };
  }
  return { shares: mean.part(layer, head + 1), at: WHOLE, leftOut: at !== WHOLE };
}

// What the sink takes in all, and of each segment and of none; it may lie in several.
function ofSinkIn(shares) {
  const { segments, sink } = report.answer;
  const taken = new Array(segments.length + 1).fill(0);
  sink?.places.forEach((place, i) => { taken[place] += shares[segments.length + 1 + i]; });
  return [taken.reduce((sum, value) => sum + value), taken];
}

let sharesRequest = 0;

async function showShares(at) {
  const mine = ++sharesRequest;
  const found = await sharesOf(at);
  if (mine !== sharesRequest) return;
  const { segments, sink, unnamed, learned } = report.answer;
  const values = [...found.shares].slice(0, segments.length + 1);
  const [ofSink, taken] = ofSinkIn(found.shares);
  const without = picked.without && sink;
  if (without) values.forEach((value, i) => { values[i] = (value - Math.min(taken[i], value)) / (1 - ofSink); });
  const most = Math.max(...values.filter(Number.isFinite), 1e-9);
  const card = (value, i) => {
    const segment = segments[i];
    if (!segment && !unnamed && !learned) return null;
    const size = segment ? (segment.tokens === 1 ? "1 token" : `${segment.tokens.toLocaleString("en")} tokens`) : [unnamed && `${unnamed.toLocaleString("en")} tokens`, learned && "the learned sink"].filter(Boolean).join(" and ");
    const ofThem = sink?.places.includes(i) && !without ? `, ${percent(taken[i])} on the sink` : "";
    return element("button", { type: "button", class: "card share", "data-segment": segment ? segment.name : "", "data-share": value, onclick: segment && (() => leadTo(i)), disabled: !segment },
      element("bdi", { class: "name" }, segment ? segment.name : "no segment"), element("strong", {}, percent(value)),
      element("span", { class: "meter", style: `width:${Number.isFinite(value) ? (100 * value) / most : 0}%` }), element("span", { class: "muted small" }, size + ofThem));
  };
  $("answer-cards").replaceChildren(...values.map(card).filter(Boolean));
  $("answer-whose").replaceChildren(...(found.at === WHOLE ? [wholeWords()] : isLast(at) ? ["The last token, written and not read again"] : [`Token ${written(at)} `, tokenChip(written(at))]), `, ${placeWords()}`);
  $("answer-shares-note").textContent = [
    "Exact, from the attention mass on each segment, but for rounding.",
    without ? `The sink is taken out: attention to ${sinkTokens()}, ${percent(ofSink)} here, is left aside, and shares are of the rest.` : "",
    found.leftOut ? "Shares of single tokens were left out to keep the file small: this is the mean over the answer." : "",
  ].filter(Boolean).join(" ");
}

// The weights along the text from the best that the page holds, and what had to be left out for that.
async function lineOf() {
  const { layer, head, token: at } = picked;
  const wanted = [
    at !== WHOLE && head !== MEAN && ["answer head rows", [layer, head, at]],
    at === WHOLE && head !== MEAN && ["answer head text", [layer, head]],
    at !== WHOLE && layer !== ALL && ["answer layer rows", [layer, at], head !== MEAN && "single heads"],
    at !== WHOLE && layer === ALL && ["answer rows", [0, at]],
    ["answer text", [layer + 1], ...[at !== WHOLE && "single tokens", head !== MEAN && "single heads"].filter(Boolean)],
  ].filter(Boolean);
  for (const [name, index, ...leftOut] of wanted) {
    const found = await table(name);
    if (found) return { table: found, layer: index[0], numbers: found.part(...index), leftOut: leftOut.filter(Boolean), whole: name === "answer text" || name === "answer head text" };
  }
  return null;
}

async function shadeAnswer() {
  const mine = ++answerRequest;
  const found = await lineOf();
  // Those of the very queries and heads that the shades are of.
  const those = found && await sharesOf(found.whole ? WHOLE : picked.token, found.leftOut.includes("single heads") ? MEAN : picked.head);
  if (mine !== answerRequest) return;
  const { exact, listed, sink, segments, queries } = report.answer;
  $("answer-text").hidden = !found;
  if (!found) {
    $("answer-note").textContent = exact.some(Boolean) || listed ? "What it draws on along the text was left out to keep the file small." : 'Which tokens it draws on was not measured: AttentionStatsConfig(rows="generated") gives all their weights.';
    return;
  }
  const width = found.table.width;
  const without = picked.without && sink;
  const rescaled = without && !those.leftOut;
  const left = rescaled ? 1 - ofSinkIn(those.shares)[0] : 1;
  const values = Float32Array.from({ length: report.length }, (_, i) => found.numbers[Math.floor(i / width)] / left);
  const last = found.whole ? queries.at(-1) : queries[picked.token];
  for (let i = last + 1; i < report.length; i++) values[i] = NaN;
  // Beside the sink or the answer's own last tokens, nothing else would have a shade.
  const others = values.slice();
  for (const key of sink?.keys ?? []) for (let i = key - (key % width); i < Math.min(report.length, key - (key % width) + width); i++) others[i] = NaN;
  if (without) values.set(others);
  const exactly = found.whole ? exact : [exact[picked.token]];
  const partial = exactly.some((each) => !each);
  const named = found.whole ? wholeWords() : isLast(picked.token) ? "The last token" : `Token ${written(picked.token)}`;
  answerShade = { values, scale: scaleOf(others.subarray(0, report.generated), "probability"), table: found.table, layer: found.layer, left, last, without, partial, width };
  const total = found.numbers.reduce((sum, value, i) => sum + (Number.isFinite(value) ? value * Math.min(width, report.length - i * width) : 0), 0);
  const lists = `${report.topK} strongest keys of each head`;
  const sources = exactly.every(Boolean) ? "From the exact weights of every key"
    : exactly.some(Boolean) ? `From the exact weights of ${exactly.filter(Boolean).length} of ${exactly.length} tokens and, of the others, ${listed ? `the ${lists}` : "nothing, since they were not measured"}`
      : listed ? `Partial: from the ${lists}, which get ${percent(total)} of the attention; other keys get some too. AttentionStatsConfig(rows="generated") gives the weights of all` : "Its weights were not measured";
  $("answer-note").textContent = [
    `${named}, ${found.leftOut.includes("single heads") ? `layer ${report.layers[picked.layer]}, mean over heads` : placeWords()}. ${sources}.`,
    found.leftOut.length ? `Left out to keep the file small: weights of ${found.leftOut.join(" and of ")}.` : "",
    width > 1 ? `Each shade is the mean over ${width} tokens.` : "",
    without ? `Without ${sinkTokens()}; ${rescaled ? "shares of the rest" : "shares of all attention, since how much it gets was left out"}.` : "",
    Number.isFinite(answerShade.scale.high) ? `The darkest shade is ${number(answerShade.scale.high)} probability, the most in the prompt${sink && !without ? " beside the sink" : ""}; the answer's own tokens may have more. Square-root scale.` : "",
  ].filter(Boolean).join(" ");
  paintAnswer();
}

function buildWords() {
  const list = $("answer-text");
  if (!report.tokens) list.classList.add("numbers");
  for (let start = 0; start < report.length; start += CHUNK) {
    const box = element("div", { class: "chunk" });
    box.start = start;
    if (report.length > CHUNK) box.style.minHeight = `${Math.ceil(Math.min(CHUNK, report.length - start) / 18) * 1.9}rem`;
    wordBoxes.push(box);
  }
  list.append(...wordBoxes);
  const watcher = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) if (isIntersecting) fillWords(target);
  }, { root: list, rootMargin: "800px" });
  for (const box of wordBoxes) watcher.observe(box);
  list.addEventListener("pointermove", (event) => {
    const word = event.target.closest(".word");
    if (word) showTip(wordTip(Number(word.dataset.at)), event.clientX, event.clientY);
    else hideTip();
  });
  list.addEventListener("pointerleave", hideTip);
}

function fillWords(box) {
  if (box.filled) return;
  box.filled = true;
  box.style.minHeight = "";
  const made = [];
  for (let at = box.start; at < Math.min(box.start + CHUNK, report.length); at++) {
    const start = segmentStarts.get(at);
    if (start !== undefined) made.push(element("span", { class: "part-name", "data-segment": start }, element("bdi", {}, start < 0 ? "no segment" : report.answer.segments[start].name)));
    made.push(element("span", { class: `word${isGenerated(at) ? " generated" : ""}`, "data-at": at }, ...marked(token(at))));
    if (token(at).includes("⏎")) made.push(element("br"));
  }
  box.replaceChildren(...made);
  paintWords(box);
}

function paintWords(box) {
  if (!box.filled || !answerShade) return;
  const turn = isDark() ? 0.6 : 0.8;
  for (const word of box.querySelectorAll(".word")) {
    const at = Number(word.dataset.at);
    const share = Math.min(1, answerShade.scale.share(answerShade.values[at]));
    word.classList.toggle("unseen", at > answerShade.last);
    word.classList.toggle("nothing", at <= answerShade.last && Number.isNaN(share));
    word.classList.toggle("strong", share > turn);
    word.style.setProperty("--share", Number.isNaN(share) ? 0 : Math.round(100 * share));
  }
}

function paintAnswer() { wordBoxes.forEach(paintWords); }

function wordTip(at) {
  const part = partOf[at] < 0 ? "no segment" : report.answer.segments[partOf[at]].name;
  const name = `\u2068${at}: ${report.tokens ? token(at) : ""}\u2069 · \u2068${part}\u2069`;
  if (!answerShade) return name;
  const value = answerShade.values[at];
  if (at > answerShade.last) return `${name} · not seen yet`;
  if (!Number.isFinite(value)) return `${name} · ${answerShade.without && report.answer.sink.keys.some((key) => Math.floor(key / answerShade.width) === Math.floor(at / answerShade.width)) ? "the sink, taken out" : "no data"}`;
  if (answerShade.partial && !value) return `${name} · not among the ${report.topK} strongest keys of any head`;
  const error = answerShade.table.error(answerShade.layer, value * answerShade.left) / answerShade.left;
  return `${name} · ${answerShade.partial ? "at least " : ""}${number(value)} probability${error > 0.002 * value ? ` (± ${number(error)})` : ""}`;
}

// The longest run of a segment in the text.
function leadTo(segment) {
  let best = null;
  report.answer.runs.forEach(([start, of], i) => {
    const length = (report.answer.runs[i + 1]?.[0] ?? report.length) - start;
    if (of === segment && !(best?.length >= length)) best = { start, length };
  });
  if (!best) return;
  const list = $("answer-text");
  const go = () => {
    const box = wordBoxes[Math.floor(best.start / CHUNK)];
    fillWords(box);
    const name = box.querySelector(`[data-at="${best.start}"]`).previousElementSibling;
    list.scrollTop += (name?.classList.contains("part-name") ? name : box).getBoundingClientRect().top - list.getBoundingClientRect().top - 8;
  };
  go();
  // What came into view on the way may be higher than it was taken for.
  requestAnimationFrame(() => requestAnimationFrame(go));
}

// What of the answer was pooled or left out, for the account of the whole page.
function answerWords() {
  if (!report.answer) return "";
  const { exact, listed } = report.answer;
  const places = [
    ["answer shares", "shares of single tokens"], ["answer head shares", "shares of single tokens in single heads"],
    ...(exact.some(Boolean) || listed ? [
      ["answer text", "weights along the text"], ["answer rows", "weights of single tokens"], ["answer layer rows", "weights of single tokens in single layers"],
      ...(report.heads.length > 1 ? [["answer head text", "weights along the text in single heads"], ["answer head rows", "weights of single tokens in single heads"]] : []),
    ] : []),
  ];
  const leftOut = places.filter(([name]) => !(name in report.arrays)).map(([, holds]) => holds);
  const pooled = places.filter(([name]) => report.arrays[name]?.width > 1).map(([name, holds]) => `${holds} in bins of ${report.arrays[name].width} tokens`);
  const all = [leftOut.length ? `left out are ${leftOut.join(", ")}` : "", ...pooled].filter(Boolean);
  return all.length ? `Of what the answer draws on: ${all.join("; ")}. ` : "";
}
