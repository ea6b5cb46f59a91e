// Findings, each linked to its parameter and steps. All content is inserted as text.

const SHOWN = 4;

/** Make an element with attributes and children; strings become text nodes. */
export function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value !== false && value !== null) element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

/** Make the element with the findings of a table; `go(table, item)` shows one of them. */
export function findingsOf(answer, table, go) {
  const parts = [make("p", { class: "summary" }, `${table.title}: ${answer.summary}`)];
  for (const group of answer.groups) {
    // A finding about a whole optimizer; one without records has no table of its own.
    const whole = group.optimizer === table.optimizer ? table.title : group.optimizer;
    const items = group.items.map((item) => make("li", {}, make(
      "button",
      { type: "button", class: "link", onclick: () => go(table, item), title: "Show this parameter and these steps" },
      make("code", {}, item.parameter || whole), `, ${item.steps}: ${item.evidence}`,
    )));
    const rest = items.splice(SHOWN);
    parts.push(make(
      "details", { class: `finding ${group.severity}`, open: group.severity === "finding" },
      make("summary", {}, make("span", { class: "tag" }, group.severity), ` ${group.title} `,
        make("small", {}, `${group.items.length}`)),
      make("ul", {}, ...items),
      rest.length ? make("details", { class: "more" },
        make("summary", {}, `and ${rest.length} more`), make("ul", {}, ...rest)) : null,
      make("p", {}, make("b", {}, "Usually: "), group.meaning),
      make("p", {}, make("b", {}, "Try: "), group.advice),
    ));
  }
  parts.push(...answer.left_out.map((sentence) => make("p", { class: "soft" }, sentence)));
  return make("div", { class: "found" }, ...parts);
}
