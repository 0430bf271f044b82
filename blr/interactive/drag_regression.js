// Least squares of y on (1, x), with prior precision δ on the slope, and what it would be without
// each point i, from the one fit to all of them:
//     θ − θ^{\i} = H⁻¹ xᵢ rᵢ / (1 − hᵢ),     hᵢ = xᵢᵀ H⁻¹ xᵢ,     Dᵢ = hᵢ (rᵢ / (1 − hᵢ))² / (2 s²).
const regress = (x, y, delta) => {
  const N = x.length, sum = (values) => values.reduce((total, value) => total + value, 0);
  const mean = sum(x) / N, centred = x.map((value) => value - mean);
  const H = sum(centred.map((c) => c * c)) + delta;
  const slope = sum(centred.map((c, i) => c * y[i])) / H;
  const intercept = sum(y) / N - slope * mean;
  const residual = x.map((value, i) => y[i] - intercept - slope * value);
  const variance = sum(residual.map((r) => r * r)) / (N - 2);
  const leverage = centred.map((c) => 1 / N + (c * c) / H);
  const alone = (h) => h > 1 - 1e-12;  // without this point the others have one x and no slope
  const leftOut = residual.map((r, i) => (alone(leverage[i]) ? NaN : r / (1 - leverage[i])));
  const cook = leftOut.map((r, i) => (leverage[i] * r * r) / (2 * variance));
  const slopeChange = centred.map((c, i) => (c / H) * leftOut[i]);
  const interceptChange = leftOut.map((r, i) => r / N - mean * slopeChange[i]);
  return { slope, intercept, residual, leverage, leftOut, cook, slopeChange, interceptChange };
};

