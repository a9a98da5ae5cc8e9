// Elements, numbers and tokens as text. Nothing here or elsewhere reads text as HTML: tokens are data.

const $ = (id) => document.getElementById(id);

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") made.className = value;
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function options(select, entries, chosen) {
  select.replaceChildren(...entries.map(({ value, label }) => {
    const option = element("option", { value }, label);
    option.selected = String(value) === String(chosen);
    return option;
  }));
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1);

const plain = (name) => name.replaceAll("_", " ");

function number(value) {
  if (value === null || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  if (size !== 0 && size < 0.001) return value.toExponential(1).replace("e-", "e−");
  return String(Number(value.toPrecision(3)));
}

// As the findings write it: what is not nothing is never 0%, and what is not all never 100%.
const percent = (value) => {
  if (!Number.isFinite(value)) return "–";
  const written = `${(100 * value).toFixed(value > 0 && value < 0.095 ? 1 : 0)}%`;
  if (written === "0.0%") return "<0.1%";
  // Sums of float32 numbers are 1 but for rounding.
  return written === "100%" && value < 1 - 1e-6 ? ">99%" : written;
};

// Bounds are rounded to the side on which they stay true.
function bound(value, round) {
  const share = 100 * value;
  const step = share >= 10 ? 0 : share >= 0.1 || !(share > 0) ? 1 : Math.ceil(-Math.log10(share));
  return `${(round(share * 10 ** step) / 10 ** step).toFixed(step)}%`;
}

const atLeast = (value) => `≥ ${bound(value, Math.floor)}`;
const atMost = (value) => bound(value, Math.ceil);

const withUnit = (value, unit) => (Number.isFinite(value) ? `${number(value)} ${unit}` : "no data");

const token = (position) => (report.tokens ? report.tokens[position] : String(position));

// A token inside a sentence: set apart from the writing direction around it.
function tokenChip(position) {
  return element("bdi", { class: "chip" }, report.tokens ? token(position) || "(empty)" : `token ${position}`);
}

// Plotly reads a little HTML in its labels, so that a token has to be escaped for it, and isolated.
function forPlotly(position) {
  if (!report.tokens) return "";
  const escaped = token(position).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  return `\u2068${escaped}\u2069`;
}

function binLabel(start, width, length = report.length) {
  const last = Math.min(start + width, length) - 1;
  return last > start ? `tokens ${start}–${last}` : `token ${start}`;
}

// A run of tokens; of queries, whose numbers are means if it holds several.
function runWords({ start, last, count }) {
  if (last === start) return `token ${start}`;
  return count === last - start + 1 ? `tokens ${start}–${last}` : `${count} of tokens ${start}–${last}`;
}
const meanWords = (run) => `${runWords(run)}${run.last > run.start ? ", mean" : ""}`;

function showTip(text, x, y) {
  const tip = $("tip");
  tip.textContent = text;
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(x + 12, window.innerWidth - box.width - 4))}px`;
  tip.style.top = `${y + 18 + box.height > window.innerHeight ? y - box.height - 10 : y + 18}px`;
}

const hideTip = () => { $("tip").hidden = true; };
