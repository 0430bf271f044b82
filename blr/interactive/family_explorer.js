// One-parameter families with T(θ) = θ. Each has A(λ), its slope μ, its curvature F, the dual A*(μ),
// the base measure h(θ), the entropy H, and the windows through which it is seen.
const xlogx = (value) => (value > 0 ? value * Math.log(value) : 0);
const logFactorial = (n) => { let total = 0; for (let k = 2; k <= n; k++) total += Math.log(k); return total; };
const families = {
  Bernoulli: {
    A: (l) => Math.max(l, 0) + Math.log1p(Math.exp(-Math.abs(l))), mu: (l) => 1 / (1 + Math.exp(-l)),
    F: (l) => 1 / (2 + Math.exp(l) + Math.exp(-l)), dual: (m) => xlogx(m) + xlogx(1 - m),
    H: (l, m) => -xlogx(m) - xlogx(1 - m), logh: () => 0, range: [-4, 4], lamlim: [-4.2, 4.2], Alim: [-0.8, 4.4], mulim: [0, 1],
    duallim: [-0.8, 0.12], outcomes: [0, 1], thetalim: [-0.5, 1.5], qlim: [0, 1.05],
    text: "A(λ) = log(1 + exp λ),  A*(μ) = μ log μ + (1 − μ) log(1 − μ) = −H(q).  λ is the log-odds." },
  Poisson: {
    A: (l) => Math.exp(l), mu: (l) => Math.exp(l), F: (l) => Math.exp(l), dual: (m) => xlogx(m) - m,
    H: (l, m) => { let sum = 0;
      for (let n = 0; n < 80; n++) { const log = l * n - m - logFactorial(n); sum -= Math.exp(log) * log; }
      return sum; },
    logh: (n) => -logFactorial(n), range: [-2, 2.3], lamlim: [-2.2, 2.5], Alim: [-3, 11], mulim: [0, 10.5], duallim: [-3, 15],
    outcomes: Array.from({ length: 21 }, (_, n) => n), thetalim: [-0.7, 20.7], qlim: [0, 0.95],
    text: "A(λ) = exp λ,  A*(μ) = μ log μ − μ = −H(q) + E[log θ!], since h(θ) = 1/θ!.  λ is the log-rate." },
  Exponential: {
    A: (l) => -Math.log(-l), mu: (l) => -1 / l, F: (l) => 1 / (l * l), dual: (m) => -1 - Math.log(m),
    H: (l, m) => 1 + Math.log(m), logh: () => 0, range: [-2, -0.25], lamlim: [-2.2, 0.2], Alim: [-1.1, 2.1], mulim: [0, 4.3],
    duallim: [-2.6, 1.2], curve: [0, 10], thetalim: [0, 10], qlim: [0, 2.1],
    text: "A(λ) = −log(−λ),  A*(μ) = −1 − log μ = −H(q).  λ is minus the rate, so λ < 0." },
  "Gaussian, variance 2": {
    A: (l) => l * l, mu: (l) => 2 * l, F: () => 2, dual: (m) => (m * m) / 4,
    H: () => 0.5 * Math.log(4 * Math.PI * Math.E), logh: (t) => -(t * t) / 4 - 0.5 * Math.log(4 * Math.PI),
    range: [-2, 2], lamlim: [-2.2, 2.2], Alim: [-1.6, 4.4], mulim: [-4.4, 4.4], duallim: [-1.6, 4.4], curve: [-8, 8],
    thetalim: [-8, 8], qlim: [0, 0.33],
    text: "A(λ) = λ²,  A*(μ) = μ²/4 = −H(q) − E[log h(θ)], since h is N(θ; 0, 2).  λ is half the mean." },
};

