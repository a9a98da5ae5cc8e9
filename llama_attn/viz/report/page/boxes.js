// Tokens as boxes, shaded by numbers.

// A token whose spaces and line breaks, as the tokenizer shows them, are faint.
function marked(text) {
  const pieces = text.split(/([␣⏎⇥]+)/).filter(Boolean)
    .map((piece) => (/^[␣⏎⇥]/.test(piece) ? element("span", { class: "mark" }, piece) : piece));
  return pieces.length ? pieces : [element("span", { class: "mark" }, "(empty)")];
}

// The share of the scale where light letters begin to be easier to read than dark ones, or dark ones than light ones.
const turnOfLetters = () => (isDark() ? 0.6 : 0.8);

// Shades a box by a share of the scale; without one, `blank` says how it looks: "nothing" is "no data".
function shadeBox(span, share, turn, blank) {
  for (const name of ["nothing", "unseen"]) span.classList.toggle(name, blank === name);
  span.classList.toggle("strong", share > turn);
  span.style.setProperty("--share", Number.isNaN(share) ? 0 : Math.round(100 * Math.max(0, Math.min(1, share))));
}

// The scale of what is shaded, beside the control that chooses it.
function drawRamp(scale, unit) {
  const empty = !Number.isFinite(scale.high);
  $("low").textContent = empty ? "no data" : number(scale.low);
  $("high").textContent = empty ? "" : number(scale.high);
  $("legend-unit").textContent = empty ? "" : `${unit}${scale.kind === "linear" ? "" : `, ${scale.kind} scale`}`;
  const ramp = $("ramp");
  ramp.hidden = empty;
  const context = ramp.getContext("2d");
  const gradient = context.createLinearGradient(0, 0, ramp.width, 0);
  gradient.addColorStop(0, themed("shade-none"));
  gradient.addColorStop(1, themed("shade"));
  context.clearRect(0, 0, ramp.width, ramp.height);
  context.fillStyle = gradient;
  context.fillRect(0, 0, ramp.width, ramp.height);
}
