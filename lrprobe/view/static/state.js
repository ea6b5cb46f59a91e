// The state of the view, as an object and as text in the URL, so that a view can be shared.

const EMPTY = {
  figure: "effective_lr_p50", // a column
  runs: [], // titles of tables
  parameters: [], // names
  step: null,
  range: null, // first and last step of the zoom
  mark: null, // first and last step of a finding
  linear: false,
  open: [], // unfolded modules; "*" unfolds all
  filter: "",
};

/** Parse a text like `figure=grad_norm&parameter=0.weight`. */
export function parse(text) {
  const query = new URLSearchParams(text);
  const pair = (name) => {
    const parts = (query.get(name) ?? "").split("~").map(Number);
    return query.get(name) && parts.length === 2 && parts.every(Number.isFinite) ? parts : null;
  };
  const step = Number(query.get("step") ?? NaN);
  return {
    ...EMPTY,
    figure: query.get("figure") ?? EMPTY.figure,
    runs: query.getAll("run"),
    parameters: query.getAll("parameter"),
    step: Number.isFinite(step) ? step : null,
    range: pair("range"),
    mark: pair("mark"),
    linear: query.get("scale") === "linear",
    open: query.getAll("open"),
    filter: query.get("filter") ?? "",
  };
}

/** Format a state as text, without its default values. */
export function format(state) {
  const query = new URLSearchParams();
  if (state.figure !== EMPTY.figure) query.set("figure", state.figure);
  for (const run of state.runs) query.append("run", run);
  for (const name of state.parameters) query.append("parameter", name);
  if (state.step !== null) query.set("step", state.step);
  if (state.range) query.set("range", state.range.map((x) => Number(x.toPrecision(8))).join("~"));
  if (state.mark) query.set("mark", state.mark.join("~"));
  if (state.linear) query.set("scale", "linear");
  for (const module of state.open) query.append("open", module);
  if (state.filter) query.set("filter", state.filter);
  return query.toString();
}

/** The part of a window's URL that holds the state: after `#`, in TensorBoard after `#lrprobe&`. */
export class Address {
  constructor(target, before = "") {
    this.target = target;
    this.before = before;
    this.written = null;
  }

  read() {
    const hash = this.target.location.hash.slice(1);
    return hash.startsWith(this.before) ? hash.slice(this.before.length).replace(/^&/, "") : "";
  }

  write(text) {
    this.written = text;
    const hash = `#${this.before}${this.before && text ? "&" : ""}${text}`;
    try {
      this.target.history.replaceState(this.target.history.state, "", hash);
    } catch {
      // A frame without a URL cannot be shared.
    }
  }

  /** Call back if a link or the user changes the URL. */
  listen(changed) {
    this.target.addEventListener("hashchange", () => {
      const text = this.read();
      if (text !== this.written && this.target.location.hash.startsWith(`#${this.before}`)) {
        changed(text);
      }
    });
  }
}
