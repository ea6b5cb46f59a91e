// Charts of one parameter, or of several for comparison.

import { number, plain } from "./data.js";
import { draw, layoutOf, powers, tickLabel } from "./heatmap.js";

// Okabe and Ito's palette, which is safe for colour-blind readers.
const LIGHT = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#777777"];
const DARK = ["#4fa9e0", "#f08a48", "#35c79b", "#e2a0c6", "#f0b83d", "#9ad4f7", "#b0b0b0"];
const DASHES = ["solid", "dash", "dashdot", "dot", "solid", "dash", "dashdot"];
const LEVELS = { min: 0, p01: 0.01, p05: 0.05, p25: 0.25, p50: 0.5, p75: 0.75, p95: 0.95, p99: 0.99, max: 1 };

const NARROW = 0.05; // decades

const faint = (colour, alpha) => `${colour}${Math.round(alpha * 255).toString(16).padStart(2, "0")}`;
const list = (values) => Array.from(values, (value) => (Number.isFinite(value) ? value : null));

/** The line style of an item: a colour, and a dash pattern for prints without colour. */
export function styleOf(at, dark) {
  const place = at % LIGHT.length;
  return { colour: (dark ? DARK : LIGHT)[place], dash: DASHES[place] };
}

/** The index of the last recorded step up to this one. */
export function indexAt(steps, step) {
  if (step === null) return steps.length - 1;
  let found = 0;
  steps.forEach((each, at) => { if (each <= step) found = at; });
  return found;
}

function line(item, column, name = item.label) {
  return {
    type: "scatter", mode: item.steps.length > 1 ? "lines" : "markers", x: item.steps,
    y: list(item.figures[column]), name: plain(name, 48), connectgaps: false,
    line: { color: item.colour, dash: item.dash, width: 1.8 },
    hovertemplate: "%{y:.4g}<extra>%{fullData.name}</extra>",
  };
}

function band(item) {
  if (!item.figures.effective_lr_p05 || !item.figures.effective_lr_p95) return [];
  const edge = (column, name, fill) => ({
    ...line(item, column, `${item.label}, ${name}`), showlegend: false,
    line: { width: 0.5, color: faint(item.colour, 0.5) }, ...fill,
  });
  return [
    edge("effective_lr_p05", "p05", {}),
    edge("effective_lr_p95", "p95", {
      fill: "tonexty", fillcolor: faint(item.colour, 0.2),
    }),
  ];
}

/** The density of the elements over log10 of the rate, from the quantiles at one step. */
function histogram(item, step) {
  const row = indexAt(item.steps, step);
  const knots = Object.entries(LEVELS)
    .map(([name, level]) => [item.figures[`effective_lr_${name}`]?.[row], level])
    .filter(([rate]) => rate > 0 && Number.isFinite(rate));
  // Quantiles that are close together share a bar, which is wide enough to be visible.
  const [x, y] = [[], []];
  let start = 0;
  for (let k = 1; k < knots.length; k++) {
    let [low, high] = [Math.log10(knots[start][0]), Math.log10(knots[k][0])];
    const end = k === knots.length - 1;
    if (high - low < NARROW && !end) continue;
    if (high - low < NARROW) {
      if (!x.length) low = (low + high - NARROW) / 2;
      high = low + NARROW;
    }
    const density = (knots[k][1] - knots[start][1]) / (high - low);
    x.push(10 ** low, 10 ** high);
    y.push(density, density);
    start = k;
  }
  if (x.length) {
    x.unshift(x[0]);
    y.unshift(0);
    x.push(x.at(-1));
    y.push(0);
  }
  const { colour } = item;
  return {
    type: "scatter", mode: "lines", x, y, name: plain(item.label, 48), fill: "tozeroy",
    fillcolor: faint(colour, 0.25), line: { color: colour, width: 1.5, shape: "linear" },
    hovertemplate: "rate %{x:.3g}: %{y:.2f} of the elements per decade<extra></extra>",
    step: item.steps[row],
  };
}

const AXIS = { rate: "per unit of direction", ratio: "‖Δθ‖ / ‖θ‖", share: "share of the elements" };

/** The charts of some items: title, traces, axes. */
export function chartsOf(items, view) {
  const steps = (traces, title, unit, more = {}) => ({
    title, traces, unit, x: "optimizer step", linear: view.linear, ...more,
  });
  const having = (column) => items.filter((item) => item.figures[column]);
  const lines = (column, name) => having(column).map((item) => line(item, column, name?.(item)));
  const charts = [];
  if (having("effective_lr_p50").length) {
    const traces = having("effective_lr_p50").flatMap((item) => (
      [...band(item), line(item, "effective_lr_p50")]
    ));
    charts.push(steps(traces, "Effective rate: median, p05 to p95", AXIS.rate, { key: "rate" }));
    const shown = having("effective_lr_p50").map((item) => histogram(item, view.step));
    const when = [...new Set(shown.map((trace) => trace.step))]
      .map((step) => step?.toLocaleString("en")).join(", ");
    charts.push({
      key: "histogram", title: `Histogram of the rate at step ${when}`, traces: shown,
      unit: "share per decade", x: "effective rate", histogram: true, linear: true,
    });
  }
  if (having("update_ratio").length) {
    charts.push(steps(lines("update_ratio"), "Update ratio; about 1e-3 is usual", AXIS.ratio, {
      key: "ratio", guide: 1e-3,
    }));
  }
  if (having("lr").length) {
    const name = (item) => (item.group ? `${item.label}: ${item.group}` : item.label);
    const groups = [...new Set(items.map((item) => item.group).filter(Boolean))];
    const title = groups.length === 1 ? `lr of its group, ${plain(groups[0], 30)}` : "lr of the group";
    charts.push(steps(lines("lr", name), title, AXIS.rate, { key: "lr" }));
  }
  const known = ["effective_lr_p50", "update_ratio", "lr"];
  if (!known.includes(view.figure) && having(view.figure).length) {
    const { title, unit, share } = view.figures[view.figure];
    charts.push(steps(lines(view.figure), title[0].toUpperCase() + title.slice(1), unit, {
      key: "figure", linear: view.linear || share,
    }));
  }
  return charts;
}

