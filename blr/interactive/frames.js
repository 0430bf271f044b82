// Pictures drawn at execution, switched by a slider.
start("frames", (root, live, data, still) => {
  const frames = data.frames, label = html(live, "div", { class: "blr-wide" }, `${data.name} =`);
  const value = html(label, "output"), slider = html(label, "input",
    { type: "range", min: 0, max: frames.length - 1, step: 1, value: data.start, "aria-label": data.name });
  frames[data.start].src = still.src;
  const show = () => {
    const frame = frames[slider.value];
    set(still, { src: frame.src, alt: frame.alt });
    value.textContent = frame.value;
    slider.setAttribute("aria-valuetext", `${data.name} = ${frame.value}`);
    root.dataset.state = JSON.stringify({ index: Number(slider.value), value: frame.value });
  };
  slider.addEventListener("input", show);
  slider.addEventListener("keydown", (event) => event.stopPropagation());
  show();
});
