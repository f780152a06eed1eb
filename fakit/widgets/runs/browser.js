// The page of the run browser: draws what Python says in `view`, and sets the traits that a person changes. It decides nothing by itself.

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 410, HEIGHT = 300;  // px of a figure
const BOX = { left: 58, right: 398, top: 26, bottom: 256 };  // its plot area
const DASHES = { solid: "", dash: "7 3", dot: "2 3", dashdot: "8 3 2 3", longdash: "11 4" };
const SYMBOLS = {  // around 0, 0, about 5 px in radius
  circle: "M5 0A5 5 0 1 1 -5 0A5 5 0 1 1 5 0Z", diamond: "M0 -6.5L6.5 0L0 6.5L-6.5 0Z", square: "M-4.5 -4.5H4.5V4.5H-4.5Z",
  "triangle-up": "M0 -6L5.8 4.5H-5.8Z", cross: "M-2 -6H2V-2H6V2H2V6H-2V2H-6V-2H-2Z",
  "triangle-down": "M0 6L5.8 -4.5H-5.8Z", x: "M-6 -3.5L-3.5 -6L0 -2.5L3.5 -6L6 -3.5L2.5 0L6 3.5L3.5 6L0 2.5L-3.5 6L-6 3.5L-2.5 0Z",
};

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function svgElement(tag, attributes = {}, text = "") {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text) made.textContent = text;
  return made;
}

const px = value => BOX.left + value * (BOX.right - BOX.left);
const py = value => BOX.bottom - value * (BOX.bottom - BOX.top);

function axes(drawing, x, y) {
  for (const [place, text] of x.ticks ?? []) {
    drawing.append(svgElement("line", { class: "grid", x1: px(place), x2: px(place), y1: BOX.top, y2: BOX.bottom }));
    drawing.append(svgElement("text", { x: px(place), y: BOX.bottom + 16, "text-anchor": "middle" }, text));
  }
  for (const [place, text] of y.ticks ?? []) {
    drawing.append(svgElement("line", { class: "grid", x1: BOX.left, x2: BOX.right, y1: py(place), y2: py(place) }));
    drawing.append(svgElement("text", { x: BOX.left - 6, y: py(place) + 4, "text-anchor": "end" }, text));
  }
  drawing.append(svgElement("path", { class: "axis", d: `M${BOX.left} ${BOX.top}V${BOX.bottom}H${BOX.right}` }));
  drawing.append(svgElement("text", { x: (BOX.left + BOX.right) / 2, y: BOX.bottom + 36, "text-anchor": "middle" }, x.label ?? ""));
  drawing.append(svgElement("text", { class: "heading", x: BOX.left, y: 14 }, y.label ?? ""));
}

