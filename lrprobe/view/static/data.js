// The sources of figures, with one interface: TensorBoard's server, or the page itself.

/** Decode little-endian float32 in base64. */
export function floats(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  return new Float32Array(bytes.buffer);
}

/** Escape a text for Plotly, which would interpret markup in labels. */
export function plain(text, most = 60) {
  let shown = text.replace(/[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u202a-\u202e\u2066-\u2069]/g, "?");
  if (shown.length > most) {
    shown = `${shown.slice(0, most / 2 - 1)}…${shown.slice(-most / 2)}`;
  }
  return shown.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
}

/** Format a number for people. */
export function number(value) {
  if (!Number.isFinite(value)) return Number.isNaN(value) ? "no value" : String(value);
  const size = Math.abs(value);
  if (value === 0) return "0";
  return size < 1e-3 || size >= 1e5 ? value.toExponential(3) : String(Number(value.toPrecision(4)));
}

/** The figures from the server of TensorBoard's plugin. */
export class Remote {
  live = true;

  async ask(path, query = {}) {
    const parameters = new URLSearchParams();
    for (const [name, value] of Object.entries(query)) {
      if (value !== null && value !== undefined) parameters.set(name, value);
    }
    const response = await fetch(`${path}?${parameters}`);
    if (!response.ok) throw new Error(`${path}: ${response.status} ${await response.text()}`);
    return response.json();
  }

  async overview() {
    return this.ask("overview");
  }

  async heatmap(table, figure, range) {
    const [low, high] = range ?? [];
    const { run, optimizer } = table;
    const answer = await this.ask("heatmap", { run, optimizer, figure, low, high });
    return { ...answer, values: floats(answer.values) };
  }

  async detail(table, name, range, step) {
    const [low, high] = range ?? [];
    const { run, optimizer } = table;
    const answer = await this.ask("detail", { run, optimizer, name, low, high, step });
    for (const [column, text] of Object.entries(answer.figures)) {
      answer.figures[column] = floats(text);
    }
    return answer;
  }

  findings(table) {
    return this.ask("findings", { run: table.run, optimizer: table.optimizer });
  }
}

/** The figures embedded in the page. */
export class Embedded {
  live = false;

  constructor(data) {
    this.data = data;
    for (const table of data.tables) {
      table.unpacked = {};
    }
  }

  matrix(table, column) {
    table.unpacked[column] ??= floats(table.values[column]);
    return table.unpacked[column];
  }

  async overview() {
    return this.data;
  }

  async heatmap(table, figure) {
    const { steps, recorded } = table;
    return {
      steps, recorded, values: this.matrix(table, figure), first: steps[0], last: steps.at(-1),
    };
  }

  async detail(table, name) {
    const row = table.names.indexOf(name);
    const width = table.steps.length;
    const figures = {};
    for (const column of table.figures) {
      figures[column] = this.matrix(table, column).subarray(row * width, (row + 1) * width);
    }
    return { steps: table.steps, figures };
  }

  async findings(table) {
    return table.findings ?? null;
  }
}

/** Unpack the text in a script element with gzipped data. */
export async function unpacked(id) {
  const text = document.getElementById(id).textContent.trim();
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}