start("drag_regression", (root, live, data) => {
  const x = [...data.x], y = [...data.y], [xlim, ylim] = [data.xlim, data.ylim];
  const name = (i) => data.labels[i] ?? `point ${i}`;
  const clamp = (value, [low, high]) => Math.min(high, Math.max(low, value));
  let selected = data.selected, ax, bars, nodes;

  legend(live, [[BLUE, "solid", "fit to all points"], [VERMILLION, "dashed", "fit without the selected point"]]);
  const columns = html(live, "div", { class: "blr-columns" });
  const picture = html(columns, "div"), side = html(columns, "div");
  const controls = html(side, "div", { class: "blr-controls" });
  const select = html(html(controls, "label", {}, "Point"), "select", { "aria-label": "selected point" });
  x.forEach((_, i) => html(select, "option", { value: i }, name(i)));
  const back = html(controls, "button", { type: "button" }, "Put points back");
  const fill = table(side, [[data.x_label], [data.y_label], ["leverage h"], ["residual r", BLUE],
    ["left out: r\u00a0/\u00a0(1\u00a0−\u00a0h)", VERMILLION], ["Cook’s distance D"], ["slope, all points", BLUE],
    ["slope without it", VERMILLION], ["change of slope"]]);
  const drawing = svg(picture, "svg", { tabindex: 0, role: "application", "aria-label":
    `Scatter plot of ${data.y_label} against ${data.x_label}. Arrow keys move the selected point, ` +
    "with Shift in larger steps; Page Up and Page Down select another point; Home puts it back." });

  const layout = () => {
    drawing.replaceChildren();
    const W = picture.clientWidth || 600, left = 56, width = W - left - 14;
    const height = Math.round(clamp(0.62 * width, [230, 360])), gap = 78, low = 70;
    set(drawing, { viewBox: `0 0 ${W} ${height + gap + low + 66}` });
    ax = axes(drawing, { left, top: 26, width, height, xlim, ylim, xlabel: data.x_label, ylabel: data.y_label });
    bars = { left, top: 26 + height + gap, width, height: low, layer: svg(drawing, "g") };
    const line = (more) => svg(ax.inside, "path", { fill: "none", "stroke-width": 2.5, ...more });
    nodes = { all: line({ stroke: BLUE }), without: line({ stroke: VERMILLION, "stroke-dasharray": "8 5" }),
      residual: line({ stroke: BLUE, "stroke-width": 2 }), error: line({ stroke: VERMILLION, "stroke-width": 2 }) };
    nodes.points = x.map((_, i) => svg(drawing, "circle", { stroke: "white", "data-point": i }));
    nodes.hits = x.map((_, i) => svg(drawing, "circle", { r: 13, fill: "transparent", "data-hit": i,
      style: "cursor: grab" }));
    nodes.label = svg(drawing, "text", { "paint-order": "stroke", stroke: "white", "stroke-width": 4,
      "stroke-linejoin": "round", style: "pointer-events: none; font-weight: 600" });
    update();
  };

  const drawBars = (cook) => {
    const top = Math.max(...cook.filter(Number.isFinite), 0.1) * 1.08;
    bars.layer.replaceChildren();
    const strip = axes(bars.layer, { ...bars, xlim: [-1, x.length], ylim: [0, top], xlabel: "number of the point",
      ylabel: "Cook’s distance" });
    const width = Math.max(1.5, (0.65 * strip.width) / (x.length + 1));
    cook.forEach((value, i) => svg(strip.inside, "rect", { x: strip.x(i) - width / 2, y: strip.y(value || 0), width,
      height: strip.y(0) - strip.y(value || 0), fill: i === selected ? VERMILLION : BLUE }));
    bars.index = (position) => clamp(Math.round(-1 + ((position - bars.left) / bars.width) * (x.length + 1)),
      [0, x.length - 1]);
  };

  const update = () => {
    const fit = regress(x, y, data.prior_precision), i = selected;
    const without = { slope: fit.slope - fit.slopeChange[i], intercept: fit.intercept - fit.interceptChange[i] };
    const px = ax.x(x[i]), py = ax.y(y[i]), base = x.length > 100 ? 3 : 4.5;
    set(nodes.all, { d: across(ax, fit.intercept, fit.slope) });
    set(nodes.without, { d: Number.isFinite(without.slope) ? across(ax, without.intercept, without.slope) : "" });
    set(nodes.residual, { d: `M${px - 2},${py}V${ax.y(y[i] - fit.residual[i])}` });
    set(nodes.error, { d: Number.isFinite(fit.leftOut[i]) ? `M${px + 2},${py}V${ax.y(y[i] - fit.leftOut[i])}` : "" });
    nodes.points.forEach((node, k) => {
      const place = { cx: ax.x(x[k]), cy: ax.y(y[k]) };
      const size = base + 14 * Math.sqrt(Math.min(fit.cook[k] || 0, 2));
      set(node, { ...place, r: size, fill: k === i ? VERMILLION : BLUE, "fill-opacity": k === i ? 0.9 : 0.55 });
      set(nodes.hits[k], place);
    });
    const right = px < ax.left + ax.width / 2, away = 8 + Number(nodes.points[i].getAttribute("r"));
    set(nodes.label, { x: px + (right ? away : -away), y: py - 6, "text-anchor": right ? "start" : "end" });
    nodes.label.textContent = name(i);
    drawBars(fit.cook);
    select.value = i;
    fill([x[i], y[i], fit.leverage[i], fit.residual[i], fit.leftOut[i], fit.cook[i], fit.slope, without.slope,
      fit.slopeChange[i]]);
    root.dataset.state = JSON.stringify({ selected: i, x: x[i], y: y[i], intercept: fit.intercept, slope: fit.slope,
      intercept_without: without.intercept, slope_without: without.slope, leverage: fit.leverage[i],
      residual: fit.residual[i], loo_residual: fit.leftOut[i], cooks_distance: fit.cook[i],
      slope_change: fit.slopeChange[i] });
  };

  const choose = (i) => { selected = clamp(i, [0, x.length - 1]); update(); };
  const move = (newX, newY) => { x[selected] = clamp(newX, xlim); y[selected] = clamp(newY, ylim); update(); };
  const place = (event) => {  // position of the pointer in the units of the drawing
    const box = drawing.getBoundingClientRect(), scale = drawing.viewBox.baseVal.width / box.width;
    return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
  };
  let grip = null;  // from the pointer to the centre of the point that it holds
  drawing.addEventListener("pointerdown", (event) => {
    const [px, py] = place(event);
    if (py > bars.top - 24) return choose(bars.index(px));
    if (!event.target.dataset.hit) return;
    const distance = (k) => Math.hypot(ax.x(x[k]) - px, ax.y(y[k]) - py);
    choose(x.map((_, k) => k).reduce((best, k) => (distance(k) < distance(best) ? k : best)));
    grip = [ax.x(x[selected]) - px, ax.y(y[selected]) - py];
    drawing.setPointerCapture(event.pointerId);
  });
  // A finger on a point drags it; a finger anywhere else scrolls the page. Browsers do not heed
  // touch-action on a circle.
  drawing.addEventListener("touchstart", (event) => { if (event.target.dataset.hit) event.preventDefault(); },
    { passive: false });
  drawing.addEventListener("pointermove", (event) => {
    if (!grip) return;
    const [px, py] = place(event), u = (px + grip[0] - ax.left) / ax.width, v = (py + grip[1] - ax.top) / ax.height;
    move(xlim[0] + u * (xlim[1] - xlim[0]), ylim[1] - v * (ylim[1] - ylim[0]));
  });
  for (const end of ["pointerup", "pointercancel"]) drawing.addEventListener(end, () => { grip = null; });
  drawing.addEventListener("keydown", (event) => {
    const step = event.shiftKey ? 0.05 : 0.01, dx = step * (xlim[1] - xlim[0]), dy = step * (ylim[1] - ylim[0]);
    const act = { ArrowLeft: () => move(x[selected] - dx, y[selected]), ArrowRight: () => move(x[selected] + dx, y[selected]),
      ArrowUp: () => move(x[selected], y[selected] + dy), ArrowDown: () => move(x[selected], y[selected] - dy),
      PageUp: () => choose(selected - 1), PageDown: () => choose(selected + 1),
      Home: () => move(data.x[selected], data.y[selected]) }[event.key];
    if (!act) return;
    event.preventDefault();
    event.stopPropagation();  // a notebook would take the arrow for itself
    act();
  });
  select.addEventListener("change", () => choose(Number(select.value)));
  back.addEventListener("click", () => { x.splice(0, x.length, ...data.x); y.splice(0, y.length, ...data.y); choose(data.selected); });
  return layout;
});
