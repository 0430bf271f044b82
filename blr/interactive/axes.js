// Drawings in SVG: nodes, axes with ticks, lines.
const svg = (parent, tag, attributes = {}, text = "") => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  node.textContent = text;
  return parent.appendChild(set(node, attributes));
};

// Round numbers that cover [low, high], about `count` of them.
const ticks = ([low, high], count) => {
  const rough = (high - low) / Math.max(1, count), power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= 0.75 * rough);
  const first = Math.ceil(low / step - 1e-9), last = Math.floor(high / step + 1e-9);
  return Array.from({ length: last - first + 1 }, (_, k) => Number(((first + k) * step).toPrecision(12)));
};

// Axes in the box {left, top, width, height}; returns the maps x and y from data to the drawing and
// `inside`, a layer that is clipped to the box. The name of the vertical axis stands above it.
const axes = (parent, { left, top, width, height, xlim, ylim, xlabel, ylabel, xticks }) => {
  const x = (value) => left + (width * (value - xlim[0])) / (xlim[1] - xlim[0]);
  const y = (value) => top + (height * (ylim[1] - value)) / (ylim[1] - ylim[0]);
  const bottom = top + height, name = (value) => String(value).replace("-", "−");
  for (const value of xticks ?? ticks(xlim, Math.max(4, width / 75))) {
    svg(parent, "line", { x1: x(value), x2: x(value), y1: bottom, y2: bottom + 5, stroke: GREY });
    svg(parent, "text", { x: x(value), y: bottom + 18, "text-anchor": "middle", class: "blr-tick" }, name(value));
  }
  for (const value of ticks(ylim, Math.max(2, height / 45))) {
    svg(parent, "line", { x1: left - 5, x2: left, y1: y(value), y2: y(value), stroke: GREY });
    svg(parent, "text", { x: left - 8, y: y(value) + 4, "text-anchor": "end", class: "blr-tick" }, name(value));
  }
  svg(parent, "path", { d: `M${left},${top}V${bottom}H${left + width}`, fill: "none", stroke: GREY });
  svg(parent, "text", { x: left + width / 2, y: bottom + 36, "text-anchor": "middle" }, xlabel);
  svg(parent, "text", { x: left - 40, y: top - 10 }, ylabel);
  const inside = svg(parent, "svg", { x: left, y: top, width, height, viewBox: `${left} ${top} ${width} ${height}`,
    style: "overflow: hidden; width: auto; display: inline" });
  return { x, y, inside, xlim, ylim, left, top, width, height };
};

const path = (points) => points.map(([x, y], k) => `${k ? "L" : "M"}${x.toFixed(2)},${y.toFixed(2)}`).join("");

// Line y = intercept + slope x across the whole width of the axes.
const across = (ax, intercept, slope) =>
  path(ax.xlim.map((value) => [ax.x(value), ax.y(intercept + slope * value)]));

