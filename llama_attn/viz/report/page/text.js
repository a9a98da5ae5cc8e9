// The text: one box per token, made when it comes near the view, so that a long text does not block the page.

const CHUNK = 512;
const chunks = [];
let shading = null; // { values, scale, unit, label, source, layer, blank }
let focused = 0;
let followed = null; // A token reached with the keyboard or by a link, kept in view while the text around it is made.

function buildText() {
  const list = $("tokens");
  if (!report.tokens) list.classList.add("numbers");
  // Beside a short text, what is said of a token would be longer than the text.
  list.parentElement.classList.toggle("short", report.length <= CHUNK);
  for (let start = 0; start < report.length; start += CHUNK) {
    const box = element("div", { class: "chunk", role: "presentation" });
    box.start = start;
    box.filled = false;
    // Roughly as high as it will be, so that the scroll bar hardly moves when it is filled.
    if (report.length > CHUNK) box.style.minHeight = `${Math.ceil(Math.min(CHUNK, report.length - start) / 11) * 1.9}rem`;
    chunks.push(box);
  }
  list.append(...chunks);
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      entry.target.near = entry.isIntersecting;
      if (entry.isIntersecting) fill(entry.target);
    }
    if (followed !== null) boxOf(followed).scrollIntoView({ block: "nearest", inline: "nearest" });
  }, { root: list, rootMargin: "800px" });
  for (const event of ["wheel", "pointerdown", "touchmove"]) list.addEventListener(event, () => { followed = null; }, { passive: true });
  for (const box of chunks) watcher.observe(box);
  list.addEventListener("click", (event) => {
    const box = event.target.closest(".token");
    if (box) { focusToken(Number(box.dataset.position)); choose({ token: Number(box.dataset.position) }); }
  });
  list.addEventListener("keydown", moveByKey);
  list.addEventListener("pointermove", (event) => {
    const box = event.target.closest(".token");
    if (box) showTip(tokenTip(Number(box.dataset.position)), event.clientX, event.clientY);
    else hideTip();
  });
  list.addEventListener("pointerleave", hideTip);
  list.addEventListener("focusin", (event) => {
    const at = event.target.getBoundingClientRect();
    if (event.target.matches(".token:focus-visible")) showTip(tokenTip(focused), at.left, at.bottom - 12);
  });
  list.addEventListener("focusout", hideTip);
}

const everyQuery = () => queryPositions.every((position, index) => position === report.length - report.queries.count + index);
const isGenerated = (position) => report.generated !== null && position >= report.generated && Boolean(real[position]);

function fill(box) {
  if (box.filled) { paint(box); return; }
  box.filled = true;
  box.style.minHeight = "";
  const made = [];
  for (let position = box.start; position < Math.min(box.start + CHUNK, report.length); position++) {
    const text = token(position);
    made.push(element("span", {
      class: `token${real[position] ? "" : " padding"}${isGenerated(position) ? " generated" : ""}`, role: "option", tabindex: position === focused ? 0 : -1,
      "aria-selected": position === chosen.token ? "true" : "false", "data-position": position,
    }, ...marked(text)));
    if (text.includes("⏎")) made.push(element("br"));
  }
  box.replaceChildren(...made);
  paint(box);
}

const boxOf = (position) => {
  const box = chunks[Math.floor(position / CHUNK)];
  if (!box.filled) fill(box);
  return box.querySelector(`[data-position="${position}"]`);
};

function paint(box) {
  if (!box.filled || !shading) return;
  const turn = turnOfLetters();
  for (const span of box.querySelectorAll(".token")) {
    const position = Number(span.dataset.position);
    const share = shading.scale.share(shading.values[position]);
    shadeBox(span, share, turn, Number.isNaN(share) ? shading.blank?.(position)?.name ?? "nothing" : "");
  }
}

function focusToken(position, withFocus = false) {
  boxOf(focused)?.setAttribute("tabindex", -1);
  focused = position;
  const span = boxOf(position);
  span.setAttribute("tabindex", 0);
  if (withFocus) followed = position;
  else if (position !== followed) followed = null;
  if (withFocus) { span.focus({ preventScroll: true }); span.scrollIntoView({ block: "nearest", inline: "nearest" }); }
}

function moveByKey(event) {
  if (event.key === "Enter" || event.key === " ") {
    event.preventDefault();
    choose({ token: focused });
    return;
  }
  const steps = {
    ArrowRight: 1, ArrowLeft: -1, ArrowDown: lineStep(1), ArrowUp: lineStep(-1), PageDown: 100, PageUp: -100,
    Home: -report.length, End: report.length,
  };
  if (!(event.key in steps) || event.ctrlKey || event.altKey || event.metaKey) return;
  event.preventDefault();
  focusToken(Math.max(0, Math.min(report.length - 1, focused + steps[event.key])), true);
}

// How many tokens lie between the focused one and the one above or below it.
function lineStep(direction) {
  const here = boxOf(focused).getBoundingClientRect();
  let best = direction, distance = Infinity;
  for (let step = direction; Math.abs(step) <= 200; step += direction) {
    const position = focused + step;
    if (position < 0 || position >= report.length) break;
    const there = boxOf(position).getBoundingClientRect();
    const lines = direction * (there.top - here.top);
    if (lines < here.height / 2) continue;
    if (lines > 2.5 * here.height) break;
    if (Math.abs(there.left - here.left) < distance) { distance = Math.abs(there.left - here.left); best = step; }
  }
  return best;
}

function tokenTip(position) {
  const name = report.tokens ? `${position}: ${token(position)}` : `token ${position}`;
  const kind = !real[position] ? (position < report.firstKey ? " · no longer in the cache" : ` · padding${everyQuery() ? "" : ", or seen by no measured query"}`) : isGenerated(position) ? " · generated" : "";
  if (!shading) return name + kind;
  return `\u2068${name}\u2069${kind} · ${shading.label}: ${valueAt(position)}`;
}

// The number of a token as the page knows it, with what rounding may have changed.
function valueAt(position) {
  const value = shading.values[position];
  if (!Number.isFinite(value)) return shading.blank?.(position)?.words ?? "no data";
  if (shading.least?.has(position)) return atLeast(shading.least.get(position));
  const error = shading.source.error(shading.layer, value);
  return `${number(value)} ${shading.unit}${error > 0.002 * Math.abs(value) ? ` (± ${number(error)})` : ""}`;
}

let shadeRequest = 0;

async function shadeText() {
  const mine = ++shadeRequest;
  const next = await shadeOf(chosen.shade);
  if (mine !== shadeRequest) return; // Something else was chosen meanwhile.
  shading = next;
  hideTip(); // It speaks of the shading before.
  for (const box of chunks) if (box.near || report.length <= CHUNK) fill(box);
  drawLegend();
  $("shade-note").textContent = shading.note;
}

const drawLegend = () => drawRamp(shading.scale, shading.unit);

onChange((changed) => {
  nameShades();
  if (changed.has("token")) {
    $("tokens").querySelector('[aria-selected="true"]')?.setAttribute("aria-selected", "false");
    if (chosen.token !== null) { focusToken(chosen.token); boxOf(chosen.token).setAttribute("aria-selected", "true"); }
  }
  const linked = typeof chosen.shade !== "number";
  if (changed.has("shade") || changed.has("layer") || changed.has("head") || (changed.has("token") && linked)) shadeText();
});
