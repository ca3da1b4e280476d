"use strict";

/** Make an element; texts are set as text and never parsed. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** An example's picture, or null; nothing but what the encoder of this page made. */
function picture(example) {
  if (!example.image || !example.image.startsWith("data:image/png;base64,")) return null;
  return make("img", { src: example.image, alt: described(example), class: example.pixelated ? "pixels" : null });
}

/** What a screen reader says of an example. */
function described(example) {
  return `example ${example.word}` + (example.label ? `, label ${example.label}` : "");
}

/** An example in one line. */
function inWords(example) {
  return example.text || example.file || (example.row || []).map(([name, value]) => `${name}=${value}`).join(", ");
}

/** A list of any length of which only the rows in sight are in the document. */
class VirtualList {
  static ROW = 74;
  static TALLEST = 8e6; // pixels: browsers lay out no element of a hundred million
  static SPAN = 100;

  constructor(box, { open, choose, render }) {
    Object.assign(this, { box, open, choose, render, total: 0, active: 0, spans: new Map(), version: 0 });
    this.settled = Promise.resolve(); // when the rows are those of the last search
    this.spacer = box.firstElementChild;
    this.window = this.spacer.firstElementChild;
    box.addEventListener("scroll", () => requestAnimationFrame(() => this.draw()));
    box.addEventListener("keydown", (event) => this.key(event));
    box.addEventListener("click", (event) => {
      const option = event.target.closest(".option");
      if (!option) return;
      this.active = Number(option.dataset.row);
      this.draw();
      this.open(this.at(this.active));
    });
    new ResizeObserver(() => this.draw()).observe(box);
  }

  /** Start over with the rows of another search; its first answer, or null where a later search came before it. */
  reset(fetch, kind) {
    const answered = this.answer(fetch, kind, ++this.version);
    this.settled = answered.catch(() => null);
    return answered;
  }

  async answer(fetch, kind, version) {
    let first;
    try {
      first = await fetch(0, VirtualList.SPAN);
    } catch (error) {
      if (version !== this.version) return null;
      throw error;
    }
    if (version !== this.version) return null;
    Object.assign(this, { fetch, kind }); // of what the rows are, which a click means
    this.spans = new Map([[0, first.examples]]);
    this.total = first.total;
    this.active = 0;
    this.stretch();
    this.box.scrollTop = 0;
    this.draw();
    return first;
  }

  /** There are more rows at the end. */
  grow(total) {
    if (total === this.total) return;
    if (this.total % VirtualList.SPAN) this.spans.delete(Math.floor(this.total / VirtualList.SPAN)); // it was not full
    this.total = total;
    this.stretch();
    this.draw();
  }

  stretch() {
    this.spacer.style.height = `${Math.min(this.total * VirtualList.ROW, VirtualList.TALLEST)}px`;
  }

  at(row) {
    const span = this.spans.get(Math.floor(row / VirtualList.SPAN));
    return Array.isArray(span) ? span[row % VirtualList.SPAN] : undefined;
  }

  get visible() {
    return Math.ceil(this.box.clientHeight / VirtualList.ROW) + 1;
  }

  /** The first row in sight: a share of the way where the list is taller than a browser can lay out. */
  get first() {
    if (this.total * VirtualList.ROW <= VirtualList.TALLEST) return Math.floor(this.box.scrollTop / VirtualList.ROW);
    const way = this.box.scrollTop / (VirtualList.TALLEST - this.box.clientHeight);
    return Math.round(Math.min(1, way) * (this.total - this.visible + 1));
  }

  draw() {
    const first = Math.max(0, this.first);
    const last = Math.min(this.total, first + this.visible);
    const exact = this.total * VirtualList.ROW <= VirtualList.TALLEST;
    const end = parseFloat(this.spacer.style.height || 0) - (last - first) * VirtualList.ROW;
    this.window.style.transform = `translateY(${exact ? first * VirtualList.ROW : Math.min(this.box.scrollTop, end)}px)`;
    const rows = [];
    for (let row = first; row < last; row++) {
      const example = this.at(row);
      if (!example) this.load(Math.floor(row / VirtualList.SPAN));
      const state = { id: `row-${row}`, role: "option", "data-row": row, "aria-posinset": row + 1, "aria-setsize": this.total };
      const active = row === this.active;
      const option = make("div", { ...state, class: `option${active ? " active" : ""}`, "aria-selected": String(active) });
      if (example) this.render(option, example);
      rows.push(option);
    }
    this.window.replaceChildren(...rows);
    if (this.active >= first && this.active < last) this.box.setAttribute("aria-activedescendant", `row-${this.active}`);
    else this.box.removeAttribute("aria-activedescendant");
  }

  async load(span) {
    const spans = this.spans; // another search has a map of its own
    if (spans.has(span)) return;
    spans.set(span, "asked");
    if (spans.size > 40) spans.delete(spans.keys().next().value); // what was seen long ago is asked anew
    try {
      const { examples } = await this.fetch(span * VirtualList.SPAN, VirtualList.SPAN);
      spans.set(span, examples);
      if (spans === this.spans) this.draw();
    } catch (error) {
      spans.delete(span);
      throw error;
    }
  }

  move(row) {
    this.active = Math.max(0, Math.min(this.total - 1, row));
    const whole = Math.floor(this.box.clientHeight / VirtualList.ROW);
    let first = this.first;
    if (this.active < first) first = this.active;
    else if (this.active >= first + whole) first = this.active - whole + 1;
    if (first !== this.first) {
      const exact = this.total * VirtualList.ROW <= VirtualList.TALLEST;
      const way = first / Math.max(1, this.total - this.visible + 1);
      this.box.scrollTop = exact ? first * VirtualList.ROW : way * (VirtualList.TALLEST - this.box.clientHeight);
    }
    this.draw();
  }

  /** Keys mean the rows of the last search, also where these are still on their way. */
  key(event) {
    const page = Math.max(1, this.visible - 2);
    const act = {
      ArrowDown: () => this.move(this.active + 1),
      ArrowUp: () => this.move(this.active - 1),
      PageDown: () => this.move(this.active + page),
      PageUp: () => this.move(this.active - page),
      Home: () => this.move(0),
      End: () => this.move(this.total),
      Enter: () => this.with(this.open),
      " ": () => this.with(this.choose),
    }[event.key];
    if (!act) return;
    event.preventDefault();
    this.settled.then(act);
  }

  with(act) {
    const example = this.at(this.active);
    if (example) act(example);
  }
}
