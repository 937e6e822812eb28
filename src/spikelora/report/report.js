// The figures of curves: a hair that reads the curves at a step, a legend of buttons that switch them off, and a range of
// steps and a smoothing for all figures over steps. matplotlib's own elements are moved, so that each curve keeps its looks.
const form = document.querySelector(".controls");
const key = `spikelora report ${location.pathname}`;
const state = { from: "", to: "", smoothing: 0, off: [] };
const figures = [];

const change = changes => {
  Object.assign(state, changes);
  try { sessionStorage.setItem(key, JSON.stringify(state)); } catch {}  // a browser may forbid it
  for (const update of figures) update();
};
const toggle = name => change({ off: state.off.includes(name) ? state.off.filter(n => n !== name) : [...state.off, name] });
const isOn = name => !state.off.includes(name);
const number = text => text === "" || isNaN(text) ? null : Number(text);

// The values as a mean that forgets, each weighed `weight` times as much as the next, as TensorBoard has it.
const smoothed = (points, weight) => {
  let mean = 0, mass = 0;
  return points.map(([x, y]) => {
    if (y === null) return [x, y];
    mean = weight * mean + (1 - weight) * y;
    mass = weight * mass + 1 - weight;
    return [x, mean / mass];
  });
};
// Where zero lies, and how long one is, if low to high fills the way from start to end but for a margin.
const fit = (low, high, start, end) => {
  if (low === high) [low, high] = [low - (Math.abs(low) / 10 || 0.5), high + (Math.abs(high) / 10 || 0.5)];
  const one = (end - start) / (1.1 * (high - low));
  return [start - (low - 0.05 * (high - low)) * one, one];
};
const round = (low, high, smallest) => {
  const least = (high - low) / 8, power = 10 ** Math.floor(Math.log10(least));
  const step = Math.max(smallest, power * [1, 2, 5, 10].find(n => n * power >= least));
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  const first = Math.ceil(low / step);
  return Array.from({ length: Math.floor(high / step) - first + 1 }, (_, n) => ((first + n) * step).toFixed(digits));
};

