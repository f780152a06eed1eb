// The page of the run browser: draws what Python says in `view`, and sets the traits that a person changes. It decides nothing by itself.

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

export function render({ model, el }) {
  const root = element("div", { class: "fakit-run-browser" });
  const groups = Object.fromEntries(["task", "arms", "curve", "cost"].map(name => [name, element("div", { class: "group", role: "group", "aria-label": name })]));
  const curves = element("div"), front = element("div");
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

  for (const drawing of [curves, front]) drawing.addEventListener("click", event => {
    const run = event.target.closest("[data-run]");
    if (run) toggle(run.dataset.run);
  });

  // the run under the pointer, or whose box has the focus, stands out everywhere
  let pointed;
  const point = id => {
    pointed = id;
    root.querySelectorAll("[data-run]").forEach(one => one.classList.toggle("pointed", one.dataset.run === id));
  };
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
          button.innerHTML = `<svg width="16" height="14" viewBox="-8 -7 16 14" aria-hidden="true"><path d="${symbol}" fill="${color}" stroke="#fff"/></svg>`;
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
    buttons(groups.task, view.tasks.map(name => ({ name })), name => name === model.get("task"), name => set({ task: name }), "task");
    buttons(groups.arms, view.arms, name => model.get("arms").includes(name), name => {
      const shown = model.get("arms");
      set({ arms: view.arms.map(one => one.name).filter(one => (one === name ? !shown.includes(one) : shown.includes(one))) });
    }, "arms");
    buttons(groups.curve, view.curves, name => name === model.get("curve"), name => set({ curve: name }), "curve");
    buttons(groups.cost, view.costs, name => name === model.get("cost"), name => set({ cost: name }), "cost");

    curves.innerHTML = view.lines;
    front.innerHTML = view.points;
    point(pointed);
    header(view);
    fill(view, selected);
    if (status.textContent !== view.sentence) status.textContent = view.sentence;
  }

  model.on("change:view", draw);
  draw();
  return () => model.off("change:view", draw);
}
