// A heatmap of parameters × steps.

import { number, plain } from "./data.js";
import { fold, oddest } from "./folding.js";

const SCALE = [ // viridis: perceptually uniform, also without colour
  "#440154", "#482878", "#3e4989", "#31688e", "#26828e",
  "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725",
].map((colour, at) => [at / 9, colour]);

/** The colours that the style sheet defines. */
export function theme(element) {
  const style = getComputedStyle(element);
  const colour = (name) => style.getPropertyValue(`--${name}`).trim();
  return {
    ink: colour("ink"), soft: colour("soft"), line: colour("line"), back: colour("back"),
    missing: colour("missing"), accent: colour("accent"), font: style.fontFamily,
    dark: document.documentElement.dataset.theme === "dark",
  };
}

/** Complete the layout of a plot with the common settings. */
export function layoutOf(colours, layout) {
  const axis = {
    gridcolor: colours.line, linecolor: colours.line, zerolinecolor: colours.line,
    tickfont: { size: 11 }, automargin: false,
  };
  const { xaxis, yaxis, ...others } = layout;
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: colours.ink, family: colours.font, size: 12 },
    hoverlabel: { bgcolor: colours.back, bordercolor: colours.line, font: { color: colours.ink } },
    xaxis: { ...axis, ...xaxis }, yaxis: { ...axis, ...yaxis }, ...others,
  };
}

/** Draw or redraw a plot. */
export function draw(element, traces, layout) {
  // Plotly drops the height of the layout when the window is resized, and asks the element.
  element.style.height = `${layout.height}px`;
  return globalThis.Plotly.react(element, traces, layout, CONFIG);
}

const CONFIG = { responsive: true, displayModeBar: false, doubleClick: "reset+autosize" };

const OUTLIERS = 0.005; // share of the cells at either end that may exceed the colour scale

/** The limits of the colour scale. A few outliers take its end colours instead of stretching it. */
export function limits(maps, logarithmic) {
  const seen = [];
  for (const values of maps) {
    const stride = Math.max(1, Math.floor(values.length / 20000));
    for (let at = 0; at < values.length; at += stride) {
      const value = logarithmic ? Math.log10(values[at]) : values[at];
      if (Number.isFinite(value)) seen.push(value);
    }
  }
  if (!seen.length) return [0, 1];
  seen.sort((a, b) => a - b);
  const cut = Math.floor(seen.length * OUTLIERS);
  const [low, high] = [seen[cut], seen[seen.length - 1 - cut]];
  // Nearly equal values get nearly equal colours.
  const least = logarithmic ? Math.log10(2) : 0.01 * Math.max(Math.abs(low), Math.abs(high), 1e-30);
  const pad = Math.max(least - (high - low), 0) / 2;
  return [low - pad, high + pad];
}

/** The powers of ten at which a logarithmic axis has ticks: decades, or 1, 2 and 5 times these. */
export function powers(low, high, most = 6) {
  const count = Math.floor(high) - Math.ceil(low) + 1;
  const every = Math.max(1, Math.ceil(count / most));
  const digits = count < 2 ? [1, 2, 5] : [1];
  const found = [];
  for (let decade = Math.floor(low); decade <= high; decade++) {
    if (decade % every === 0) found.push(...digits.map((digit) => decade + Math.log10(digit)));
  }
  return found.filter((power) => low <= power && power <= high);
}

/** The label of a tick at a power of ten. */
export function tickLabel(power) {
  const value = Number((10 ** power).toPrecision(2));
  return value >= 0.01 && value < 1e4 ? String(value) : value.toExponential();
}

function colorTicks([low, high], height) {
  const found = powers(low, high, Math.min(Math.floor(height / 24), 8));
  const at = found.length > 1 ? found : [low, (low + high) / 2, high];
  return { tickvals: at, ticktext: at.map(tickLabel) };
}

/** The width of the longest of some labels, in pixels. */
function widest(texts, font) {
  const context = document.createElement("canvas").getContext("2d");
  context.font = `11px ${font}`;
  return Math.min(Math.max(...texts.map((text) => context.measureText(text).width)), 240);
}

