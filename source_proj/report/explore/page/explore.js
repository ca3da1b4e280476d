"use strict";

/** Asks the server. */
const served = {
  async ask(path) {
    const response = await fetch(`api/${path}`);
    const answer = await response.json();
    if (!response.ok) throw new Error(answer.error);
    return answer;
  },
  facts: () => served.ask("facts"),
  labels: (kind) => served.ask(`${kind}/labels`),
  listed: (kind, { words, label, stage }, start, count) =>
    served.ask(`${kind}?${new URLSearchParams({ words, label, stage, start, count })}`),
  example: (kind, place) => served.ask(`${kind}/${place}`),
  strongest: (kind, place, sense, page) => served.ask(`${kind}/${place}/${sense}?page=${page}`),
  tokens: (query, place) => served.ask(`tokens/${query}/${place}`),
};

/** Answers from data.js, of a folder on disk. */
function onDisk(data) {
  const examples = { queries: new Map(), train: new Map() };
  for (const kind of ["queries", "train"]) for (const example of data[kind]) examples[kind].set(example.place, example);
  const hit = (kind, place, [, score, signed, parts]) => ({ example: examples[kind].get(place), score, signed, parts });
  return {
    facts: async () => data.facts,
    labels: async (kind) => data.labels[kind],
    async listed(kind, { words, label }, start, count) {
      const wanted = words.toLowerCase().split(/\s+/).filter(Boolean);
      const kept = data[kind].filter((example) => {
        const text = `${example.word} ${example.label || ""} ${example.text || ""}`.toLowerCase();
        return (!label || example.label === label) && wanted.every((word) => text.includes(word));
      });
      return { total: kept.length, examples: kept.slice(start, start + count) };
    },
    async example(kind, place) {
      if (!examples[kind].has(place)) throw new Error("this example is not in the folder");
      return examples[kind].get(place);
    },
    async strongest(kind, place, sense) {
      if (kind === "queries") return { hits: data.lists[place][sense].map((entry) => hit("train", entry[0], entry)), more: false };
      const hits = data.lists.flatMap((lists, query) =>
        lists[sense].filter((entry) => entry[0] === place).map((entry) => hit("queries", query, entry)));
      return { hits: hits.sort((a, b) => Math.abs(b.score) - Math.abs(a.score)), more: false };
    },
  };
}

function fillSelect(select, first, options) {
  select.replaceChildren(...[["", first], ...options].map(([value, name]) => make("option", { value }, name)));
  select.hidden = options.length < 2;
}