start("family_explorer", (root, live, data) => {
  const controls = html(live, "div", { class: "blr-controls" });
  const select = html(html(controls, "label", {}, "Family"), "select");
  Object.keys(families).forEach((name) => html(select, "option", { value: name }, name));
  const label = html(controls, "div", { class: "blr-wide" }, "λ =");
  const shown = html(label, "output", { style: `color: ${BLUE}; min-width: 3.2em` });
  const slider = html(label, "input", { type: "range", step: 0.01, "aria-label": "natural parameter λ" });
  legend(live, [[VERMILLION, "solid", "tangent of A, slope μ"], [BLUE, "solid", "tangent of A*, slope λ"],
    [GREEN, "dashed", "parabola of curvature F at λ"]]);
  const drawing = svg(live, "svg", { role: "img" });
  const formula = html(live, "p", { style: "margin-top: 6px" });
  const fill = table(live, [["natural parameter λ", BLUE], ["expectation parameter μ = A′(λ), the mean of θ", VERMILLION],
    ["log-partition A(λ)"], ["dual A*(μ) = λμ − A(λ)"], ["entropy H(q)"],
    ["Fisher information F = A″(λ), the variance of θ", GREEN]]);
  let family, panels, moving;

  // Curve of f over [low, high] in the axes.
  const curve = (ax, f, [low, high]) => path(Array.from({ length: 161 }, (_, k) => {
    const value = low + ((high - low) * k) / 160;
    return [ax.x(value), ax.y(f(value))];
  }));
  const line = (ax, more) => svg(ax.inside, "path", { fill: "none", "stroke-width": 2.5, ...more });

  const layout = (width) => {
    drawing.replaceChildren();
    const columns = width < 620 ? 1 : 3, left = 56, gap = 14, cell = width / columns;
    const box = { width: cell - left - gap, height: columns === 1 ? 170 : Math.min(220, cell * 0.8) };
    const tall = box.height + 78, f = family;
    set(drawing, { viewBox: `0 0 ${width} ${columns === 1 ? 3 * tall : tall}` });
    const at = (k) => (columns === 1 ? { left, top: 26 + k * tall, ...box } : { left: left + k * cell, top: 26, ...box });
    const q = axes(drawing, { ...at(0), xlim: f.thetalim, ylim: f.qlim, xlabel: "θ", ylabel: "q(θ)",
      xticks: f.outcomes?.length === 2 ? f.outcomes : undefined });
    const A = axes(drawing, { ...at(1), xlim: f.lamlim, ylim: f.Alim, xlabel: "λ",
      ylabel: "A(λ)" });
    const dual = axes(drawing, { ...at(2), xlim: f.mulim, ylim: f.duallim, xlabel: "μ",
      ylabel: "A*(μ)" });
    panels = { q, A, dual };
    const marker = (ax, color) => line(ax, { stroke: color, "stroke-width": 1.5, "stroke-dasharray": "3 4" });
    moving = { theta: marker(q, VERMILLION), lambda: marker(A, BLUE), mu: marker(dual, VERMILLION) };
    line(A, { stroke: GREY, d: curve(A, f.A, [f.lamlim[0], f.range[1] < 0 ? -1e-3 : f.lamlim[1]]) });
    line(dual, { stroke: GREY, d: curve(dual, f.dual, [f.mulim[0] || 1e-6, f.mulim[1]]) });
    moving.parabola = line(A, { stroke: GREEN, "stroke-dasharray": "7 4", "stroke-width": 2 });
    moving.tangentA = line(A, { stroke: VERMILLION });
    moving.tangentDual = line(dual, { stroke: BLUE });
    moving.density = line(q, { stroke: GREY });
    moving.stems = f.outcomes ? f.outcomes.map(() => svg(q.inside, "line", { stroke: GREY, "stroke-width": 4 })) : [];
    const dot = (more) => svg(drawing, "circle", { r: 6, fill: GREY, stroke: "white", "stroke-width": 1.5, ...more });
    moving.onA = dot();
    moving.onDual = dot();
    moving.intercept = svg(A.inside, "circle", { r: 4.5, fill: "white", stroke: VERMILLION, "stroke-width": 2 });
    update();
  };

  const update = () => {
    const f = family, lam = Number(slider.value), mu = f.mu(lam), A = f.A(lam), F = f.F(lam), dual = f.dual(mu);
    const H = f.H(lam, mu), q = (theta) => Math.exp(f.logh(theta) + lam * theta - A), p = panels;
    if (f.outcomes) f.outcomes.forEach((theta, k) => set(moving.stems[k],
      { x1: p.q.x(theta), x2: p.q.x(theta), y1: p.q.y(0), y2: p.q.y(q(theta)) }));
    else set(moving.density, { d: curve(p.q, q, f.curve) });
    const upright = (ax, at) => ({ d: `M${ax.x(at)},${ax.top}V${ax.top + ax.height}` });
    set(moving.theta, upright(p.q, mu));
    set(moving.lambda, upright(p.A, lam));
    set(moving.mu, upright(p.dual, mu));
    set(moving.tangentA, { d: across(p.A, -dual, mu) });
    set(moving.tangentDual, { d: across(p.dual, -A, lam) });
    set(moving.parabola, { d: curve(p.A, (l) => A + mu * (l - lam) + 0.5 * F * (l - lam) ** 2, p.A.xlim) });
    set(moving.onA, { cx: p.A.x(lam), cy: p.A.y(A) });
    set(moving.onDual, { cx: p.dual.x(mu), cy: p.dual.y(dual) });
    set(moving.intercept, { cx: p.A.x(0), cy: p.A.y(-dual) });
    shown.textContent = lam.toFixed(2).replace("-", "−");
    slider.setAttribute("aria-valuetext", `λ = ${lam.toFixed(2)}, μ = ${format(mu)}`);
    set(drawing, { "aria-label": `${select.value} with λ = ${format(lam)} and mean μ = ${format(mu)}: the density, ` +
      `the log-partition function with its tangent of slope μ, and its dual with the tangent of slope λ` });
    fill([lam, mu, A, dual, H, F]);
    root.dataset.state = JSON.stringify({ family: select.value, natural: lam, expectation: mu, log_partition: A,
      dual, entropy: H, fisher: F });
  };

  const choose = (lam) => {
    family = families[select.value];
    const [min, max] = family.range;
    set(slider, { min, max });
    slider.value = lam ?? (min + max) / 2 + 0.2 * (max - min);
    formula.textContent = family.text;
  };
  select.value = data.family;
  choose(data.natural);
  const relayout = () => layout(live.clientWidth || 640);
  select.addEventListener("change", () => { choose(); relayout(); });
  slider.addEventListener("input", update);
  slider.addEventListener("keydown", (event) => event.stopPropagation());
  return layout;
});