/** A heatmap of one table in one element. */
export class Heatmap {
  constructor(element, on) {
    this.element = element;
    this.on = on; // point(heatmap, cell | null), open(heatmap, cell, more), zoom(range)
    this.cursor = null;
    element.tabIndex = 0;
    element.setAttribute("role", "application");
    element.setAttribute("aria-roledescription", "heatmap");
    element.addEventListener("keydown", (event) => this.key(event));
    element.addEventListener("blur", () => this.point(null));
  }

  /** Draw a view: table, map (steps and values), rows, figure, logarithmic, range, and so on. */
  async draw(view) {
    const { map, rows, logarithmic, colours, range, mark } = view;
    if (this.view?.rows.length !== rows.length) this.zoomed = null;
    this.view = view;
    this.cells = fold(rows, map.values, map.steps.length);
    // Zero has the lowest colour; only NaN is a gap.
    const colour = (value) => (value === 0 ? view.limits[0] : Math.log10(value));
    const shown = logarithmic ? this.cells.map((row) => row.map(colour)) : this.cells;
    const height = Math.max(
      Math.min(22 * rows.length, 340), Math.min(13 * rows.length, 820), 2.5 * rows.length, 80,
    );
    const every = Math.max(1, Math.ceil((12 * rows.length) / height));
    const labels = rows.map((_, at) => at).filter((at) => at % every === 0);
    const texts = labels.map((at) => this.label(rows[at]));
    const trace = {
      type: "heatmap", x: map.steps, y: rows.map((_, at) => at), z: shown, colorscale: SCALE,
      zmin: view.limits[0], zmax: view.limits[1], hoverinfo: "none", hoverongaps: true,
      colorbar: {
        title: { text: plain(view.figure.title), side: "right", font: { size: 11 } },
        thickness: 10, outlinewidth: 0, xpad: 6, ypad: 4, lenmode: "pixels", y: 1, yanchor: "top",
        len: Math.min(height, 280), ...(logarithmic ? colorTicks(view.limits, Math.min(height, 280)) : {}),
        tickfont: { size: 11 },
      },
    };
    const layout = layoutOf(colours, {
      height: height + 42, margin: { l: 14 + widest(texts, colours.font), r: 74, t: 4, b: 38 }, plot_bgcolor: colours.missing,
      dragmode: "zoom", hovermode: "closest", datarevision: Math.random(),
      xaxis: {
        title: { text: "optimizer step", font: { size: 11 }, standoff: 4 }, showgrid: false,
        zeroline: false, ...(range ? { range, autorange: false } : { autorange: true }),
      },
      yaxis: {
        ...(this.zoomed ? { range: this.zoomed, autorange: false } : { autorange: "reversed" }),
        showgrid: false, zeroline: false, tickmode: "array",
        tickvals: labels, fixedrange: rows.length < 12,
        ticktext: texts,
      },
      shapes: this.shapes(mark),
    });
    this.element.setAttribute("aria-label", (
      `${view.figure.title} of ${rows.length} rows at ${map.steps.length} steps of `
      + `${view.table.title}. Arrow keys move, Enter opens a parameter, Shift and Enter adds it.`
    ));
    await draw(this.element, [trace], layout);
    this.listen();
  }

  label({ label, members, module }) {
    if (module === null) return plain(label, 28);
    return `▸ ${plain(label, 20)} (${members.length})`;
  }

  listen() {
    if (this.listening) return;
    this.listening = true;
    const cell = (event) => {
      const [row, column] = event.points[0].pointNumber;
      return { row, column };
    };
    this.element.on("plotly_hover", (event) => this.point(cell(event), event.event));
    this.element.on("plotly_unhover", () => this.point(null));
    this.element.on("plotly_click", (event) => (
      this.on.open(this, cell(event), event.event.shiftKey || event.event.ctrlKey)
    ));
    this.element.on("plotly_relayout", (change) => {
      const lines = [change["yaxis.range[0]"], change["yaxis.range[1]"]];
      if (lines[0] !== undefined) this.zoomed = lines;
      else if (change["yaxis.autorange"]) this.zoomed = null;
      const range = change["xaxis.range"] ?? [change["xaxis.range[0]"], change["xaxis.range[1]"]];
      if (range[0] !== undefined) this.on.zoom(range.map(Number));
      else if (change["xaxis.autorange"]) this.on.zoom(null);
    });
  }