async function start() {
  const backend = window.exploreData ? onDisk(window.exploreData) : served;
  const facts = await backend.facts();
  const tray = new Tray(facts.cleans);
  const detail = new Detail(facts, backend, tray);
  const [search, label, stage, box, count] = ["search", "label", "stage", "rows", "count"].map((id) => document.getElementById(id));
  let kind = "queries";

  document.title = document.getElementById("title").textContent = facts.title;
  const kept = window.exploreData ? "; this folder holds those training examples alone that are among the strongest of some query" : "";
  document.getElementById("facts").textContent =
    `${facts.queries.toLocaleString("en")} queries, ${facts.train.toLocaleString("en")} training examples, ${facts.method}; ${facts.unit_in_words}${kept}`;
  document.body.dataset.told = "true";

  let reading = false;

  /** How many there are; of examples that are read for the first time, how many so far. */
  function tell({ total, read }) {
    reading = read < 1;
    count.setAttribute("aria-busy", String(reading));
    const share = reading ? ` so far, ${Math.floor(100 * read)} % searched` : "";
    count.textContent = `${total.toLocaleString("en")} ${kind === "queries" ? "queries" : "training examples"}${share}`;
  }

  const list = new VirtualList(box, {
    open: (example) => { location.hash = `${list.kind}/${example.place}`; },
    choose: (example) => { if (list.kind === "train") tray.toggle(example); },
    render(option, example) {
      const image = picture(example);
      option.classList.toggle("plain", !image);
      const known = inWords(example);
      const names = [example.label ? `label ${example.label}` : "", `id ${example.word}`].filter(Boolean);
      const lines = known ? [known, names.reverse().join(" · ")] : names;
      if (image) option.append(image);
      option.append(make("span", {}, ...lines.map((line) => make("span", { class: "line", dir: "auto" }, line))));
      if (list.kind === "train" && tray.has(example)) option.append(make("span", { title: "in the tray" }, "✓"));
    },
  });

  function fail(error) {
    count.textContent = error.message;
    count.classList.add("wrong");
  }

  let waiting = 0;
  let following = 0;

  /** List what the fields ask for now; rows and count change together, and a late answer changes neither. */
  async function reset() {
    clearTimeout(waiting);
    clearTimeout(following);
    count.classList.remove("wrong");
    const [its, filter] = [kind, { words: search.value, label: label.value, stage: stage.value }];
    const asked = (first, size) => backend.listed(its, filter, first, size);
    try {
      const answer = await list.reset(asked, its);
      if (!answer) return;
      tell(answer);
      goOn(asked, list.version);
    } catch (error) {
      fail(error);
    }
  }

  /** A search finds more while the examples are read: the list grows, and nothing in sight moves. */
  function goOn(asked, version) {
    if (reading) following = setTimeout(async () => {
      try {
        const answer = await asked(0, 0);
        if (version !== list.version) return;
        tell(answer);
        list.grow(answer.total);
        goOn(asked, version);
      } catch (error) {
        if (version === list.version) fail(error);
      }
    }, 500);
  }

  function choose(other) {
    kind = other;
    for (const tab of document.querySelectorAll("[role=tab]")) {
      const selected = tab.dataset.kind === kind;
      tab.setAttribute("aria-selected", String(selected));
      tab.tabIndex = selected ? 0 : -1;
    }
    box.setAttribute("aria-labelledby", `tab-${kind}`);
    fillSelect(label, "any label", []);
    fillSelect(stage, "any stage", kind === "train" && !window.exploreData ? facts.stages.map((name, place) => [place, name]) : []);
    return reset().then(() => { offerLabels().catch(fail); });
  }

  /** What labels there are is known when all examples were read; the list is there before. */
  async function offerLabels() {
    const its = kind;
    const names = await backend.labels(its);
    if (its === kind) fillSelect(label, "any label", names.map((name) => [name, name]));
  }

  async function follow() {
    const [, its, place] = /^#(queries|train)\/(\d+)$/.exec(location.hash || (facts.queries ? "#queries/0" : "")) || [];
    if (!its) return;
    try {
      await detail.show(its, Number(place));
      if (location.hash && matchMedia("(max-width: 46rem)").matches) detail.box.scrollIntoView();
    } catch (error) {
      fail(error);
    }
  }

  search.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(reset, 150);
  });
  search.addEventListener("keydown", (event) => {
    if (event.key !== "ArrowDown" && event.key !== "Enter" && event.key !== "Escape") return;
    event.preventDefault();
    reset(); // the keys that follow mean what was typed
    box.focus();
  });
  label.addEventListener("change", reset);
  stage.addEventListener("change", reset);
  const tabs = document.querySelector("[role=tablist]");
  tabs.addEventListener("click", (event) => { if (event.target.dataset.kind) choose(event.target.dataset.kind); });
  tabs.addEventListener("keydown", (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    choose(kind === "queries" ? "train" : "queries");
    document.getElementById(`tab-${kind}`).focus();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || event.ctrlKey || event.metaKey || event.target.matches("input, select")) return;
    event.preventDefault();
    search.focus();
    search.select();
  });
  document.addEventListener("tray", () => list.draw());
  window.addEventListener("hashchange", follow);
  await choose("queries");
  await follow();
  document.body.dataset.ready = "true";
}

start().catch((error) => { document.getElementById("facts").textContent = `This page could not be filled: ${error.message}`; });
