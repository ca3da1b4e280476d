"use strict";

/** The chosen example, and whom it helped and harmed (or who helped and harmed it). */
class Detail {
  constructor(facts, backend, tray) {
    Object.assign(this, { facts, backend, tray, segment: null, version: 0 });
    this.box = document.getElementById("detail");
    document.addEventListener("tray", () => {
      for (const button of this.box.querySelectorAll("button[data-place]")) {
        button.setAttribute("aria-pressed", String(tray.chosen.has(Number(button.dataset.place))));
      }
    });
  }

  async show(kind, place) {
    const version = ++this.version;
    this.box.setAttribute("aria-busy", "true");
    const example = await this.backend.example(kind, place);
    const lists = await Promise.all(["helpful", "harmful"].map((sense) => this.backend.strongest(kind, place, sense, 0)));
    if (version !== this.version) return;
    Object.assign(this, { kind, place, example, segment: null });
    this.lists = { helpful: { ...lists[0], page: 0 }, harmful: { ...lists[1], page: 0 } };
    this.box.removeAttribute("aria-busy");
    this.draw();
  }

  draw() {
    const { example, kind } = this;
    const about = [example.label ? `label ${example.label}` : "", example.verdict ?? ""];
    const name = kind === "queries" ? "Query" : "Training example";
    this.box.replaceChildren(...[
      make("h2", { tabindex: "-1" }, `${name} ${example.word}`),
      make("p", { class: "about" }, about.filter(Boolean).join(" · ")),
      make("div", { class: "asked" }, ...this.content(example)),
      kind === "train" ? make("p", { class: "actions" }, this.trayButton(example)) : null,
      this.timeline(),
      this.list("helpful"),
      this.list("harmful"),
    ].filter(Boolean));
  }

  content(example) {
    const rows = (example.row || []).map(([name, value]) => make("tr", {}, make("th", { scope: "row" }, name), make("td", {}, value)));
    const shown = [picture(example), example.text ? make("p", { class: "text", dir: "auto" }, example.text) : null];
    if (rows.length) shown.push(make("table", {}, make("tbody", {}, ...rows)));
    if (!example.image && !example.text && example.file) shown.push(make("p", { class: "text" }, example.file));
    return shown.filter(Boolean);
  }

  trayButton(example) {
    const state = { type: "button", "data-place": example.place, "aria-pressed": String(this.tray.has(example)) };
    const button = make("button", { ...state, "aria-label": `Tray: ${example.word}` }, "Tray");
    button.addEventListener("click", () => this.tray.toggle(example));
    return button;
  }

  /** When in training the scores of the lists arose: a column up and one down for each segment. */
  timeline() {
    const { segments } = this.facts;
    if (segments.length < 2) return null;
    const hits = [...this.lists.helpful.hits, ...this.lists.harmful.hits];
    const sums = segments.map((_, segment) => [1, -1].map((sign) =>
      hits.reduce((sum, hit) => sum + Math.max(0, sign * this.towards * (hit.parts[segment] || 0)), 0)));
    const largest = Math.max(...sums.flat()) || 1;
    const buttons = segments.map((name, segment) => {
      const columns = sums[segment].map((size, against) => {
        const column = make("span", { class: against ? "against" : null });
        column.style.height = `${(100 * size) / largest}%`;
        return column;
      });
      const pressed = String(this.segment === segment);
      const button = make("button", { type: "button", "aria-pressed": pressed, title: `Only what arose most in ${name}` },
        make("span", { class: "columns", "aria-hidden": "true" }, ...columns), make("span", {}, `${segment + 1}: ${name}`));
      button.addEventListener("click", () => {
        this.segment = this.segment === segment ? null : segment;
        this.draw();
        this.box.querySelectorAll(".timeline button")[segment].focus();
      });
      return button;
    });
    return make("div", {}, make("h3", {}, "When it arose ", make("span", { class: "soft" }, "choose a segment to see what arose there")),
      make("div", { class: "timeline", role: "group", "aria-label": "Segments of training" }, ...buttons));
  }

