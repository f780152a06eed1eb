// Attention viewer: head grids to choose from, linked matrices with one cursor, a sentence that says what is under it.
// Maps come as bytes: a page is one float32 scale a head, then one byte a cell (254 · p / scale, 255 = masked).
const MASKED = 255, LEVELS = 254, GAP = 8, TOP = 8, BAR = 36, SIDES = ["teacher", "student"];
const FONT = '12px system-ui, "DejaVu Sans", Verdana, sans-serif';

const make = (tag, properties = {}, ...children) => {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
};
const short = token => token.length > 12 ? token.slice(0, 11) + "…" : token;
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const signed = value => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(3);

/** 256 colors (r, g, b) along stops [[0, "#rrggbb"], …]. */
function ramp(stops) {
  const colors = new Uint8Array(256 * 3);
  for (let i = 0; i < 256; i++) {
    const at = i / 255, right = Math.max(1, stops.findIndex(([place]) => place >= at));
    const [[p0, c0], [p1, c1]] = [stops[right - 1], stops[right]];
    for (let k = 0; k < 3; k++) {
      const [a, b] = [c0, c1].map(color => parseInt(color.slice(1 + 2 * k, 3 + 2 * k), 16));
      colors[3 * i + k] = Math.round(a + (b - a) * (at - p0) / (p1 - p0));
    }
  }
  return colors;
}

/** One head of a page, or the mean over heads (null): Float32Array, NaN where masked; null where the page is of another shape. */
function cells(page, heads, length, head) {
  const size = length * length;
  if (!page || page.byteLength !== heads * (4 + size)) return null;
  const chosen = head === null ? Array.from({ length: heads }, (_, i) => i) : [head], found = new Float32Array(size);
  for (const h of chosen) {
    const scale = page.getFloat32(4 * h, true) / LEVELS / chosen.length;
    const bytes = new Uint8Array(page.buffer, page.byteOffset + 4 * heads + h * size, size);
    for (let i = 0; i < size; i++) found[i] += bytes[i] === MASKED ? NaN : bytes[i] * scale;
  }
  return found;
}

/** A bitmap of `length`² pixels; what is masked is left clear. */
function bitmap(values, length, low, high, colors) {
  const canvas = make("canvas", { width: length, height: length }), context = canvas.getContext("2d");
  const image = context.createImageData(length, length);
  values.forEach((value, i) => {
    if (Number.isNaN(value)) return;
    const at = 3 * Math.round(clamp((value - low) / (high - low), 0, 1) * 255);
    image.data.set([colors[at], colors[at + 1], colors[at + 2], 255], 4 * i);
  });
  context.putImageData(image, 0, 0);
  return canvas;
}

/** Hatch the masked cells of a square of `size` px: no data, which is not zero. */
function hatch(context, values, length, size, ink) {
  const tile = make("canvas", { width: 8, height: 8 }), strokes = tile.getContext("2d"), cell = size / length;
  strokes.strokeStyle = ink;
  strokes.beginPath();
  for (const shift of [-8, 0, 8]) { strokes.moveTo(shift, 8); strokes.lineTo(shift + 8, 0); }
  strokes.stroke();
  context.fillStyle = context.createPattern(tile, "repeat");
  for (let row = 0; row < length; row++) {
    for (let column = 0; column < length; column++) {
      if (!Number.isNaN(values[row * length + column])) continue;
      let end = column;
      while (end < length && Number.isNaN(values[row * length + end])) end++;
      context.fillRect(column * cell, row * cell, (end - column) * cell, cell);
      column = end;
    }
  }
}

/** A canvas of CSS size width × height, cleared, in CSS pixels, with the page's text color. */
function sheet(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1, context = canvas.getContext("2d");
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  Object.assign(canvas.style, { width: `${width}px`, height: `${height}px` });
  context.scale(ratio, ratio);
  context.font = FONT;
  context.imageSmoothingEnabled = false;
  context.fillStyle = context.strokeStyle = getComputedStyle(canvas).color;
  return context;
}

