// The page of the mapping board: draws what Python says, and asks Python for changes. It decides nothing by itself.

const SVG = "http://www.w3.org/2000/svg";
const TOP = 30;  // px above layer 0: the columns' headings
const LEFT = 96, RIGHT = 300;  // px: where links begin and end; the buttons lie outside, label and mark
const DRAG = 6;  // px of movement that make a press a drag

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function svgElement(tag, attributes) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

export function render({ model, el }) {
  const setup = model.get("setup");
  const depth = { S: setup.student_layers, T: setup.teacher_layers };
  const longest = Math.max(depth.S, depth.T);
  const step = Math.min(42, Math.max(18, Math.round(300 / longest)));  // px from layer to layer of the deeper model
  const height = TOP + longest * step + 24;
  const y = (side, layer) => TOP + 12 + layer * step * longest / depth[side];
  let picked = null;  // {side, layer}: waits for its partner
  let focus = { side: "S", layer: Math.min(1, depth.S) };

  // -- the parts ------------------------------------------------------------------------------------------------------
  const ask = (what, more = {}) => model.send({ ask: what, ...more });
  const drawing = svgElement("svg", { width: LEFT + RIGHT, height, "aria-hidden": "true" });
  const links = svgElement("g", {});
  const thread = svgElement("path", { class: "thread" });  // follows a drag
  drawing.append(links, thread);
  const stage = element("div", { class: "stage", style: `height:${height}px` }, drawing);
  const nodes = { S: [], T: [] };
  for (const side of ["S", "T"]) {
    const name = side === "S" ? "student" : "teacher";
    const column = element("div", { class: `column ${name}`, role: "group", "aria-label": `${name} layers` });
    column.append(element("div", { class: "heading", "aria-hidden": "true" }, name));
    for (let layer = 0; layer <= depth[side]; layer++) {
      const node = element("button", { class: "node", type: "button", tabindex: "-1", style: `top:${y(side, layer)}px` });
      node.dataset.side = side;
      node.dataset.layer = layer;
      const parts = [element("span", { class: "alike" }), element("span", { class: "name" }, `${side}${layer}`), element("span", { class: "mark" })];
      node.append(...(side === "S" ? parts : parts.reverse()));
      node.addEventListener("click", () => pick(side, layer));
      node.addEventListener("focus", () => { focus = { side, layer }; draw(); });
      nodes[side].push(node);
      column.append(node);
    }
    stage.append(column);
  }
  const presets = element("div", { class: "presets", role: "group", "aria-label": "presets" });
  const preset = Object.fromEntries(setup.presets.map(name => [name, element("button", { type: "button" }, name.replaceAll("_", " "))]));
  for (const [name, button] of Object.entries(preset)) {
    const target = () => (name === "all_to_one" && picked?.side === "T" ? { teacher_layer: picked.layer } : {});
    button.addEventListener("click", () => { const more = target(); picked = null; ask("choose", { preset: name, ...more }); });
    presets.append(button);
  }
  const undo = element("button", { type: "button", class: "undo" }, "undo");
  undo.addEventListener("click", () => ask("undo"));
  presets.append(undo);
  const status = element("p", { class: "status", role: "status", "aria-live": "polite" });
  const refusal = element("p", { class: "refusal", role: "alert" });
  const notes = element("ul", { class: "notes", "aria-label": "what to know about this map" });
  const alike = element("ul", { class: "pairs", "aria-label": "similarity of the pairs" });
  const cost = element("ul", { class: "cost" });
  const keys = element("p", { class: "keys" },
    "Click a student layer, then a teacher layer, or drag: connected; again: disconnected. Keys: arrows move, Enter or Space picks and " +
    "connects, Escape lets go, Delete takes a layer’s links away, Ctrl+Z undoes. A picked teacher layer is the one of “all to one”.");
  const side = element("div", { class: "told" }, presets, status, refusal, notes);
  if (setup.similarity) side.append(element("h4", {}, "Similarity of the pairs"), alike);
  side.append(element("h4", {}, setup.step), cost);
  if (setup.refused) side.append(element("p", { class: "keys" }, setup.refused));
  const root = element("div", { class: "fakit-mapping-board", role: "group", "aria-label": "mapping board" }, stage, side, keys);
  el.append(root);

  // -- what a person does -----------------------------------------------------------------------------------------------
  function pick(side, layer) {
    if (picked && picked.side !== side) return connect(picked, { side, layer });
    picked = picked?.side === side && picked.layer === layer ? null : { side, layer };
    draw();
  }

  function connect(one, other) {
    const [student, teacher] = one.side === "S" ? [one, other] : [other, one];
    picked = null;
    ask("toggle", { student_layer: student.layer, teacher_layer: teacher.layer });
    draw();
  }

  function move(side, layer) {
    nodes[side][Math.min(Math.max(layer, 0), depth[side])].focus();
  }

  function across(side, layer) {  // the nearest layer of the other column
    const other = side === "S" ? "T" : "S";
    move(other, Math.round(layer * depth[other] / depth[side]));
  }

  const actions = {
    ArrowDown: (s, i) => move(s, i + 1), ArrowUp: (s, i) => move(s, i - 1),
    ArrowRight: (s, i) => s === "S" && across(s, i), ArrowLeft: (s, i) => s === "T" && across(s, i),
    Home: s => move(s, 0), End: s => move(s, depth[s]),
    Enter: pick, " ": pick,
    Escape: () => { picked = null; draw(); },
    Delete: (s, i) => ask("unlink", { [s === "S" ? "student_layer" : "teacher_layer"]: i }),
  };
  actions.Backspace = actions.Delete;

  const isUndo = event => (event.ctrlKey || event.metaKey) && !event.shiftKey && event.key === "z";
  const isModified = event => event.ctrlKey || event.metaKey || event.altKey || event.shiftKey;

  function onKey(event) {
    if (isUndo(event)) { event.preventDefault(); return ask("undo"); }
    const node = event.target.closest(".node");
    if (!node || isModified(event) || !(event.key in actions)) return;
    event.preventDefault();
    event.stopPropagation();
    actions[event.key](node.dataset.side, Number(node.dataset.layer));
  }
  root.addEventListener("keydown", onKey);

  // JupyterLab listens before the page does, and takes arrows, Enter and letters for its cells; it leaves an element with this
  // attribute alone. Ctrl+S, Shift+Enter and their like stay JupyterLab's.
  function keepKeys(event) {
    root.toggleAttribute("data-lm-suppress-shortcuts", root.contains(event.target) && (!isModified(event) || isUndo(event)));
  }
  window.addEventListener("keydown", keepKeys, true);

  let drag = null;  // {from: {side, layer}, x, y, moved}
  const inside = event => {
    const box = stage.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  stage.addEventListener("pointerdown", event => {
    const node = event.target.closest(".node");
    const [x, y] = inside(event);
    if (node && event.button === 0) drag = { from: { side: node.dataset.side, layer: Number(node.dataset.layer) }, x, y, moved: false };
  });
  function onMove(event) {
    if (!drag) return;
    const [x, top] = inside(event);
    drag.moved ||= Math.hypot(x - drag.x, top - drag.y) > DRAG;
    if (drag.moved) thread.setAttribute("d", `M${drag.from.side === "S" ? LEFT : RIGHT},${y(drag.from.side, drag.from.layer)} L${x},${top}`);
  }
  function onUp(event) {
    if (!drag) return;
    const { from, moved } = drag;
    drag = null;
    thread.removeAttribute("d");
    const node = moved && document.elementFromPoint(event.clientX, event.clientY)?.closest(".node");
    if (node && stage.contains(node) && node.dataset.side !== from.side) connect(from, { side: node.dataset.side, layer: Number(node.dataset.layer) });
  }
  window.addEventListener("pointermove", onMove);
  window.addEventListener("pointerup", onUp);

  // -- drawing ------------------------------------------------------------------------------------------------------------
  const similarity = (s, t) => setup.similarity?.[s][t] ?? null;  // null: not measured; below 0 it was

  function color(value) {  // of the scale's colors, which lie evenly over 0…1
    const at = Math.min(Math.max(value, 0), 1) * (setup.scale.length - 1), low = Math.floor(at);
    const next = setup.scale[Math.min(low + 1, setup.scale.length - 1)];
    return `color-mix(in srgb, ${next} ${100 * (at - low)}%, ${setup.scale[low]})`;
  }

  function drawLinks(pairs) {
    links.replaceChildren();
    for (const [s, t] of pairs) {
      const value = similarity(s, t), [from, to] = [y("S", s), y("T", t)];
      const d = `M${LEFT},${from} C${LEFT + 70},${from} ${RIGHT - 70},${to} ${RIGHT},${to}`;
      const line = svgElement("g", { class: "link", "data-pair": `${s}-${t}` });
      const width = value === null ? 3 : 3 + 5 * Math.max(0, value);
      line.append(svgElement("path", { d, class: "casing", "stroke-width": width + 2 }));
      line.append(svgElement("path", { d, class: "line", "stroke-width": width, ...(value === null ? {} : { style: `stroke:${color(value)}` }) }));
      line.append(svgElement("path", { d, class: "reach" }));
      line.addEventListener("click", () => ask("unlink", { student_layer: s, teacher_layer: t }));
      links.append(line);
    }
  }

  function drawNodes(pairs) {
    const from = picked ?? focus;  // the other column shows how alike its layers are to this one
    for (const side of ["S", "T"]) {
      nodes[side].forEach((node, layer) => {
        const partners = pairs.filter(([s, t]) => (side === "S" ? s : t) === layer).map(([s, t]) => (side === "S" ? `T${t}` : `S${s}`));
        const isPicked = picked?.side === side && picked.layer === layer;
        const value = from.side === side ? null : side === "T" ? similarity(from.layer, layer) : similarity(layer, from.layer);
        node.tabIndex = focus.side === side && focus.layer === layer ? 0 : -1;
        node.classList.toggle("mapped", partners.length > 0);
        node.setAttribute("aria-pressed", String(isPicked));
        const shown = node.querySelector(".alike");
        shown.textContent = value === null ? "" : value.toFixed(2);
        shown.style.setProperty("--alike", value === null ? "transparent" : color(value));
        const name = `${side === "S" ? "student" : "teacher"} layer ${layer}${layer === 0 ? ", embeddings" : ""}`;
        const linked = partners.length ? `connected with ${partners.join(" and ")}` : "not connected";
        const told = value === null ? "" : `, similarity to ${from.side}${from.layer} ${value.toFixed(2)}`;
        node.setAttribute("aria-label", `${name}, ${linked}${told}${isPicked ? ", picked" : ""}`);
      });
    }
  }

  const marks = { good: "✓ good", hint: "i hint", warning: "! warning" };
  function draw() {
    const pairs = model.get("pairs"), view = model.get("view");
    drawLinks(pairs);
    drawNodes(pairs);
    status.textContent = picked ? `${picked.side}${picked.layer} is picked: choose its ${picked.side === "S" ? "teacher" : "student"} layer. ${view.sentence}` : view.sentence;
    refusal.textContent = view.refusal;
    refusal.hidden = !view.refusal;
    notes.replaceChildren(...view.notes.map(note => element("li", { class: note.level }, element("b", {}, marks[note.level]), ` ${note.text}`)));
    alike.replaceChildren(...pairs.map(([s, t]) => {
      const value = similarity(s, t);
      const chip = value === null ? "" : element("i", { style: `background:${color(value)}` });
      return element("li", {}, chip, `S${s} ← T${t}  ${value === null ? "not measured" : value.toFixed(2)}`);
    }));
    cost.replaceChildren(...view.cost.map(line => element("li", {}, `· ${line}`)));
    for (const [name, button] of Object.entries(preset)) button.setAttribute("aria-pressed", String(view.preset === name));
    undo.disabled = !view.undo;
  }

  model.on("change:pairs", draw);
  model.on("change:view", draw);
  draw();
  return () => {
    model.off("change:pairs", draw);
    model.off("change:view", draw);
    window.removeEventListener("keydown", keepKeys, true);
    window.removeEventListener("pointermove", onMove);
    window.removeEventListener("pointerup", onUp);
  };
}

export default { render };