for (const svg of document.querySelectorAll("svg[data-curves]")) {
  const data = JSON.parse(svg.dataset.curves);
  const { box: [left, top, right, bottom], ticks, curves } = data;
  const create = (parent, name, attributes) => {
    const made = parent.appendChild(document.createElementNS(svg.namespaceURI, name));
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  };
  const frame = svg.parentElement, figure = svg.closest("figure"), name = svg.querySelector("[id]").id;
  const readout = frame.appendChild(document.createElement("output"));
  const groups = [...svg.querySelectorAll('[id*="-curve-"]')];
  const grid = create(groups[0].parentElement, "g", {}), marks = create(svg, "g", {});
  groups[0].before(grid);
  let shown = [], steps = [], x, y, chosen = -1, start = null;

  const legend = document.createElement("div");
  legend.className = "legend";
  figure.querySelector("figcaption").before(legend);
  svg.querySelector('[id$="-legend_1"]').remove();
  svg.setAttribute("viewBox", `0 0 ${svg.viewBox.baseVal.width} ${data.height}`);
  curves.forEach((curve, index) => {
    const group = groups[index], line = group.querySelector("path:not(defs path)"), markers = [...group.querySelectorAll("use")];
    const raw = line.cloneNode();
    raw.style.opacity = 0.35;
    Object.assign(curve, { group, line, markers, raw, name: `${name} ${curve.label}` });
    const button = legend.appendChild(Object.assign(document.createElement("button"), { type: "button" }));
    const sample = create(button, "svg", { viewBox: "0 0 28 10", "aria-hidden": true });
    create(sample, "path", { d: "M1 5h26", style: line.getAttribute("style") });
    if (markers.length) {
      const shape = sample.appendChild(markers[0].cloneNode());
      shape.setAttribute("x", 14);
      shape.setAttribute("y", 5);
    }
    button.append(curve.label);
    button.addEventListener("click", () => toggle(curve.name));
    curve.button = button;
  });

  const axis = (isX, labels, position) => {
    const letter = isX ? "x" : "y", own = svg.querySelectorAll(`[id*="-${letter}tick_"]`);
    for (const tick of own) tick.style.display = labels ? "none" : "";
    for (const label of labels ?? []) {
      const at = position(Number(label));
      create(grid, "path", { d: isX ? `M${at} ${top}V${bottom}` : `M${left} ${at}H${right}`, stroke: "var(--line)", "stroke-width": 0.6 });
      create(grid, "path", { d: isX ? `M${at} ${bottom}v3.5` : `M${left} ${at}h-3.5`, stroke: "currentColor", "stroke-width": 0.8 });
      const text = grid.appendChild(own[0].querySelector("text").cloneNode());
      text.removeAttribute("transform");
      text.setAttribute(letter, isX ? at : at + 3.8);
      text.textContent = label.replace("-", "−");
    }
  };
  const path = points => points
    .map(([px, py], n) => py === null ? "" : `${n && points[n - 1][1] !== null ? "L" : "M"}${x[0] + px * x[1]} ${y[0] + py * y[1]}`)
    .join("");
  figures.push(() => {
    hide();
    const ofRuns = curves.filter(({ run }) => isOn(`run ${run}`));
    svg.closest(".figure").hidden = !ofRuns.length;
    shown = ofRuns.filter(curve => isOn(curve.name));
    const all = curves.flatMap(curve => curve.points.map(([px]) => px));
    const from = ticks ? null : number(state.from), to = ticks ? null : number(state.to);
    const [low, high] = [from ?? Math.min(...all), to ?? Math.max(...all)].sort((a, b) => a - b);
    for (const curve of curves) {
      curve.smooth = !ticks && state.smoothing > 0 ? smoothed(curve.points, state.smoothing) : curve.points;
    }
    const inside = shown.flatMap(({ points, smooth }) => [...points, ...smooth]).filter(([px, py]) => px >= low && px <= high && py !== null);
    const isPart = from !== null || to !== null, values = inside.map(([, py]) => py);
    steps = [...new Set(inside.map(([px]) => px))].sort((a, b) => a - b);
    x = isPart ? fit(low, high, left, right) : data.x;
    const isRefit = values.length && (isPart || shown.length < curves.length);
    y = isRefit ? fit(Math.min(...values), Math.max(...values), bottom, top) : data.y;
    grid.replaceChildren();
    const ends = ([zero, one], a, b) => [(a - zero) / one, (b - zero) / one];
    axis(true, isPart ? round(...ends(x, left, right), 1) : null, px => x[0] + px * x[1]);
    axis(false, isRefit ? round(...ends(y, bottom, top), 0) : null, py => y[0] + py * y[1]);
    for (const curve of curves) {
      const { group, line, markers, raw, points, smooth } = curve;
      line.setAttribute("d", path(smooth));
      if (smooth !== points) {
        raw.setAttribute("d", path(points));
        line.before(raw);
      } else raw.remove();
      const marked = smooth.filter(([, py], n) => n % curve.every === 0 && py !== null);
      markers.forEach((marker, n) => {
        marker.setAttribute("x", x[0] + marked[n][0] * x[1]);
        marker.setAttribute("y", y[0] + marked[n][1] * y[1]);
      });
      group.style.display = shown.includes(curve) ? "" : "none";
      curve.button.hidden = !ofRuns.includes(curve);
      curve.button.ariaPressed = isOn(curve.name);
    }
  });

  const hide = () => { marks.replaceChildren(); readout.replaceChildren(); chosen = -1; };
  const show = index => {
    if (index === chosen || index < 0) return;
    hide();
    chosen = index;
    const step = steps[index], at = x[0] + step * x[1];
    create(marks, "line", { x1: at, x2: at, y1: top, y2: bottom, stroke: "currentColor", "stroke-width": 0.8 });
    readout.append(`${data.x_label} ${ticks ? ticks[step] : step.toLocaleString("en")}`);
    for (const { label, colour, points, smooth } of shown) {
      const place = points.findLastIndex(([px]) => px === step);
      if (place < 0) continue;
      const value = points[place][1], mean = smooth[place][1];
      if (value !== null) create(marks, "circle", { cx: at, cy: y[0] + mean * y[1], r: 4, fill: colour });
      const row = readout.appendChild(document.createElement("span"));
      row.style.setProperty("--curve", colour);
      row.append(`${label} `, Object.assign(document.createElement("b"), { textContent: value ?? "not finite" }));
      if (value !== null && smooth !== points) row.append(` smoothed ${Number(mean.toPrecision(5))}`);
    }
    const on = new DOMPoint(at, 0).matrixTransform(svg.getScreenCTM()).x - frame.getBoundingClientRect().left;
    const isLeft = at > (left + right) / 2;
    readout.style.left = isLeft ? "auto" : `${on + 12}px`;
    readout.style.right = isLeft ? `${frame.clientWidth - on + 12}px` : "auto";
  };
  const across = event => new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse()).x;
  const nearest = event => {
    const at = across(event), off = steps.map(step => Math.abs(x[0] + step * x[1] - at));
    show(off.indexOf(Math.min(...off)));
    if (start === null) return;
    marks.querySelector("rect")?.remove();
    create(marks, "rect", {
      x: Math.min(at, start), width: Math.abs(at - start), y: top, height: bottom - top, fill: "currentColor", opacity: 0.15,
    });
  };
  svg.tabIndex = 0;
  svg.addEventListener("pointermove", nearest);
  svg.addEventListener("pointerdown", event => {
    if (!ticks && event.pointerType === "mouse" && event.button === 0) {
      start = across(event);
      svg.setPointerCapture(event.pointerId);
      event.preventDefault();  // no text is selected
    }
    nearest(event);
  });
  svg.addEventListener("pointerup", event => {
    if (start === null) return;
    const ends = [start, across(event)].sort((a, b) => a - b), isDrag = ends[1] - ends[0] > 5;
    start = null;
    marks.querySelector("rect")?.remove();
    const [from, to] = ends.map(at => (at - x[0]) / x[1]);
    const within = steps.filter(step => step >= from && step <= to);
    if (isDrag && within.length) set({ from: within[0], to: within.at(-1) });
  });
  svg.addEventListener("dblclick", () => { if (!ticks) set({ from: "", to: "" }); });
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", event => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by) return;
    event.preventDefault();
    show(Math.min(Math.max(chosen + by, 0), steps.length - 1));
  });
}