/** Draw one chart. */
export function drawChart(element, chart, view) {
  const { colours, range, step, mark } = view;
  const shapes = [];
  if (mark && !chart.histogram) {
    shapes.push({
      type: "rect", xref: "x", yref: "paper", x0: mark[0], x1: mark[1], y0: 0, y1: 1,
      fillcolor: "rgba(213,94,0,0.12)", line: { width: 0 }, layer: "below",
    });
  }
  if (step !== null && !chart.histogram) {
    shapes.push({
      type: "line", xref: "x", yref: "paper", x0: step, x1: step, y0: 0, y1: 1,
      line: { color: colours.soft, width: 1, dash: "dot" },
    });
  }
  const annotations = [];
  const logarithmic = !chart.linear && chart.traces.some((trace) => trace.y.some((y) => y > 0));
  if (chart.guide) {
    shapes.push({
      type: "line", xref: "paper", yref: "y", x0: 0, x1: 1, y0: chart.guide, y1: chart.guide,
      line: { color: colours.ink, width: 1, dash: "dash" },
    });
    annotations.push({
      xref: "paper", yref: "y", x: 1, y: logarithmic ? Math.log10(chart.guide) : chart.guide,
      text: "1e-3", showarrow: false, xanchor: "left", yanchor: "middle", font: { size: 10 },
    });
  }
  const yaxis = {
    title: { text: chart.unit, font: { size: 11 }, standoff: 6 },
    type: logarithmic ? "log" : "linear", exponentformat: "e", nticks: 6,
    uirevision: `${logarithmic}${chart.title}${chart.traces.map((trace) => trace.name)}`,
    ...(logarithmic ? logAxis(chart) : linearAxis(chart)),
  };
  const layout = layoutOf(colours, {
    height: 144 + (view.last ? 14 : 0), margin: { l: 62, r: 30, t: 6, b: view.last ? 36 : 22 }, showlegend: false, shapes, annotations,
    hovermode: chart.histogram ? "closest" : "x unified",
    datarevision: Math.random(),
    xaxis: {
      title: { text: view.last ? chart.x : "", font: { size: 11 }, standoff: 4 },
      type: chart.histogram ? "log" : "linear", exponentformat: "none",
      ...(chart.histogram ? logTicks(chart.traces.flatMap((trace) => trace.x)) : {}),
      separatethousands: true, nticks: 7, tickangle: 0, zeroline: false,
      uirevision: `${range}`,
      ...(range && !chart.histogram ? { range, autorange: false } : { autorange: true }),
    },
    yaxis,
  });
  const last = chart.traces.map((trace) => `${trace.name} ${number(trace.y.at(-1) ?? NaN)}`);
  element.setAttribute("role", "img");
  element.setAttribute("aria-label", `${chart.title}. At the end: ${last.slice(0, 6).join(", ")}`);
  return draw(element, chart.traces, layout);
}

function extent(values) {
  let [low, high] = [Infinity, -Infinity];
  for (const value of values) {
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  return [low, high];
}

/** A range around all positive values, with few tick labels: Plotly's would be "2" and "5". */
function logAxis(chart) {
  const values = chart.traces.flatMap((trace) => trace.y.filter((y) => y > 0));
  if (chart.guide) values.push(chart.guide);
  const [low, high] = extent(values.map(Math.log10));
  const pad = Math.max(0.06 * (high - low), 0.15);
  const range = [low - pad, high + pad];
  return { range, autorange: false, ...logTicks(range.map((power) => 10 ** power)) };
}

/** A range that includes 0: Plotly would draw a constant rate of 1e-3 at "0", from -1 to 1. */
function linearAxis(chart) {
  const [low, high] = extent([0, ...chart.traces.flatMap((trace) => trace.y.filter(Number.isFinite))]);
  const pad = 0.06 * (high - low) || 1;
  return { range: [low && low - pad, high && high + pad], autorange: high === low };
}

function logTicks(values) {
  const [low, high] = extent(values.filter((value) => value > 0).map(Math.log10));
  if (!Number.isFinite(high - low)) return {};
  const found = powers(low, high);
  const at = found.length ? found : [low, high];
  return { tickmode: "array", tickvals: at.map((power) => 10 ** power), ticktext: at.map(tickLabel) };
}