function frame(context, x, y, width, height) {  // shows on dark and on light cells
  for (const [color, line] of [["#000", 4], ["#fff", 1.6]]) {
    Object.assign(context, { strokeStyle: color, lineWidth: line });
    context.strokeRect(x, y, width, height);
  }
}

/** Every head of a model in small: rows are layers, columns heads, the last column the mean. */
class Grid {
  constructor(view, side) {
    const spec = view.model.get("spec")[side], what = `${side[0].toUpperCase()}${side.slice(1)}`;
    Object.assign(this, { view, side, spec, colors: ramp(spec.ramp), what, pixels: 0 });
    this.most = Math.max(...spec.layers.map(([, heads]) => heads));
    this.canvas = make("canvas");
    this.box = make("div", {
      className: "scroll grid", tabIndex: 0, role: "application", "data-lm-suppress-shortcuts": "true",
      "aria-label": `${what} heads: rows are layers, columns heads, the last column their mean. Arrow keys choose.`,
    }, this.canvas);
    this.caption = make("figcaption");
    this.element = make("figure", { className: side }, this.caption, this.box);
    this.box.addEventListener("keydown", event => this.key(event));
    this.canvas.addEventListener("click", event => this.click(event));
  }
  get row() { return this.spec.layers.findIndex(([layer]) => layer === this.view.model.get(`${this.side}_layer`)); }
  get column() { return this.view.model.get(`${this.side}_head`) ?? this.spec.layers[this.row][1]; }
  choose(row, column) {
    const [layer, heads] = this.spec.layers[clamp(row, 0, this.spec.layers.length - 1)];
    const head = column >= heads ? null : Math.max(0, column);
    this.view.send({ [`${this.side}_layer`]: layer, [`${this.side}_head`]: head });
  }
  key(event) {
    const { row, column } = this, last = this.spec.layers[row][1];
    const to = {
      ArrowUp: [row - 1, column === last ? Infinity : column], ArrowDown: [row + 1, column === last ? Infinity : column],
      ArrowLeft: [row, column - 1], ArrowRight: [row, column + 1], Home: [row, 0], End: [row, last],
    }[event.key];
    if (!to) return;
    event.preventDefault();
    this.choose(...to);
  }
  click(event) {
    const column = Math.floor((event.offsetX - this.left) / this.step), row = Math.floor((event.offsetY - this.top) / this.step);
    if (column >= 0 && row >= 0 && row < this.spec.layers.length) this.choose(row, column > this.most - 1 ? Infinity : column);
  }
  draw(width) {
    const { spec, canvas, most } = this, [layer, heads, keys] = spec.layers[this.row], grouped = keys < heads;
    const left = this.left = 30, top = this.top = 18 + (grouped ? 18 : 0);
    const fits = Math.min((width - left - 14) / (most + 1), 400 / spec.layers.length);
    const step = this.step = clamp(Math.floor(fits), 18, 34), size = step - 3;
    const context = sheet(canvas, left + step * (most + 1) + 14, top + step * spec.layers.length + 2);
    const every = Math.ceil(18 / step), ink = context.fillStyle;
    context.textAlign = "center";
    for (let head = 0; head < most; head += every) context.fillText(head, left + head * step + size / 2, 12);
    context.fillText("mean", left + most * step + size / 2 + 2, 12);
    if (grouped) {
      for (let key = 0; key < keys; key++) {
        const [from, wide] = [left + key * heads / keys * step, heads / keys * step - 3];
        context.fillRect(from, top - 3, wide, 2);
        if (wide > 16) context.fillText(`k${key}`, from + wide / 2, top - 6);
      }
    }
    const thumbs = this.view.model.get(`${this.side}_thumbs`), small = Math.min(20, this.view.length);
    const bytes = new Uint8Array(thumbs.buffer, thumbs.byteOffset, thumbs.byteLength);
    let at = 0;
    spec.layers.forEach(([number, count], row) => {
      const y = top + row * step, mean = new Float32Array(small * small);
      Object.assign(context, { fillStyle: ink, textAlign: "right", font: (number === layer ? "bold " : "") + FONT });
      context.fillText(spec.letter + number, left - 6, y + size / 2 + 4);
      for (let head = 0; head <= count; head++) {
        const values = head === count ? mean : Float32Array.from(bytes.subarray(at, at + small * small), b => b === MASKED ? NaN : b / LEVELS);
        if (head < count) { values.forEach((value, i) => { mean[i] += value / count; }); at += small * small; }
        const x = left + (head === count ? most : head) * step + (head === count ? 4 : 0);
        context.drawImage(bitmap(values, small, 0, 1, this.colors), x, y, size, size);
        if (row === this.row && head === this.column) frame(context, x, y, size, size);
      }
    });
    const box = this.box, y = top + this.row * step;
    if (y < box.scrollTop || y + step > box.scrollTop + box.clientHeight) box.scrollTop = y - top;
    const groups = grouped ? ` ${heads / keys} heads share one key head (k0 … k${keys - 1}).` : "";
    this.caption.replaceChildren(`${this.what} heads`, make("small", { textContent: ` layers ↓ heads →${groups}` }));
  }
}

