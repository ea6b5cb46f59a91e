// The rows of a heatmap: parameters, or modules if there are many.

const MAX_ROWS = 60; // with more, modules are folded

const parts = (name) => name.split(/(?=[./])/);

/** The module of each name at a depth. */
function modules(names, depth) {
  return names.map((name) => parts(name).slice(0, -1).slice(0, depth).join(""));
}

/** The module of each name at the greatest depth that fits; null if nothing needs folding. */
export function folds(names) {
  if (names.length <= MAX_ROWS) return null;
  const deepest = Math.max(...names.map((name) => parts(name).length)) - 1;
  for (let depth = deepest; depth > 0; depth--) {
    const keys = modules(names, depth);
    const count = new Set(keys).size;
    if (count <= MAX_ROWS && count < names.length) return keys;
  }
  return null;
}

/**
 * The rows: each has a label and the parameters that it represents.
 *
 * A folded row has the name of its module, else null. Rows are in the model's order.
 */
export function rowsOf(names, open, filter) {
  let chosen = names.map((_, at) => at);
  if (filter) {
    let matches;
    try {
      const pattern = new RegExp(filter, "i");
      matches = (name) => pattern.test(name);
    } catch {
      matches = (name) => name.includes(filter);
    }
    chosen = chosen.filter((at) => matches(names[at]));
  }
  const keys = folds(chosen.map((at) => names[at]));
  if (!keys || open.includes("*")) {
    return chosen.map((at) => ({ label: names[at], members: [at], module: null }));
  }
  const rows = new Map();
  chosen.forEach((at, place) => {
    const key = keys[place];
    if (open.includes(key) || key === "") {
      rows.set(`${at}`, { label: names[at], members: [at], module: null });
    } else if (rows.has(`m${key}`)) {
      rows.get(`m${key}`).members.push(at);
    } else {
      rows.set(`m${key}`, { label: key, members: [at], module: key });
    }
  });
  return [...rows.values()];
}

const UNUSUAL = 10; // ratio to the parameter's own median

/**
 * The figures of the rows, each an array over the steps.
 *
 * A folded row shows the median of its parameters. If one of them is ten times or a tenth of its own
 * median over time, the row shows that one, so that a single event in one parameter is visible.
 */
export function fold(rows, values, width) {
  return rows.map(({ members }) => {
    const of = members.map((member) => values.subarray(member * width, (member + 1) * width));
    if (of.length === 1) return of[0];
    const usual = of.map((line) => middle(Float32Array.from(line)));
    const row = new Float32Array(width);
    const here = new Float32Array(of.length);
    for (let at = 0; at < width; at++) {
      let [most, odd] = [UNUSUAL, NaN];
      for (let member = 0; member < of.length; member++) {
        const value = of[member][at];
        here[member] = value;
        const times = value / usual[member];
        const far = times < 1 ? 1 / times : times;
        if (far > most && far < Infinity) [most, odd] = [far, value];
      }
      row[at] = Number.isNaN(odd) ? middle(here) : odd;
    }
    return row;
  });
}

/** The median of the values other than NaN; sorts the array. */
function middle(values) {
  values.sort();
  let count = values.length;
  while (count && Number.isNaN(values[count - 1])) count--;
  return count ? (values[(count - 1) >> 1] + values[count >> 1]) / 2 : NaN;
}

/** The parameter of a row that differs most from the others at a step. */
export function oddest(row, values, width, at) {
  const logs = row.members.map((member) => Math.log(Math.abs(values[member * width + at])));
  const usual = middle(Float32Array.from(logs));
  const far = logs.map((log) => (Number.isNaN(log) ? Infinity : Math.abs(log - usual) || 0));
  return row.members[far.indexOf(Math.max(...far))];
}
