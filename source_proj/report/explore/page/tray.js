"use strict";

/** Training examples that were chosen, and their ways out: ids, or the file without them. */
class Tray {
  static MOST = 5000; // what an address can name

  constructor(canClean) {
    this.chosen = new Map();
    this.list = document.getElementById("tray");
    this.link = document.getElementById("save-file");
    this.link.hidden = !canClean;
    document.getElementById("save-json").addEventListener("click", () => this.save("json"));
    document.getElementById("save-csv").addEventListener("click", () => this.save("csv"));
    document.getElementById("empty").addEventListener("click", () => {
      this.chosen.clear();
      this.draw();
    });
    this.draw();
  }

  has(example) {
    return this.chosen.has(example.place);
  }

  toggle(example) {
    if (!this.chosen.delete(example.place) && this.chosen.size < Tray.MOST) this.chosen.set(example.place, example);
    this.draw();
  }

  draw() {
    const examples = [...this.chosen.values()];
    const count = examples.length;
    document.getElementById("tray-count").textContent = count ? String(count) : "empty";
    const rows = examples.slice(-100).reverse().map((example) => {
      const remove = make("button", { type: "button", "aria-label": `Take ${example.word} out of the tray` }, "×");
      remove.addEventListener("click", () => this.toggle(example));
      return make("li", {}, make("span", {}, example.word), remove);
    });
    if (count > rows.length) rows.push(make("li", { class: "soft" }, `and ${count - rows.length} more`));
    this.list.replaceChildren(...rows);
    for (const id of ["save-json", "save-csv", "empty"]) document.getElementById(id).disabled = !count;
    if (count) this.link.href = `api/cleaned?places=${[...this.chosen.keys()].join(",")}`;
    else this.link.removeAttribute("href");
    document.dispatchEvent(new Event("tray"));
  }

  save(kind) {
    const examples = [...this.chosen.values()];
    const quoted = (value) => `"${String(value).replaceAll('"', '""')}"`;
    const content = kind === "json"
      ? `[${examples.map((example) => example.json).join(",")}]`
      : ["id", ...examples.map((example) => quoted(example.cell))].join("\r\n") + "\r\n";
    const address = URL.createObjectURL(new Blob([content], { type: kind === "json" ? "application/json" : "text/csv" }));
    make("a", { href: address, download: `ids.${kind}` }).click();
    setTimeout(() => URL.revokeObjectURL(address), 1000);
  }
}
