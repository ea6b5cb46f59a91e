// The tab: TensorBoard imports this module and calls `render`.

import { Remote } from "./data.js";
import { Address } from "./state.js";
import { View } from "./view.js";

function load(name, attributes) {
  return new Promise((resolve, reject) => {
    const element = Object.assign(document.createElement(name), attributes);
    element.onload = resolve;
    element.onerror = () => reject(new Error(`cannot load ${attributes.src ?? attributes.href}`));
    document.head.append(element);
  });
}

/** TensorBoard's window, for its URL and theme; the tab's own window if that is not accessible. */
function host() {
  try {
    return window.parent.location.hash === undefined ? window : window.parent;
  } catch {
    return window;
  }
}

export async function render() {
  document.documentElement.lang = "en";
  document.title = "lrprobe";
  const root = document.body.appendChild(document.createElement("main"));
  root.id = "lrprobe";
  root.textContent = "Loading …";
  const outside = host();
  const dress = () => {
    const dark = outside === window ? matchMedia("(prefers-color-scheme: dark)").matches
      : outside.document.body.classList.contains("dark-mode");
    document.documentElement.dataset.theme = dark ? "dark" : "light";
  };
  dress();
  document.documentElement.classList.add("live");
  await load("link", { rel: "stylesheet", href: "style.css" });
  // Load figures and Plotly in parallel: a browser takes a second to parse Plotly.
  const ready = load("script", { src: "plotly.min.js" });
  ready.catch(() => {
    root.textContent = "The tab needs Plotly, which is not installed: pip install 'lrprobe[plot]'";
  });
  const view = new View(root, new Remote(), new Address(outside, "lrprobe"), { ready });
  if (outside !== window) {
    new MutationObserver(() => { dress(); view.all(); })
      .observe(outside.document.body, { attributes: true, attributeFilter: ["class"] });
  }
  globalThis.lrprobe = view;
  await view.start();
}
