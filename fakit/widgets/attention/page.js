// The Python side in miniature, for a page without a kernel: the maps of one sequence lie in the page, packed.
const DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%&()*+-;<=>?@^_`{|}~";  // Python's b85encode
const VALUE = Object.fromEntries([...DIGITS].map((digit, value) => [digit, value]));
const unpack = async text => {
  const words = new DataView(new ArrayBuffer(Math.ceil(text.length / 5) * 4));  // five digits are four bytes
  for (let at = 0; at < text.length; at += 5) {
    let word = 0;
    for (let k = 0; k < 5; k++) word = 85 * word + (VALUE[text[at + k]] ?? 84);
    words.setUint32(at / 5 * 4, word);
  }
  const stream = new Blob([words.buffer.slice(0, Math.floor(text.length * 4 / 5))]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new DataView(await new Response(stream).arrayBuffer());
};

class Model {
  constructor(state) {
    this.state = { error: "", ...state };
    this.listeners = new Map();
    this.changed = new Set();
  }
  get(name) { return this.state[name]; }
  set(name, value) {
    if (JSON.stringify(this.state[name]) === JSON.stringify(value)) return;
    this.state[name] = value;
    this.changed.add(name);
  }
  on(event, listener) { this.listeners.set(event, [...(this.listeners.get(event) ?? []), listener]); }
  off(event, listener) { this.listeners.set(event, (this.listeners.get(event) ?? []).filter(one => one !== listener)); }
  tell(name) { for (const listener of this.listeners.get(`change:${name}`) ?? []) listener(); }

  async save_changes() {
    const changed = [...this.changed];
    this.changed.clear();
    this.link(changed);
    for (const name of [...changed, "student_layer", "student_head"]) this.tell(name);
    if (changed.some(name => name !== "cursor")) await this.send();
  }

  // as AttentionViewer._link
  link(changed) {
    const state = this.state;
    for (const side of ["teacher", "student"]) {
      const layer = state.spec[side]?.layers.find(([number]) => number === state[`${side}_layer`]);
      if (layer && state[`${side}_head`] !== null) state[`${side}_head`] = Math.min(state[`${side}_head`], layer[1] - 1);
    }
    if (!state.linked || !state.spec.student) return;
    if (changed.includes("teacher_layer")) {
      const pair = state.spec.pairs.find(([, teacher]) => teacher === state.teacher_layer);
      if (pair) state.student_layer = pair[0];
    }
    if (!changed.some(name => ["teacher_layer", "student_layer", "teacher_head", "linked"].includes(name))) return;
    const found = this.match()?.find(([, teacher]) => teacher === state.teacher_head);
    if (state.teacher_head === null) state.student_head = null;
    else if (found) state.student_head = found[0];
  }
  // null: two layers whose match the file does not hold
  match() { return this.state.matches[`${this.state.student_layer}/${this.state.teacher_layer}`] ?? null; }

  key(side, left_out = this.state.without_sinks, view = this.state.view) {
    return `${side}/${view}/${this.state[`${side}_layer`]}/${left_out}`;
  }
  // what the file holds: a choice that it does not hold cannot be made
  offers(name) {
    if (name === "without_sinks") return this.key("teacher", !this.state.without_sinks) in this.state.pages;
    return true;
  }
  async send() {
    const state = this.state, wanted = [this.key("teacher"), this.key("student")];
    const layers = [state.teacher_layer, state.spec.student ? state.student_layer : null];
    const shown = { ...state.shown, layers, view: state.view, without_sinks: state.without_sinks, match: this.match() };
    const pages = await Promise.all(wanted.map(key => key in state.pages ? unpack(state.pages[key]) : null));
    if (wanted[0] !== this.key("teacher") || wanted[1] !== this.key("student")) return;  // another choice came meanwhile
    [state.teacher_page, state.student_page] = pages;
    state.shown = shown;
    this.tell("shown");
  }
}

const model = new Model(JSON.parse(document.getElementById("state").textContent));
for (const side of ["teacher", "student"]) {
  if (model.state.spec[side]) model.state[`${side}_thumbs`] = await unpack(model.state[`${side}_thumbs`]);
}
await model.send();
viewer.render({ model, el: document.getElementById("viewer") });
document.body.dataset.viewer = "ready";