class View {
  constructor(model, el) {
    Object.assign(this, { model, spec: model.get("spec"), busy: null });
    this.sides = SIDES.filter(side => this.spec[side]);
    this.colors = [...this.sides.map(side => ramp(this.spec[side].ramp)), ramp(this.spec.difference)];
    this.grids = this.sides.map(side => new Grid(this, side));
    this.bar = make("div", { className: "bar", role: "group", "aria-label": "What is shown" }, ...this.controls());
    this.canvases = (this.sides.length > 1 ? [...SIDES, "difference"] : SIDES.slice(0, 1)).map(name => make("canvas", { className: name }));
    this.captions = this.canvases.map(() => make("figcaption"));
    this.maps = make("div", {
      className: "maps", tabIndex: 0, role: "application", "data-lm-suppress-shortcuts": "true",
      "aria-label": "Attention matrices: rows are queries, columns keys. Arrow keys move the cursor, with Shift by five; Home and End to the first and last key.",
    }, ...this.canvases.map((canvas, i) => make("figure", {}, this.captions[i], canvas)));
    this.said = make("p", { className: "said", role: "status", "aria-live": "polite" });
    this.failed = make("p", { className: "failed", role: "alert" });
    this.note = make("p", { className: "note" });
    const row = make("div", { className: "row" }, ...this.grids.map(grid => grid.element));
    this.root = make("div", { className: "fakit-av" }, this.bar, row, this.maps, this.said, this.failed, this.note);
    el.append(this.root);
    this.maps.addEventListener("keydown", event => this.key(event));
    this.canvases.forEach((canvas, i) => {
      canvas.addEventListener("pointermove", event => this.point(event, i));
      canvas.addEventListener("click", event => this.point(event, i));
    });
    this.redraw = () => { cancelAnimationFrame(this.frame); this.frame = requestAnimationFrame(() => this.draw()); };
    this.names = ["shown", "teacher_page", "student_page", "teacher_thumbs", "student_thumbs", "cursor", "linked", "error"];
    this.names.push("without_sinks", "view", "sequence", ...SIDES.flatMap(side => [`${side}_layer`, `${side}_head`]));
    for (const name of this.names) model.on(`change:${name}`, this.redraw);
    this.sizes = new ResizeObserver(this.redraw);
    this.sizes.observe(this.root);
    this.theme = new MutationObserver(this.redraw);  // JupyterLab's light and dark
    this.theme.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light", "class"] });
    this.scheme = matchMedia("(prefers-color-scheme: dark)");
    this.scheme.addEventListener("change", this.redraw);
    this.redraw();
  }
  remove() {
    for (const name of this.names) this.model.off(`change:${name}`, this.redraw);
    this.sizes.disconnect();
    this.theme.disconnect();
    this.scheme.removeEventListener("change", this.redraw);
    cancelAnimationFrame(this.frame);
    clearTimeout(this.later);
    this.root.remove();
  }
  controls() {
    const button = (text, act) => make("button", { type: "button", textContent: text, onclick: act });
    const toggle = (text, name) => button(text, () => this.send({ [name]: !this.model.get(name) }));
    this.toggles = { linked: toggle("Link to best match", "linked"), without_sinks: toggle("Leave sinks out", "without_sinks") };
    this.toggles.view = button("Rollout", () => this.send({ view: this.model.get("view") === "rollout" ? "heads" : "rollout" }));
    const turn = by => () => this.send({ sequence: clamp(this.model.get("sequence") + by, 0, this.spec.sequences - 1) });
    this.which = make("span", { className: "which" });
    this.turns = [button("‹ previous", turn(-1)), button("next ›", turn(1))];
    const found = Object.values(this.toggles).filter(one => one !== this.toggles.linked || this.sides.length > 1);
    return this.spec.sequences > 1 && !this.model.offers ? [this.turns[0], this.which, this.turns[1], ...found] : found;
  }
  send(changes) {
    for (const [name, value] of Object.entries(changes)) this.model.set(name, value);
    this.model.save_changes();
    this.redraw();
  }
  get shown() { return this.model.get("shown"); }
  get length() { return this.shown.tokens.length; }
  get sinks() { return this.shown.sinks.map(i => this.shown.tokens[i - this.shown.start]).join(" "); }

