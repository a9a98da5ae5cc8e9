// Texts that show what the chosen head does.

let examplesRequest = 0;
let shownExamples = null; // { scale, unit, boxes: [[box, value]] }

// The texts of a kind that the page has of the chosen head: none where it has no data, null where it left them out.
async function textsOf(kind, name) {
  const [score, place, tokens, values] = await Promise.all(["score", "place", "tokens", "values"].map((part) => table(`${kind} ${name} ${part}`)));
  if (!score) return null;
  const at = [chosen.layer, chosen.head];
  return [...score.part(...at)].map((mean, rank) => {
    const [file, line, position, start] = place.part(...at, rank);
    return { mean, rank, file, line, position, start, tokens: tokens.part(...at, rank), values: values.part(...at, rank) };
  }).filter(({ mean }) => Number.isFinite(mean));
}

function card({ mean, file, line, position, start, tokens, values }, { name, unit }, heading, boxes) {
  const words = element("div", { class: "words" });
  tokens.forEach((token, i) => {
    if (token === 0) return;
    const box = element("span", { class: `word${start + i === position ? " peak" : ""}`, "data-value": values[i] }, ...marked(report.tokens[token - 1]));
    const at = Number.isFinite(values[i]) ? `${number(values[i])} ${unit}` : "no data";
    box.addEventListener("pointermove", ({ clientX, clientY }) => showTip(`${start + i}: \u2068${report.tokens[token - 1]}\u2069 · ${plain(name)}: ${at}`, clientX, clientY));
    box.addEventListener("pointerleave", hideTip);
    boxes.push([box, values[i]]);
    words.append(box);
  });
  return element("article", { class: "card example", "data-mean": mean, "data-position": position },
    element("h4", {}, heading, element("bdi", {}, `${report.files[file]}:${line}`)),
    element("p", { class: "muted small" }, `mean ${number(mean)} ${unit}, highest at token ${position}`), words);
}

async function showExamples() {
  const mine = ++examplesRequest;
  const name = report.examplesOf[chosen.examples];
  const [strongest, deciles] = await Promise.all([textsOf("strongest", name), textsOf("deciles", name)]);
  if (mine !== examplesRequest) return;
  const statistic = report.statistics.find((each) => each.name === name);
  const each = report.arrays[`deciles ${name} score`]?.count ?? report.each;
  const boxes = [];
  const fill = (id, found, heading) => {
    const none = found === null ? "Left out to keep the file small." : "None: there is no data.";
    $(id).replaceChildren(...(found?.length ? found.map((text) => card(text, statistic, heading(text), boxes)) : [element("p", { class: "note" }, none)]));
  };
  fill("strongest", strongest, () => "");
  const tenth = (decile) => (decile === 0 ? "Lowest tenth" : decile === report.deciles - 1 ? "Highest tenth" : `Tenth ${decile + 1} of ${report.deciles}`);
  fill("deciles", deciles, ({ rank }) => `${tenth(Math.floor(rank / each))}: `);
  shownExamples = { scale: scaleOf(boxes.map(([, value]) => value), statistic.unit), unit: statistic.unit, boxes };
  shadeExamples();
  $("texts").dataset.shown = `${name} ${chosen.layer} ${chosen.head}`;
}

// One scale for all texts of the head, so that weak ones look weak.
function shadeExamples() {
  if (!shownExamples) return;
  const { scale, unit, boxes } = shownExamples;
  const turn = turnOfLetters();
  for (const [box, value] of boxes) {
    const share = scale.share(value);
    shadeBox(box, share, turn, Number.isNaN(share) ? "nothing" : "");
  }
  drawRamp(scale, unit);
}

function buildExamples() {
  if (!report.examplesOf.length || !report.heads.length) {
    $("texts-body").replaceChildren(element("p", { class: "note" }, "No statistic was measured that a text can be shaded by."));
    return;
  }
  const wanted = ["induction", "previous_token", "sink_mass"].map((name) => report.examplesOf.indexOf(name)).find((at) => at >= 0);
  chosen.examples = wanted ?? 0;
  bindSelect("examples", "examples", report.examplesOf.map((name, value) => ({ value, label: plain(name) })));
  $("deciles-note").textContent = `Random texts, the same ones for all heads, sorted by this head's score: of each tenth ${report.each === 1 ? "one" : `up to ${report.each}`}.`;
  onChange((changed) => { if (["layer", "head", "examples"].some((name) => changed.has(name))) showExamples(); });
}