export function render({ model, el }) {
  const root = element("div", { class: "fakit-run-browser" });
  const groups = Object.fromEntries(["task", "arms", "curve", "cost"].map(name => [name, element("div", { class: "group", role: "group", "aria-label": name })]));
  const curves = svgElement("svg", { width: WIDTH, height: HEIGHT, role: "img", "aria-label": "curves of the runs" });
  const front = svgElement("svg", { width: WIDTH, height: HEIGHT, role: "img", "aria-label": "cost against quality" });
  const figure = (drawing, choices) => element("div", { class: "figure" }, drawing, choices);
  const status = element("div", { class: "status", role: "status", "aria-live": "polite" });
  const all = element("button", { type: "button" }, "choose all shown");
  const none = element("button", { type: "button" }, "clear the choice");
  const head = element("tr");
  const body = element("tbody");
  const table = element("table", {}, element("thead", {}, head), body);
  const frame = element("div", { class: "table", tabindex: "0", role: "region", "aria-label": "table of runs" }, table);
  root.append(
    groups.task, groups.arms,
    element("div", { class: "figures" }, figure(curves, groups.curve), figure(front, groups.cost)),
    element("div", { class: "line" }, status, all, none), frame,
  );
  el.append(root);

  const set = changes => {
    for (const [name, value] of Object.entries(changes)) model.set(name, value);
    model.save_changes();
  };
  const toggle = id => {
    const selected = model.get("selected");
    set({ selected: selected.includes(id) ? selected.filter(other => other !== id) : [...selected, id] });
  };
  all.addEventListener("click", () => set({ selected: [...new Set([...model.get("selected"), ...model.get("view").rows.map(row => row.id)])] }));
  none.addEventListener("click", () => set({ selected: [] }));

  // the run under the pointer, or whose box has the focus, stands out everywhere
  const point = id => root.querySelectorAll("[data-run]").forEach(one => one.classList.toggle("pointed", one.dataset.run === id));
  root.addEventListener("pointerover", event => point(event.target.closest("[data-run]")?.dataset.run));
  root.addEventListener("focusin", event => point(event.target.closest("[data-run]")?.dataset.run));

  // buttons are made once and changed in place, or a person at the keyboard would lose her place at every answer
  function buttons(group, wanted, pressed, press, label = "") {
    const names = wanted.map(one => one.name).join("\n");
    if (group.dataset.names !== names) {
      group.dataset.names = names;
      group.replaceChildren(...(label ? [element("span", { class: "label" }, label)] : []));
      for (const { name, label: text = name, symbol, color } of wanted) {
        const button = element("button", { type: "button" });
        button.dataset.name = name;
        if (symbol) {
          const mark = svgElement("svg", { width: 16, height: 14, viewBox: "-8 -7 16 14", "aria-hidden": "true" });
          mark.append(svgElement("path", { d: SYMBOLS[symbol] ?? SYMBOLS.circle, fill: color, stroke: "#fff", "stroke-width": 1 }));
          button.append(mark);
        }
        button.append(text);
        button.addEventListener("click", () => press(name));
        group.append(button);
      }
    }
    for (const button of group.querySelectorAll("button")) button.setAttribute("aria-pressed", String(pressed(button.dataset.name)));
  }

  function header(view) {
    const names = view.columns.map(column => `${column.name}\t${column.label}`).join("\n");
    if (head.dataset.names !== names) {
      head.dataset.names = names;
      head.replaceChildren(element("th", { scope: "col" }, "chosen"));
      for (const { name, label } of view.columns) {
        const button = element("button", { type: "button" }, label, element("span", { class: "arrow", "aria-hidden": "true" }));
        button.addEventListener("click", () => set(model.get("sort") === name ? { descending: !model.get("descending") } : { sort: name }));
        const cell = element("th", { scope: "col" }, button);
        cell.dataset.name = name;
        head.append(cell);
      }
    }
    for (const cell of head.querySelectorAll("[data-name]")) {
      const by = cell.dataset.name === model.get("sort"), down = model.get("descending");
      cell.setAttribute("aria-sort", by ? (down ? "descending" : "ascending") : "none");
      cell.querySelector(".arrow").textContent = by ? (down ? " ▼" : " ▲") : "";
    }
  }

  const rows = new Map();  // run id → its row, kept so that the focus stays
  function row({ id, arm, seed, cells }) {
    const box = element("input", { type: "checkbox", "aria-label": `choose ${arm}, seed ${seed}` });
    box.addEventListener("change", () => toggle(id));
    const made = element("tr", {}, element("td", {}, box), ...cells.map(text => element("td", {}, text)));
    made.dataset.run = id;
    made.addEventListener("click", event => { if (event.target !== box) toggle(id); });
    return made;
  }

  function fill(view, selected) {
    const kept = document.activeElement?.closest?.("[data-run]")?.dataset.run;
    const wanted = view.rows.map(one => {
      const key = `${one.id}\n${one.cells.join("\t")}`;
      if (!rows.has(key)) rows.set(key, row(one));
      return rows.get(key);
    });
    if (wanted.length !== body.children.length || wanted.some((one, place) => body.children[place] !== one)) {
      body.replaceChildren(...wanted);
      const again = wanted.find(one => one.dataset.run === kept);
      if (kept !== undefined && again && el.contains(again)) again.querySelector("input").focus();
    }
    for (const one of wanted) {
      const chosen = selected.includes(one.dataset.run);
      one.querySelector("input").checked = chosen;
      one.classList.toggle("chosen", chosen);
    }
  }

  function draw() {
    const view = model.get("view"), selected = model.get("selected");
    const style = Object.fromEntries(view.arms.map(one => [one.name, one]));
    const arm = Object.fromEntries(view.rows.map(one => [one.id, one.arm]));
    const title = Object.fromEntries(view.rows.map(one => [one.id, `${one.arm}, seed ${one.seed}`]));
    const some = view.rows.some(one => selected.includes(one.id));
    const look = id => (selected.includes(id) ? "run chosen" : some ? "run faded" : "run");
    const mark = (drawing, id, parts) => {
      const group = svgElement("g", { class: look(id) });
      group.dataset.run = id;
      group.append(svgElement("title", {}, title[id]), ...parts);
      group.addEventListener("click", () => toggle(id));
      drawing.append(group);
    };
    const last = (a, b) => selected.includes(a.id) - selected.includes(b.id);  // the chosen are drawn on top

    buttons(groups.task, view.tasks.map(name => ({ name })), name => name === model.get("task"), name => set({ task: name }), "task");
    buttons(groups.arms, view.arms, name => model.get("arms").includes(name), name => {
      const shown = model.get("arms");
      set({ arms: view.arms.map(one => one.name).filter(one => (one === name ? !shown.includes(one) : shown.includes(one))) });
    }, "arms");
    buttons(groups.curve, view.curves, name => name === model.get("curve"), name => set({ curve: name }), "curve");
    buttons(groups.cost, view.costs, name => name === model.get("cost"), name => set({ cost: name }), "cost");

    curves.replaceChildren();
    axes(curves, view.lines.x, view.lines.y);
    for (const { id, points } of [...view.lines.lines].sort(last)) {
      const d = points.map(([x, y], i) => `${i ? "L" : "M"}${px(x).toFixed(1)} ${py(y).toFixed(1)}`).join("");
      const { color, dash } = style[arm[id]];
      mark(curves, id, [svgElement("path", { class: "reach", d }), svgElement("path", { class: "curve", d, stroke: color, "stroke-dasharray": DASHES[dash] ?? "" })]);
    }
    front.replaceChildren();
    axes(front, view.points.x, view.points.y);
    const steps = view.points.front.map(([x, y], i, all) => (i ? `H${px(x)}V${py(y)}` : `M${px(x)} ${py(y)}`)).join("");
    if (steps) front.append(svgElement("path", { class: "front", d: steps }));
    for (const { id, x, y } of [...view.points.points].sort(last)) {
      const { color, symbol } = style[arm[id]];
      const place = `translate(${px(x)} ${py(y)})`;
      mark(front, id, [svgElement("path", { class: "point", d: SYMBOLS[symbol] ?? SYMBOLS.circle, fill: color, transform: place })]);
    }
    for (const [drawing, missing] of [[curves, view.lines.missing], [front, view.points.missing]]) {
      if (missing) drawing.append(svgElement("text", { class: "missing", x: BOX.right, y: 14, "text-anchor": "end" }, `${missing} without this record`));
    }
    header(view);
    fill(view, selected);
    if (status.textContent !== view.sentence) status.textContent = view.sentence;
  }

  model.on("change:view", draw);
  draw();
  return () => model.off("change:view", draw);
}