  /** The lines of a cell's tooltip. */
  tooltip({ row, column }) {
    const { table, map, rows, figure } = this.view;
    const { label, members } = rows[row];
    const width = map.steps.length;
    const value = this.cells[row][column];
    const lines = [
      members.length > 1 ? `${label}: ${members.length} ${table.level}s` : label,
      `step ${map.steps[column].toLocaleString("en")}`,
      `${figure.title}: ${number(value)}`,
    ];
    if (members.length > 1) {
      const of = members.map((member) => map.values[member * width + column])
        .filter((each) => !Number.isNaN(each));
      lines.push(`from ${number(Math.min(...of))} to ${number(Math.max(...of))}`);
      lines.push(`outlier: ${table.names[oddest(rows[row], map.values, width, column)]}`);
    }
    return [...lines, table.title];
  }

  point(cell, event = null) {
    this.cursor = cell ?? this.cursor;
    this.on.point(this, cell, event);
  }

  shapes(mark) {
    const shapes = [];
    const { ink } = this.view.colours;
    if (mark) {
      shapes.push({
        type: "rect", xref: "x", yref: "paper", x0: mark[0], x1: mark[1], y0: 0, y1: 1,
        line: { color: "#D55E00", width: 1.5, dash: "dot" }, fillcolor: "rgba(0,0,0,0)",
      });
    }
    if (this.view.step !== null) {
      shapes.push({
        type: "line", xref: "x", yref: "paper", x0: this.view.step, x1: this.view.step, y0: 0, y1: 1,
        line: { color: ink, width: 1, dash: "dot" },
      });
    }
    this.view.rows.forEach(({ members, module }, at) => {
      if (module === null && this.view.chosen.includes(members[0])) {
        shapes.push({
          type: "rect", xref: "paper", yref: "y", x0: 0, x1: 1, y0: at - 0.5, y1: at + 0.5,
          line: { color: ink, width: 1.5 }, fillcolor: "rgba(0,0,0,0)",
        });
      }
    });
    return shapes;
  }

  /** Mark the selection without redrawing the cells. */
  choose(chosen, step, mark) {
    if (!this.view) return null;
    Object.assign(this.view, { chosen, step, mark });
    return globalThis.Plotly.relayout(this.element, { shapes: this.shapes(mark) });
  }

  key(event) {
    const { rows, map } = this.view ?? {};
    if (!rows?.length) return;
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    const ends = { Home: 0, End: map.steps.length - 1 };
    const at = this.cursor ?? { row: 0, column: map.steps.length - 1 };
    if (event.key in moves) {
      const [down, right] = moves[event.key];
      const far = event.ctrlKey ? 10 : 1;
      const within = (value, count) => Math.min(Math.max(value, 0), count - 1);
      this.point(this.cursor ? {
        row: within(at.row + down * far, rows.length),
        column: within(at.column + right * far, map.steps.length),
      } : at);
    } else if (event.key in ends) {
      this.point({ row: at.row, column: ends[event.key] });
    } else if (event.key === "Enter" || event.key === " ") {
      this.on.open(this, at, event.shiftKey);
    } else {
      return;
    }
    event.preventDefault();
  }

  /** The position of a cell on the screen. */
  place({ row, column }) {
    const { xaxis, yaxis, _size } = this.element._fullLayout;
    const box = this.element.getBoundingClientRect();
    return {
      x: box.left + _size.l + xaxis.d2p(this.view.map.steps[column]),
      y: box.top + _size.t + yaxis.d2p(row),
    };
  }
}
