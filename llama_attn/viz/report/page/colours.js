// Colours: viridis for maps, one hue for text, Okabe and Ito's for lines and roles. Grey is "no data".

const OKABE_ITO = {
  blue: "#0072B2", orange: "#D55E00", green: "#009E73", pink: "#CC79A7", sky: "#56B4E9", amber: "#E69F00",
  yellow: "#F0E442",
};
// As in llama_attn.viz.plot_head_roles.
const ROLES = {
  first_token_sink: OKABE_ITO.blue, sink: "#00294D", previous_token: OKABE_ITO.orange, duplicate_token: OKABE_ITO.pink,
  induction: OKABE_ITO.green, local: OKABE_ITO.amber, uniform: OKABE_ITO.sky, streaming: "#6F4BA0",
  retrieval: OKABE_ITO.yellow, mixed: "#C9B18A",
};
const VIRIDIS = [
  "#440154", "#482475", "#414487", "#355f8d", "#2a788e", "#21918c", "#22a884", "#44bf70", "#7ad151", "#bddf26", "#fde725",
];
const viridisScale = VIRIDIS.map((colour, i) => [i / (VIRIDIS.length - 1), colour]);
const channels = (colour) => [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
const stops = VIRIDIS.map(channels);

function viridis(share) {
  const at = Math.max(0, Math.min(1, share)) * (stops.length - 1);
  const below = Math.min(Math.floor(at), stops.length - 2);
  return stops[below].map((channel, i) => channel + (at - below) * (stops[below + 1][i] - channel));
}

// A colour of the style sheet as the browser resolves it in the current theme.
function themed(name) {
  const probe = $("tip");
  const before = probe.style.color;
  probe.style.color = `var(--${name})`;
  const colour = getComputedStyle(probe).color;
  probe.style.color = before;
  return colour;
}

const isDark = () => getComputedStyle(document.documentElement).colorScheme === "dark" ||
  (!document.documentElement.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);

// Beyond this ratio of largest to median, a linear scale would show one spike and nothing else.
const LOG_FROM = 30;

function isSpiky(values) {
  const known = Array.from(values).filter(Number.isFinite).sort((a, b) => a - b);
  return known.length > 0 && known[0] > 0 && known[known.length - 1] > LOG_FROM * known[known.length >> 1];
}

// From numbers to shares of the scale. Shares of attention begin at 0; spiky numbers are spread by their logarithm.
function scaleOf(values, unit) {
  let low = Infinity, high = -Infinity;
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  if (low > high) return { low: NaN, high: NaN, kind: "", share: () => NaN };
  const attention = unit === "probability" || unit === "attention";
  const log = !attention && isSpiky(values);
  if (attention) low = Math.min(low, 0);
  const span = log ? Math.log(high / low) : high - low;
  const share = (value) => {
    if (!Number.isFinite(value)) return NaN;
    if (!(span > 0)) return attention && high > 0 ? 1 : 0;
    if (log) return Math.log(value / low) / span;
    return attention ? Math.sqrt((value - low) / span) : (value - low) / span;
  };
  return { low, high, kind: log ? "logarithmic" : attention ? "square-root" : "linear", share };
}
