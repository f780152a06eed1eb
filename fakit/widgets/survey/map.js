// The page of the survey's map: a table of methods and places; a press on either says what stands there. The rows come from Python.

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

export function render({ model, el }) {
  const { methods, places } = model.get("survey");
  const root = element("div", { class: "fakit-survey" });
  const read = element("section", { class: "read", role: "status", "aria-live": "polite" });
  const buttons = [];
  const press = selected => {
    model.set("selected", selected);
    model.save_changes();
  };
  const button = (selected, kind, ...children) => {
    const made = element("button", { type: "button", class: kind }, ...children);
    made.addEventListener("click", () => press(selected));
    buttons.push([made, selected]);
    return made;
  };

  const head = element("tr", {}, element("td"));
  for (const { name, kind } of places) head.append(element("th", { scope: "col", class: kind }, button(name, "place", name)));
  const body = element("tbody");
  for (const { name, year, alignments } of methods) {
    const row = element("tr", {}, element("th", { scope: "row" }, button(name, "method", `${name} `, element("small", {}, year ?? ""))));
    for (const place of places) {
      const cell = element("td", { class: place.kind });
      for (const one of alignments.filter(found => found.place === place.name)) cell.append(element("div", { class: "loss", title: one.loss }, place.kind === "labels" ? "" : one.loss));
      row.append(cell);
    }
    body.append(row);
  }
  const table = element("table", {}, element("caption", {}, "What each method aligns, and by which loss"), element("thead", {}, head), body);
  root.append(element("div", { class: "table", tabindex: "0", role: "region", "aria-label": "methods by what they align" }, table), read);
  el.append(root);

  function draw() {
    const selected = model.get("selected");
    for (const [made, of] of buttons) made.setAttribute("aria-pressed", String(of === selected));
    for (const cell of table.querySelectorAll("tbody tr")) cell.classList.toggle("selected", methods[cell.sectionRowIndex].name === selected);
    const column = places.findIndex(place => place.name === selected);
    for (const row of table.rows) [...row.cells].forEach((cell, number) => cell.classList.toggle("column", number === column + 1 && column >= 0));
    read.innerHTML = model.get("pages")[selected] ?? "";
  }
  model.on("change:selected", draw);
  draw();
  return () => model.off("change:selected", draw);
}
