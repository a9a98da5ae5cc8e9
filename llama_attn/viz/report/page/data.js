// What the page contains: compressed arrays, opened by the browser itself when they are first needed.

const opened = new Map();

function bytesOf(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

async function inflate(id) {
  const block = document.getElementById(id);
  const stream = new Blob([bytesOf(block.textContent)]).stream().pipeThrough(new DecompressionStream("deflate"));
  const bytes = new Uint8Array(await new Response(stream).arrayBuffer());
  block.remove();
  return bytes;
}

async function textOf(id) {
  return new TextDecoder().decode(await inflate(id));
}

// Bytes are stored plane by plane: the lowest byte of every element, then the next.
function together(planes, size) {
  if (size === 1) return planes;
  const count = planes.length / size;
  const bytes = new Uint8Array(planes.length);
  for (let plane = 0; plane < size; plane++) {
    for (let i = 0; i < count; i++) bytes[i * size + plane] = planes[plane * count + i];
  }
  return bytes;
}

const TYPES = { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, f4: Float32Array };

// An array whose first axis is the layer. Numbers that were rounded are codes until a part of them is asked for.
class Table {
  constructor(about, planes) {
    this.about = about;
    this.shape = about.shape;
    this.width = about.width || 1;
    this.codes = new TYPES[about.dtype](together(planes, Number(about.dtype[1])).buffer);
  }

  // The numbers behind the leading indices, e.g. part(layer, head): NaN where there is no data.
  part(...index) {
    let length = 1;
    for (const size of this.shape.slice(index.length)) length *= size;
    let start = 0;
    index.forEach((at, axis) => { start = start * this.shape[axis] + at; });
    const raw = this.codes.subarray(start * length, (start + 1) * length);
    if (!this.about.scale) return raw;
    const { scale, low, step } = this.about;
    const layer = index[0];
    const numbers = new Float32Array(length);
    for (let i = 0; i < length; i++) {
      numbers[i] = raw[i] === 0 ? NaN : scale[layer] * Math.sinh(low[layer] + step[layer] * (raw[i] - 1));
    }
    return numbers;
  }

  // How far a number of a layer may be from what was measured.
  error(layer, value) {
    return this.about.scale ? this.about.rounding * Math.max(Math.abs(value), this.about.scale[layer]) : 0;
  }
}

// The array of that name, or null if the page has none.
function table(name) {
  const about = report.arrays[name];
  if (!about) return Promise.resolve(null);
  if (!opened.has(name)) opened.set(name, inflate(about.id).then((planes) => new Table(about, planes)));
  return opened.get(name);
}

let plotly = null;

// Plotly is opened when the first chart comes into view.
function charts() {
  plotly ??= textOf("plotly").then((code) => {
    const script = document.createElement("script");
    script.textContent = code;
    document.head.append(script);
    return window.Plotly;
  });
  return plotly;
}