  // --- the cursor: moves at once, and is sent to Python when it rests ---
  move(query, key) {
    const { start } = this.shown, last = start + this.length - 1;
    this.model.set("cursor", [clamp(query, start, last), clamp(key, start, last)]);
    clearTimeout(this.later);
    this.later = setTimeout(() => this.model.save_changes(), 120);
    this.redraw();
  }
  key(event) {
    const [query, key] = this.model.get("cursor"), by = event.shiftKey ? 5 : 1;
    const to = {
      ArrowUp: [query - by, key], ArrowDown: [query + by, key], ArrowLeft: [query, key - by], ArrowRight: [query, key + by],
      Home: [query, 0], End: [query, Infinity], PageUp: [0, key], PageDown: [Infinity, key],
    }[event.key];
    if (!to) return;
    event.preventDefault();
    this.move(...to);
  }
  point(event, i) {
    const { left, cell } = this.places[i];
    const [query, key] = [event.offsetY - TOP, event.offsetX - left].map(place => Math.floor(place / cell));
    if (Math.min(query, key) >= 0 && Math.max(query, key) < this.length) this.move(query + this.shown.start, key + this.shown.start);
  }

  // --- what is seen ---
  draw() {
    const width = this.root.clientWidth - 10;  // without its padding
    if (width < 0) return;  // not laid out yet; the ResizeObserver calls again
    const { model, shown, sides } = this, rollout = shown.view === "rollout";
    this.failed.textContent = model.get("error");
    for (const [name, one] of Object.entries(this.toggles)) {
      one.setAttribute("aria-pressed", name === "view" ? rollout : model.get(name));
      one.disabled = name === "view" ? Boolean(this.spec.no_rollout) : model.offers ? !model.offers(name) : false;
    }
    this.which.textContent = `sequence ${model.get("sequence") + 1} of ${this.spec.sequences}`;
    this.turns.forEach((one, i) => { one.disabled = model.get("sequence") === (i ? this.spec.sequences - 1 : 0); });
    this.grids.forEach(grid => grid.draw(width >= 760 && sides.length > 1 ? (width - 20) / 2 : width));
    const wanted = [model.get("sequence"), model.get("view"), model.get("without_sinks"), ...sides.map(s => model.get(`${s}_layer`))];
    const here = [shown.sequence, shown.view, shown.without_sinks, ...shown.layers.slice(0, sides.length)];
    this.maps.setAttribute("aria-busy", String(wanted.join() !== here.join()));
    const found = sides.map((side, i) => {
      const [, heads] = this.spec[side].layers.find(([layer]) => layer === shown.layers[i]);
      const head = model.get(`${side}_head`);
      return cells(model.get(`${side}_page`), rollout ? 1 : heads, this.length, rollout ? 0 : head === null ? null : Math.min(head, heads - 1));
    });
    this.maps.hidden = !found.every(Boolean);  // a failure has emptied them
    if (this.maps.hidden) return void (this.said.textContent = "No map to show.");
    this.maps.hidden = shown.without_sinks && found.some(map => map.every(Number.isNaN));
    if (this.maps.hidden) {  // as AttentionViewer._nothing_left
      this.said.textContent = `Without its sinks (${this.sinks}) nothing is left of this sequence: no token looks at any other.`;
      this.note.textContent = "Show the sinks again, or choose another sequence.";
      return;
    }
    if (found.length > 1) found.push(found[1].map((value, i) => value - found[0][i]));
    this.paint(found, width);
    this.say(found);
  }
  title(i) {
    const side = this.sides[i], { shown, model } = this, head = model.get(`${side}_head`);
    if (i === this.sides.length) return "student − teacher";
    const name = `${side} ${this.spec[side].letter}${shown.layers[i]}`;
    if (shown.view === "rollout") return `${name}: rollout through layers 1 … ${shown.layers[i]}`;
    const [, heads, keys] = this.spec[side].layers.find(([layer]) => layer === shown.layers[i]);
    const group = keys < heads && head !== null ? ` (key head ${Math.floor(head * keys / heads)} of ${keys})` : "";
    return `${name}, ${head === null ? "mean over heads" : `head ${head}`}${group}`;
  }
  paint(found, width) {
    const { length } = this, labels = this.shown.tokens.map(short), cursor = this.model.get("cursor").map(i => i - this.shown.start);
    const top = found.slice(0, this.sides.length).reduce((most, map) => map.reduce((m, v) => v > m ? v : m, most), 1e-6);
    const reach = found.length > 1 ? found[2].reduce((most, value) => Math.abs(value) > most ? Math.abs(value) : most, 1e-6) : 0;
    const probe = this.canvases[0].getContext("2d");
    probe.font = `bold ${FONT}`;
    const label = Math.ceil(Math.max(...labels.map(text => probe.measureText(text).width))) + 10;
    const side = width >= 640 && found.length > 1, lefts = found.map((_, i) => side && i ? 6 : label);
    const room = side ? (width - label - 12 - 2 * GAP) / 3 - 6 : width - label - 8;
    const cell = clamp(room, 120, 440) / length, size = cell * length;
    this.places = found.map((map, i) => {
      const context = sheet(this.canvases[i], lefts[i] + size + 6, TOP + size + label + BAR), ink = context.fillStyle;
      const [low, high] = i < this.sides.length ? [0, top] : [-reach, reach];
      context.save();
      context.translate(lefts[i], TOP);
      context.drawImage(bitmap(map, length, low, high, this.colors[i === this.sides.length ? this.colors.length - 1 : i]), 0, 0, size, size);
      hatch(context, map, length, size, this.spec.hatch);
      this.ticks(context, labels, cell, cursor, size, lefts[i] === label, ink);
      frame(context, cursor[1] * cell, cursor[0] * cell, Math.max(cell, 4), Math.max(cell, 4));
      this.legend(context, this.colors[i], size, size + label + 6, [low, (low + high) / 2, high], ink);
      context.restore();
      this.captions[i].textContent = this.title(i);
      return { left: lefts[i], cell };
    });
  }
  ticks(context, labels, cell, [query, key], size, rows, ink) {
    const every = Math.ceil(14 / cell);
    const draw = (at, chosen) => labels.forEach((text, i) => {
      const near = Math.abs(i - chosen) * cell < 14;
      if (i !== chosen && (near || i % every)) return;
      Object.assign(context, { fillStyle: ink, font: (i === chosen ? "bold " : "") + FONT, textAlign: "right", textBaseline: "middle" });
      at(text, (i + 0.5) * cell);
    });
    if (rows) draw((text, y) => context.fillText(text, -6, y), query);
    draw((text, x) => {
      context.save();
      context.translate(x, size + 6);
      context.rotate(-Math.PI / 2);
      context.fillText(text, 0, 0);
      context.restore();
    }, key);
    Object.assign(context, { strokeStyle: "#666", lineWidth: 1, globalAlpha: 0.7 });
    context.strokeRect(0, query * cell, size, cell);
    context.strokeRect(key * cell, 0, cell, size);
    context.globalAlpha = 1;
  }
  legend(context, colors, size, y, stops, ink) {
    const strip = context.createLinearGradient(0, 0, size, 0);
    for (let i = 0; i <= 16; i++) strip.addColorStop(i / 16, `rgb(${colors.subarray(3 * Math.round(i / 16 * 255)).slice(0, 3).join()})`);
    context.fillStyle = strip;
    context.fillRect(0, y, size, 10);
    Object.assign(context, { fillStyle: ink, font: FONT, textBaseline: "top" });
    const sign = stops[0] < 0;
    stops.forEach((stop, i) => {
      context.textAlign = ["left", "center", "right"][i];
      context.fillText(sign && i !== 1 ? signed(stop).slice(0, -1) : stop.toFixed(2), size * i / 2, y + 13);
    });
  }
  say(found) {
    const { shown, model, sides } = this, [query, key] = model.get("cursor").map(i => i - shown.start);
    const values = found.map(map => map[query * this.length + key]);
    const parts = values.map((value, i) => `${[...sides, "difference"][i]} ${Number.isNaN(value) ? "masked" : i < sides.length ? value.toFixed(3) : signed(value)}`);
    const masked = values.every(Number.isNaN);
    const why = shown.without_sinks && shown.sinks.includes(key + shown.start) ? "a sink, left out" : "masked (padding, or the future): no data";
    const text = `${shown.tokens[query]} → ${shown.tokens[key]}: ${masked ? why : parts.join(", ")}.`;
    if (this.said.textContent !== text) this.said.textContent = text;
    const notes = ["Row = query, column = key. Hatched: no data (padding or future), not zero. Teacher and student share one scale."];
    if (shown.without_sinks) notes.unshift(`Sinks are left out (${this.sinks}): their columns are hatched, and every row is renormalized to sum to 1.`);
    if (sides.length > 1 && shown.view === "heads" && model.get("teacher_head") !== null) {
      const pair = shown.match?.find(([, teacher]) => teacher === model.get("teacher_head"));
      const over = shown.matched_on > 1 ? ` over ${shown.matched_on} sequences` : "";
      if (pair) notes.unshift(`Best match of teacher head ${pair[1]}: student head ${pair[0]}, Jensen–Shannon distance ${pair[2].toFixed(3)}${over}.`);
      else if (!shown.match) notes.unshift("Best matches of heads are saved in this file for mapped layers only.");
      else notes.unshift(`Teacher head ${model.get("teacher_head")} has no match among the student's heads of this layer.`);
    }
    if (this.spec.no_rollout) notes.push(`No rollout: ${this.spec.no_rollout}.`);
    const rounded = model.get("rounded");  // of a file alone
    if (rounded) notes.push(`Values in this file are rounded to ±${rounded.toPrecision(2)}.`);
    else notes.push(`Values come in ${LEVELS} steps up to each head's largest one, so each is within 1/${2 * LEVELS} of that.`);
    if (this.toggles.without_sinks.disabled) notes.push("This file has no room for maps with and without sinks: it holds what was shown when it was written.");
    this.note.textContent = notes.join(" ") + " Thumbnails show √ of attention on one scale, 0 to 1.";
  }
}

function render({ model, el }) {
  const view = new View(model, el);
  return () => view.remove();
}
const viewer = { render };
export default viewer;
