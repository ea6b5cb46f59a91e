// The view: controls, heatmaps, charts, findings, and what a click does.

import { chartsOf, drawChart, styleOf } from "./charts.js";
import { Embedded, unpacked } from "./data.js";
import { findingsOf, make } from "./findings.js";
import { folds, oddest, rowsOf } from "./folding.js";
import { Heatmap, limits, theme } from "./heatmap.js";
import { Address, format, parse } from "./state.js";

const MAX_RUNS = 3; // heatmaps shown by default
const MAX_ITEMS = 7; // lines with distinct styles
const POLL = 8000; // milliseconds between checks for new records
const FRESH = 30000; // milliseconds before the findings of a live run are updated

export class View {
  constructor(root, source, address, options = {}) {
    this.root = root;
    this.source = source;
    this.address = address;
    this.options = { findings: true, ...options };
    this.state = parse(address.read());
    this.heatmaps = new Map();
    this.plots = new Map();
    this.maps = new Map();
    this.busy = Promise.resolve();
    this.ready = options.ready ?? Promise.resolve(); // resolves when Plotly is loaded
    this.build();
    address.listen((text) => {
      this.state = parse(text);
      this.all();
    });
  }

  // --- The frame of the page ------------------------------------------------------------------

  build() {
    const pick = (label, control) => make("label", {}, `${label} `, control);
    const toggle = (text, title, change) => make(
      "button", { type: "button", class: "toggle", title, onclick: change }, text,
    );
    this.figure = make("select", { onchange: () => this.set({ figure: this.figure.value }) });
    this.runs = make("div", { class: "runs", role: "group", "aria-label": "Runs" });
    this.filter = make("input", {
      type: "search", placeholder: "name or expression", "aria-label": "Filter parameters",
      oninput: () => this.later(() => this.set({ filter: this.filter.value })),
    });
    this.unfold = toggle("Unfold modules", "Show one row per parameter", () => this.set({
      open: this.state.open.includes("*") ? [] : ["*"],
    }));
    this.scale = toggle("Logarithmic", "Scale of colours and charts", () => this.set({
      linear: !this.state.linear,
    }));
    this.whole = toggle("All steps", "Zoom out; so does a double click", () => this.set({
      range: null, mark: null,
    }));
    this.status = make("span", { class: "status", role: "status" });
    this.notes = make("div", { class: "notes" });
    this.mapSection = make("section", { class: "maps", "aria-label": "Heatmaps" });
    this.chosen = make("div", { class: "chosen" });
    this.charts = make("div", { class: "charts" });
    this.side = make("section", { class: "side", "aria-label": "Charts of the selected parameters" },
      this.chosen, this.charts);
    this.found = make("section", { class: "findings", "aria-label": "Findings" });
    this.tip = make("div", { class: "tip", hidden: true });
    this.spoken = make("div", { class: "spoken", "aria-live": "polite" });
    this.root.replaceChildren(
      make("div", { class: "bar", role: "toolbar", "aria-label": "Controls" },
        pick("Figure", this.figure), pick("Parameters", this.filter), this.unfold, this.scale,
        this.whole, this.runs, this.status),
      this.notes,
      make("div", { class: "columns" },
        make("div", { class: "main" }, this.options.findings ? this.found : null, this.mapSection),
        this.side),
      this.tip, this.spoken,
    );
    this.root.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.tip.hidden = true;
    });
  }

  later(action) {
    clearTimeout(this.timer);
    this.timer = setTimeout(action, 200);
  }

  /** Show the data, and keep updating while a run records. */
  async start() {
    try {
      await this.look();
    } catch (error) {
      this.say([`Cannot load the figures: ${error.message}`]);
    }
    if (this.source.live) {
      setInterval(() => {
        const seen = !document.hidden && this.root.clientWidth > 0;
        if (seen) this.look().catch((error) => { this.status.textContent = error.message; });
      }, POLL);
    }
  }

  async look() {
    const news = await this.source.overview();
    const version = JSON.stringify(news.tables.map((table) => [table.title, table.version]));
    this.status.textContent = this.source.live
      ? `updated ${new Date().toLocaleTimeString()}` : "";
    this.say(news.notes, news.tables);
    if (version === this.version) return;
    this.version = version;
    this.overview = news;
    this.maps.clear();
    await this.all();
  }

  say(notes, tables = this.overview?.tables ?? []) {
    this.root.classList.toggle("empty", !tables.length && notes.length > 0);
    this.notes.replaceChildren(...notes.map((note) => make("p", { role: "status" }, note)));
  }

  // --- The state ------------------------------------------------------------------------------

  get tables() {
    const { tables } = this.overview;
    const chosen = tables.filter((table) => this.state.runs.includes(table.title));
    return chosen.length ? chosen : tables.slice(0, MAX_RUNS);
  }

  set(change) {
    Object.assign(this.state, change);
    return this.all();
  }

  /** Draw everything, after any drawing in progress. */
  all() {
    this.address.write(format(this.state));
    this.busy = this.busy.then(() => this.draw()).catch((error) => this.say([String(error)]));
    return this.busy;
  }

  async draw() {
    if (!this.overview?.tables.length) return;
    this.colours = theme(this.root);
    this.controls();
    await Promise.all(this.tables.map((table) => this.map(table)));
    await this.ready;
    if (!this.state.parameters.length) {
      const [table] = this.tables;
      this.state.parameters = [table.names.find((name) => name.endsWith("weight")) ?? table.names[0]];
    }
    await this.drawMaps();
    await this.drawCharts();
    if (!this.root.dataset.ready) performance.mark("lrprobe is drawn");
    this.root.dataset.ready = "true";
    if (this.options.findings) this.diagnose();
  }

  controls() {
    const { figures, tables } = this.overview;
    const having = Object.keys(figures).filter((f) => tables.some((t) => t.figures.includes(f)));
    if (!having.includes(this.state.figure)) [this.state.figure] = having;
    this.figure.replaceChildren(...having.map((figure) => make(
      "option", { value: figure, selected: figure === this.state.figure }, figures[figure].title,
    )));
    const some = this.tables.some((table) => folds(table.names));
    this.unfold.hidden = !some;
    this.unfold.textContent = this.state.open.includes("*") ? "Fold modules" : "Unfold modules";
    this.scale.textContent = this.state.linear ? "Linear" : "Logarithmic";
    this.scale.setAttribute("aria-pressed", String(!this.state.linear));
    this.whole.hidden = !this.state.range && !this.state.mark;
    if (document.activeElement !== this.filter) this.filter.value = this.state.filter;
    this.runs.hidden = tables.length < 2;
    const shown = this.tables.map((table) => table.title);
    this.runs.replaceChildren(...tables.map(({ title }) => make(
      "button", {
        type: "button", class: "chip", "aria-pressed": String(shown.includes(title)),
        onclick: () => this.set({
          runs: shown.includes(title) && shown.length > 1
            ? shown.filter((each) => each !== title) : [...new Set([...shown, title])],
        }),
      }, title,
    )));
  }

  // --- Heatmaps -------------------------------------------------------------------------------

  async map(table) {
    const { figure, range } = this.state;
    if (!table.figures.includes(figure)) return;
    const key = `${table.title}\n${figure}\n${range}`;
    if (!this.maps.has(key)) this.maps.set(key, await this.source.heatmap(table, figure, range));
    this.maps.set(table, this.maps.get(key));
  }

  async drawMaps() {
    const { figure, open, filter, range, mark, step, linear, parameters } = this.state;
    const about = this.overview.figures[figure];
    const logarithmic = !linear && !about.share;
    const tables = this.tables.filter((table) => table.figures.includes(figure));
    const bounds = about.share && !linear ? [0, 1]
      : limits(tables.map((table) => this.maps.get(table).values), logarithmic);
    for (const [title, { box }] of this.heatmaps) {
      if (!tables.some((table) => table.title === title)) {
        box.remove();
        this.heatmaps.delete(title);
      }
    }
    for (const table of tables) {
      const map = this.maps.get(table);
      const one = this.heatmaps.get(table.title) ?? this.newHeatmap(table.title);
      this.mapSection.append(one.box);
      const rows = rowsOf(table.names, open, filter);
      const few = map.steps.length < map.recorded ? `${map.steps.length} of ` : "";
      const many = (count, what) => `${count.toLocaleString("en")} ${what}${count === 1 ? "" : "s"}`;
      one.caption.replaceChildren(
        make("b", {}, table.title),
        `  ${table.run && table.title === table.run ? `${table.optimizer}, ` : ""}`
        + `${many(table.names.length, table.level)}, ${few}${many(map.recorded, "recorded step")}`,
      );
      one.heatmap.element.hidden = !rows.length;
      if (!rows.length) continue;
      await one.heatmap.draw({
        table, map, rows, figure: about, logarithmic, limits: bounds, colours: this.colours, range,
        mark, step, chosen: parameters.map((name) => table.names.indexOf(name)),
      });
    }
  }

  newHeatmap(title) {
    const element = make("div", { class: "plot heatmap" });
    const caption = make("figcaption");
    const box = make("figure", {}, caption, element);
    const heatmap = new Heatmap(element, {
      point: (map, cell, event) => this.point(map, cell, event),
      open: (map, cell, more) => this.open(map, cell, more),
      zoom: (range) => this.set({ range }),
    });
    const one = { box, caption, heatmap };
    this.heatmaps.set(title, one);
    this.mapSection.append(box);
    return one;
  }

  point(heatmap, cell, event) {
    if (!cell) {
      this.tip.hidden = true;
      return;
    }
    const [head, ...lines] = heatmap.tooltip(cell);
    this.tip.replaceChildren(make("b", {}, head), ...lines.map((line) => make("div", {}, line)));
    this.tip.hidden = false;
    const at = event ? { x: event.clientX, y: event.clientY } : heatmap.place(cell);
    const { width, height } = this.tip.getBoundingClientRect();
    const fits = (value, size, most) => Math.max(4, value + size + 18 > most ? value - size - 12 : value + 14);
    this.tip.style.left = `${fits(at.x, width, document.documentElement.clientWidth)}px`;
    this.tip.style.top = `${fits(at.y, height, document.documentElement.clientHeight)}px`;
    if (!event) this.spoken.textContent = [head, ...lines].join(", ");
  }

  /** Open the parameter of a cell; for a folded row, the one that differs most from the others. */
  open(heatmap, { row, column }, more) {
    const { rows, map, table } = heatmap.view;
    const chosen = rows[row];
    if (!chosen) return;
    const name = table.names[oddest(chosen, map.values, map.steps.length, column)];
    const others = more ? this.state.parameters.filter((each) => each !== name) : [];
    const change = {
      parameters: [...others, name].slice(-MAX_ITEMS), step: map.steps[column], mark: null,
    };
    if (chosen.module !== null) {
      this.set({ ...change, open: [...this.state.open, chosen.module] });
    } else {
      this.choose(change);
    }
  }

  /** Update the charts without redrawing the heatmaps. */
  choose(change) {
    Object.assign(this.state, change);
    this.address.write(format(this.state));
    this.busy = this.busy.then(async () => {
      await this.drawCharts();
      const { parameters, step, mark } = this.state;
      for (const { heatmap } of this.heatmaps.values()) {
        const names = heatmap.view?.table.names ?? [];
        await heatmap.choose(parameters.map((name) => names.indexOf(name)), step, mark);
      }
    }).catch((error) => this.say([String(error)]));
  }

  // --- Charts ---------------------------------------------------------------------------------

  async drawCharts() {
    const { parameters, range, step, figure, linear, mark } = this.state;
    const wanted = parameters.flatMap((name) => (
      this.tables.filter((table) => table.names.includes(name)).map((table) => ({ table, name }))
    )).slice(0, MAX_ITEMS);
    const details = await Promise.all(
      wanted.map(({ table, name }) => this.source.detail(table, name, range, step)),
    );
    const several = new Set(wanted.map(({ table }) => table.title)).size > 1;
    const items = wanted.map(({ table, name }, at) => ({
      ...details[at], ...styleOf(at, this.colours.dark), group: table.groups[table.names.indexOf(name)] ?? "",
      label: several ? `${name} (${table.title})` : name,
    }));
    this.legend(wanted, several, parameters);
    const view = {
      step, range, mark, linear, figure, figures: this.overview.figures, colours: this.colours,
    };
    const charts = chartsOf(items, view);
    for (const [key, { box }] of this.plots) {
      if (!charts.some((chart) => chart.key === key)) {
        box.remove();
        this.plots.delete(key);
      }
    }
    for (const chart of charts) {
      const { box, caption, element } = this.plots.get(chart.key) ?? this.newPlot(chart.key);
      this.charts.append(box);
      caption.textContent = chart.title.replace(/&lt;/g, "<").replace(/&gt;/g, ">").replace(/&amp;/g, "&");
      await drawChart(element, chart, { ...view, last: chart === charts.at(-1) });
      if (!element.dataset.listening) this.listen(element, chart.histogram);
    }
  }

  newPlot(key) {
    const element = make("div", { class: `plot chart ${key}` });
    const caption = make("figcaption");
    const one = { box: make("figure", {}, caption, element), caption, element };
    this.plots.set(key, one);
    this.charts.append(one.box);
    return one;
  }

  listen(element, histogram) {
    element.dataset.listening = "true";
    if (histogram) return;
    element.on("plotly_click", ({ points }) => this.choose({ step: points[0].x }));
    element.on("plotly_relayout", (change) => {
      if (change["xaxis.range[0]"] !== undefined) {
        this.set({ range: [Number(change["xaxis.range[0]"]), Number(change["xaxis.range[1]"])] });
      } else if (change["xaxis.autorange"]) {
        this.set({ range: null });
      }
    });
  }

  legend(wanted, several, parameters) {
    const swatch = (at) => (
      make("i", { style: `background:${styleOf(at, this.colours.dark).colour}` })
    );
    const remove = (name) => make("button", {
      type: "button", class: "remove", "aria-label": `Remove ${name}`,
      onclick: () => this.choose({ parameters: this.state.parameters.filter((p) => p !== name) }),
    }, "×");
    this.chosen.replaceChildren(
      ...wanted.map(({ table, name }, at) => make("span", { class: "item" }, swatch(at),
        make("code", { title: name }, name), several ? ` ${table.title}` : "",
        parameters.length > 1 ? remove(name) : null)),
      make("small", {}, "Click a cell to open its parameter; Shift-click to compare."),
    );
  }

  // --- Findings -------------------------------------------------------------------------------

  /** Show the findings of the selected runs; update them at intervals while a run records. */
  async diagnose() {
    const shown = this.tables;
    const titles = JSON.stringify(shown.map((table) => table.title));
    const same = titles === this.diagnosed?.titles;
    const fresh = Date.now() - this.diagnosed?.time < FRESH;
    if (same && (fresh || this.version === this.diagnosed.version)) return;
    this.diagnosed = { titles, version: this.version, time: Date.now() };
    const parts = [];
    for (const table of shown) {
      let part;
      try {
        const answer = await this.source.findings(table);
        if (!answer) continue;
        part = findingsOf(answer, table, (where, item) => this.go(where, item));
      } catch (error) {
        part = make("p", {}, `${table.title}: cannot load the findings: ${error.message}`);
      }
      parts.push(part);
    }
    if (titles !== this.diagnosed.titles) return; // the selection has changed meanwhile
    this.found.replaceChildren(make("h2", {}, "Findings"), ...parts);
  }

  /** Show the run, parameter and steps of a finding. */
  go(table, item) {
    const prefix = `${item.parameter}.`;
    const name = table.names.includes(item.parameter) ? item.parameter
      : table.names.find((each) => each.startsWith(prefix));
    const shown = this.tables.map((each) => each.title);
    this.set({
      runs: shown.includes(table.title) ? this.state.runs : [table.title],
      parameters: name ? [name] : this.state.parameters,
      step: item.first, mark: [item.first, item.last], filter: "",
    });
    this.side.scrollIntoView({ block: "nearest" });
  }
}

/** Start the view in a page with embedded figures. */
export async function embedded() {
  const root = document.getElementById("lrprobe");
  const [plotly, data] = await Promise.all([unpacked("lrprobe-plotly"), unpacked("lrprobe-data")]);
  const script = document.createElement("script");
  script.textContent = plotly;
  document.head.append(script);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const dress = () => { document.documentElement.dataset.theme = dark.matches ? "dark" : "light"; };
  dress();
  document.documentElement.classList.add("live");
  const content = JSON.parse(data);
  const view = new View(root, new Embedded(content), new Address(window), content.options);
  dark.addEventListener("change", () => { dress(); view.all(); });
  globalThis.lrprobe = view;
  await view.start();
}