const set = changes => {
  for (const [name, value] of Object.entries(changes)) form.elements[name].value = value;
  change(changes);
};
try { Object.assign(state, JSON.parse(sessionStorage.getItem(key))); } catch {}
if (form) {
  for (const name of ["from", "to", "smoothing"]) form.elements[name].value = state[name];
  const runs = form.querySelectorAll("input[type=checkbox]");
  const check = () => { for (const box of runs) box.checked = isOn(`run ${box.value}`); };
  check();
  form.hidden = false;
  form.addEventListener("submit", event => event.preventDefault());
  form.addEventListener("input", event => {
    const { name, value, type } = event.target;
    if (type === "checkbox") toggle(`run ${value}`);
    else change({ [name]: name === "smoothing" ? Number(value) : value });
  });
  form.addEventListener("reset", event => {
    event.preventDefault();
    change({ off: [] });
    set({ from: "", to: "", smoothing: 0 });
    check();
  });
}
change({});

// The page of a run that goes on loads itself again, but not under the hands of someone who is setting it.
const live = document.querySelector("[data-refresh]");
if (live) {
  let touched = 0;
  for (const kind of ["input", "pointerdown"]) addEventListener(kind, () => { touched = Date.now(); });
  setInterval(() => {
    if (Date.now() - touched > 1000 * live.dataset.refresh) location.reload();
  }, 1000 * live.dataset.refresh);
}
