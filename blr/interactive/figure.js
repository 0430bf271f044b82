// Shared by the interactive figures: elements, numbers, tables, and redrawing when the width
// changes. No library, no network: a figure is this file, its own file, and its data.
const BLUE = "#0072B2", VERMILLION = "#D55E00", GREEN = "#009E73", GREY = "#4D4D4D", LIGHT = "#E6E6E6";
// Letters need more contrast than lines do: the same hues, darker.
const INK = { [VERMILLION]: "#A84600", [GREEN]: "#00735A" };

const html = (parent, tag, attributes = {}, text = "") => {
  const node = parent.appendChild(document.createElement(tag));
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.textContent = text;
  return node;
};

const set = (node, attributes) => {
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
};

// Four significant digits, a true minus sign, and exponents only where they are needed.
const format = (value) => {
  if (!Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  const text = size !== 0 && (size < 1e-4 || size >= 1e6) ? value.toExponential(2)
    : size >= 1000 ? value.toFixed(0) : value.toFixed(size >= 100 ? 1 : size >= 10 ? 2 : size >= 0.1 ? 3 : 4);
  return text.replace("-", "−");
};

const legend = (parent, entries) => {
  const box = html(parent, "div", { class: "blr-legend" });
  for (const [color, line, text] of entries) {
    const entry = html(box, "span");
    html(entry, "i", { style: `border-top: 3px ${line} ${color}` });
    html(entry, "span", {}, text);
  }
};

// Rows of a table; returns a function that fills the numbers in.
const table = (parent, names) => {
  const body = html(html(parent, "table", { "aria-live": "polite" }), "tbody");
  const cells = names.map(([name, color]) => {
    const row = html(body, "tr");
    html(row, "th", { scope: "row", style: color ? `color: ${INK[color] ?? color}` : "" }, name);
    return html(row, "td");
  });
  return (values) => values.forEach((value, k) => {
    cells[k].textContent = typeof value === "string" ? value : format(value);
  });
};

// Run `build(root, live, data)` on every figure of this kind that does not live yet. The picture for
// places without scripts goes away, and `layout` is called now and whenever the width changes.
const start = (kind, build) => {
  for (const root of document.querySelectorAll(`.blr-interactive[data-kind="${kind}"]:not([data-ready])`)) {
    root.dataset.ready = "";
    const data = JSON.parse(root.querySelector('script[type="application/json"]').textContent);
    const still = root.querySelector("img");
    const live = document.createElement("div");
    root.insertBefore(live, still);
    const layout = build(root, live, data, still);
    if (!layout) continue;
    still.remove();
    let last = 0;
    const resize = () => {
      const width = live.clientWidth || 640;
      if (width === last) return;
      last = width;
      root.classList.toggle("blr-narrow", width < 620);
      layout(width);
    };
    new ResizeObserver(resize).observe(live);
    resize();
  }
};
