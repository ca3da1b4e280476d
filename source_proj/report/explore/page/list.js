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
  return example.text || example.file || (example.row || []).map(([name, value]) => `${name} ${value}`).join(", ");
}

/** A list of any length of which only the rows in sight are in the document. */
class VirtualList {
  static ROW = 74;
  static TALLEST = 8e6; // pixels: browsers lay out no element of a hundred million
  static SPAN = 100;

  constructor(box, { fetch, open, choose, render }) {
    Object.assign(this, { box, fetch, open, choose, render, total: 0, active: 0, spans: new Map(), version: 0 });
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

  /** Start over with another search. */
  async reset() {
    const version = ++this.version;
    const first = await this.fetch(0, VirtualList.SPAN);
    if (version !== this.version) return;
    this.spans = new Map([[0, first.examples]]);
    this.total = first.total;
    this.active = 0;
    this.stretch();
    this.box.scrollTop = 0;
    this.draw();
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
    if (this.spans.has(span)) return;
    const version = this.version;
    this.spans.set(span, "asked");
    if (this.spans.size > 40) this.spans.delete(this.spans.keys().next().value); // what was seen long ago is asked anew
    try {
      const { examples } = await this.fetch(span * VirtualList.SPAN, VirtualList.SPAN);
      if (version !== this.version) return;
      this.spans.set(span, examples);
      this.draw();
    } catch (error) {
      if (version === this.version) this.spans.delete(span);
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

  key(event) {
    const page = Math.max(1, this.visible - 2);
    const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -this.total, End: this.total };
    if (event.key in steps) this.move(this.active + steps[event.key]);
    else if (event.key === "Enter" && this.at(this.active)) this.open(this.at(this.active));
    else if (event.key === " " && this.at(this.active)) this.choose(this.at(this.active));
    else return;
    event.preventDefault();
  }
}
