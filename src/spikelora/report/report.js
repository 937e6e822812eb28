// A hair over the figure of curves that is pointed at, and beside it what each curve has at that step. The keys left and
// right move it.
for (const svg of document.querySelectorAll("svg[data-curves]")) {
  const data = JSON.parse(svg.dataset.curves);
  const { box: [left, top, right, bottom], x: [x0, dx], y: [y0, dy], ticks, curves } = data;
  const steps = [...new Set(curves.flatMap(curve => curve.points.map(([x]) => x)))].sort((a, b) => a - b);
  if (!steps.length) continue;
  const readout = svg.parentElement.appendChild(document.createElement("output"));
  const marks = svg.appendChild(document.createElementNS(svg.namespaceURI, "g"));
  let chosen = -1;
  const draw = (name, attributes) => {
    const mark = marks.appendChild(document.createElementNS(svg.namespaceURI, name));
    for (const [key, value] of Object.entries(attributes)) mark.setAttribute(key, value);
  };
  const hide = () => { marks.replaceChildren(); readout.replaceChildren(); chosen = -1; };
  const show = index => {
    if (index === chosen) return;
    hide();
    chosen = index;
    const step = steps[index], at = x0 + step * dx;
    draw("line", { x1: at, x2: at, y1: top, y2: bottom, stroke: "currentColor", "stroke-width": 0.8 });
    readout.append(`${data.x_label} ${ticks ? ticks[step] : step.toLocaleString("en")}`);
    for (const { label, colour, points } of curves) {
      const point = points.findLast(([x]) => x === step);
      if (!point) continue;
      draw("circle", { cx: at, cy: y0 + point[1] * dy, r: 4, fill: colour });
      const row = readout.appendChild(document.createElement("span"));
      row.style.setProperty("--curve", colour);
      row.append(`${label} `, Object.assign(document.createElement("b"), { textContent: point[1] }));
    }
    const on = new DOMPoint(at, 0).matrixTransform(svg.getScreenCTM()).x - svg.parentElement.getBoundingClientRect().left;
    const isLeft = at > (left + right) / 2;
    readout.style.left = isLeft ? "auto" : `${on + 12}px`;
    readout.style.right = isLeft ? `${svg.parentElement.clientWidth - on + 12}px` : "auto";
  };
  const nearest = event => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse()).x;
    const off = steps.map(step => Math.abs(x0 + step * dx - at));
    show(off.indexOf(Math.min(...off)));
  };
  svg.tabIndex = 0;
  svg.addEventListener("pointermove", nearest);
  svg.addEventListener("pointerdown", nearest);
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", event => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by) return;
    event.preventDefault();
    show(Math.min(Math.max(chosen + by, 0), steps.length - 1));
  });
}