  get towards() {
    return this.facts.higher_is_better ? 1 : -1;
  }

  list(sense) {
    const { hits, more, page } = this.lists[sense];
    const kept = hits.filter((hit) => this.segment === null || this.strongestSegment(hit) === this.segment);
    const whom = this.kind === "queries" ? `training examples that ${sense === "helpful" ? "helped" : "harmed"} it` : `queries that it ${sense === "helpful" ? "helped" : "harmed"}`;
    const box = make("div", { class: sense }, make("h3", {}, make("span", { class: sense === "helpful" ? "up" : "down" }, `Most ${sense}: `), make("span", { class: "soft" }, whom)),
      kept.length ? make("ol", { class: "hits" }, ...kept.map((hit) => this.hit(hit))) : make("p", { class: "soft" }, "None."));
    if (!more) return box;
    const button = make("button", { type: "button", class: "more" }, "Show more");
    button.addEventListener("click", async () => {
      button.disabled = true;
      const { version } = this;
      const next = await this.backend.strongest(this.kind, this.place, sense, page + 1);
      if (version !== this.version) return;
      this.lists[sense] = { hits: [...hits, ...next.hits], more: next.more, page: page + 1 };
      this.draw();
      this.box.querySelectorAll(`.${sense} .hit`)[kept.length]?.querySelector("button").focus();
    });
    box.append(make("p", { class: "actions" }, button));
    return box;
  }

  strongestSegment(hit) {
    const sizes = hit.parts.map(Math.abs);
    return sizes.indexOf(Math.max(...sizes));
  }

  hit(hit) {
    const { example } = hit;
    const other = this.kind === "queries" ? "train" : "queries";
    const open = make("button", { type: "button", "aria-label": `Open ${described(example)}` }, "Open");
    open.addEventListener("click", () => { location.hash = `${other}/${example.place}`; });
    const item = make("li", { class: "hit" }, ...this.content(example),
      make("p", { class: "score" }, hit.signed, make("span", { class: "soft" }, ` ${this.facts.unit}`)),
      make("p", { class: "about" }, example.label ? `label ${example.label} · ` : "", make("span", { class: "soft" }, `id ${example.word}`)),
      this.shares(hit));
    const actions = make("div", { class: "actions" }, open, other === "train" ? this.trayButton(example) : null);
    if (this.facts.tokens) actions.append(this.tokensButton(hit, item));
    item.append(actions);
    return item;
  }

  shares(hit) {
    if (hit.parts.length < 2) return null;
    const total = hit.parts.reduce((sum, part) => sum + Math.abs(part), 0) || 1;
    return make("ol", { class: "shares" }, ...hit.parts.map((part, segment) => {
      const share = Math.round((100 * Math.abs(part)) / total);
      const bar = make("span", { class: part * this.towards < 0 ? "bar against" : "bar" });
      bar.style.width = `${share}%`;
      return make("li", { title: this.facts.segments[segment] }, make("span", {}, String(segment + 1)), make("span", { class: "track" }, bar),
        make("span", { class: "percent" }, `${part * hit.score < 0 && share ? "−" : ""}${share} %`));
    }));
  }

  tokensButton(hit, item) {
    const button = make("button", { type: "button" }, "Which words");
    const [query, place] = this.kind === "queries" ? [this.place, hit.example.place] : [hit.example.place, this.place];
    button.addEventListener("click", async () => {
      button.disabled = true;
      const tokens = await this.backend.tokens(query, place);
      const words = tokens.map((token) => {
        const word = make("span", { class: `token ${token.share * this.towards >= 0 ? "up" : "down"}`, title: token.score.toPrecision(3) }, token.text);
        word.style.setProperty("--share", Math.abs(token.share));
        return word;
      });
      item.querySelector(".text")?.remove();
      item.prepend(make("p", { class: "text tokens", dir: "auto" }, ...words));
    });
    return button;
  }
}
