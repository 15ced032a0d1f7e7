// The list of features: sorted, searched, filtered; only the rows in sight are in the document.
"use strict";

const ROW = 30, BUFFER = 12; // pixels of a row, as in style.css; rows beyond what is in sight

const COLUMNS = [
  { key: "feature", label: "feature", width: "5.5rem", numeric: true, about: "its number in the dictionary" },
  { key: "density", label: "density", width: "7.5rem", numeric: true, form: percent,
    about: "share of held-out tokens on which it fires" },
  { key: "max", label: "max", width: "5rem", numeric: true, about: "largest activation on held-out text" },
  { key: "top_token", label: "top token", width: "9rem", mono: true,
    about: "the commonest among its strongest firings" },
  { key: "n_eff", label: "eff. concepts", width: "11rem", numeric: true, form: two, interval: true,
    about: "effective number of concepts with its 95 % interval; 1: a single one" },
  { key: "concept", label: "best concept", width: "8rem", about: "the one it detects best, chosen on source A" },
  { key: "auroc", label: "AUROC", width: "10rem", numeric: true, form: two, interval: true,
    about: "of detecting that concept on source B, with its 95 % interval; chance 0.5" },
  { key: "interpretability", label: "described", width: "6rem", numeric: true, form: two,
    about: "balanced accuracy of its description on other documents; chance 0.5" },
  { key: "description", label: "description", width: "auto", about: "a rule found on other documents" },
];

const list = {
  sort: "feature", isUp: true, query: "", concept: "", isJudged: false,
  order: [], // places in the index, as shown
  at: 0, // of the row that the keys have reached
};

// What can be searched of each feature, in lower case; made once.
function searchable() {
  const columns = ["feature", "top_token", "concept", "description"].map(column);
  list.words ??= column("feature").map((_, i) => columns.map((of) => of[i] ?? "").join(" ").toLowerCase());
  return list.words;
}

function selectRows() {
  const words = list.query.toLowerCase().split(/\s+/).filter(Boolean), text = searchable();
  const concepts = column("concept"), judged = column("n_eff"), values = column(list.sort);
  const collator = new Intl.Collator("en"), sign = list.isUp ? 1 : -1;
  list.order = [...text.keys()].filter((i) => (!list.concept || concepts[i] === list.concept)
    && (!list.isJudged || isKnown(judged[i])) && words.every((word) => text[i].includes(word)));
  list.order.sort((a, b) => {
    const x = values[a], y = values[b];
    if (!isKnown(x) || !isKnown(y)) return isKnown(y) - isKnown(x) || a - b; // what is not known is last
    return sign * (typeof x === "string" ? collator.compare(x, y) : x - y) || a - b;
  });
  list.at = Math.max(0, Math.min(list.at, list.order.length - 1));
}

function cell(c, place) {
  const value = column(c.key)[place];
  if (c.key === "feature") return h("td", { class: "number" }, featureLink(value));
  if (c.key === "density" && value === 0) return h("td", { class: "number soft" }, "dead");
  const kind = [c.numeric && "number", c.mono && "mono", !isKnown(value) && "soft"].filter(Boolean).join(" ");
  const text = !isKnown(value) ? "–" : c.mono ? visible(value) : c.numeric ? number(value, c.form) : value;
  const limits = c.interval && bracket(column(`${c.key}_low`)[place], column(`${c.key}_high`)[place]);
  return h("td", { class: kind, title: typeof value === "string" ? text : null }, text,
    limits && [" ", h("small", null, limits)]);
}

function listTools(again) {
  const { concepts = [] } = index().about;
  const change = (key, value) => { list[key] = value; list.at = 0; again(); };
  return [
    h("input", { type: "search", id: "search", value: list.query, "aria-label": "Search",
      placeholder: "Search number, token, concept, words", oninput: (e) => change("query", e.target.value) }),
    h("select", { id: "concept", "aria-label": "Concept", onchange: (e) => change("concept", e.target.value) },
      h("option", { value: "" }, "any concept"),
      concepts.map(({ name }) => h("option", { value: name, selected: name === list.concept }, name))),
    h("label", null, h("input", { type: "checkbox", id: "judged", checked: list.isJudged,
      onchange: (e) => change("isJudged", e.target.checked) }), "only those active enough to be judged"),
  ];
}

function listView() {
  const body = h("tbody"), counted = h("span", { class: "soft", role: "status", id: "count" });
  const heads = COLUMNS.map((c) => h("th", { class: c.numeric && "number", scope: "col" },
    h("button", { type: "button", title: c.about, onclick: () => sortBy(c) }, c.label)));
  const table = h("table", { "aria-label": "Features" },
    h("colgroup", null, COLUMNS.map((c) => h("col", { style: { width: c.width } }))),
    h("thead", null, h("tr", null, heads)), body);
  const scroll = h("div", { class: "scroll", id: "scroll", onscroll: draw }, table);

  function sortBy(c) {
    list.isUp = list.sort === c.key ? !list.isUp : !c.numeric || c.key === "feature";
    Object.assign(list, { sort: c.key, at: 0 });
    again();
  }
  function again() { selectRows(); scroll.scrollTop = 0; draw(); }
  const gap = (n) => n > 0 && h("tr", { "aria-hidden": "true" },
    h("td", { class: "gap", colspan: COLUMNS.length, style: { height: `${n * ROW}px` } }));
  const row = (place, i) => h("tr", { "aria-current": i === list.at && "true", "aria-rowindex": i + 2,
    onclick: () => { list.at = i; openFeature(column("feature")[place]); } }, COLUMNS.map((c) => cell(c, place)));

  function draw() {
    const n = list.order.length, total = column("feature").length;
    const first = Math.max(0, Math.floor(scroll.scrollTop / ROW) - BUFFER);
    const last = Math.min(n, first + Math.ceil((scroll.clientHeight || 900) / ROW) + 2 * BUFFER);
    const rows = list.order.slice(first, last).map((place, i) => row(place, first + i));
    body.replaceChildren(...[gap(first), ...rows, gap(n - last)].filter(Boolean));
    table.setAttribute("aria-rowcount", n + 1);
    heads.forEach((head, i) => {
      if (COLUMNS[i].key !== list.sort) head.removeAttribute("aria-sort");
      else head.setAttribute("aria-sort", list.isUp ? "ascending" : "descending");
    });
    counted.textContent = n === total ? `${whole(n)} features` : `${whole(n)} of ${whole(total)} features`;
  }

  view.move = (by) => {
    list.at = Math.max(0, Math.min(list.order.length - 1, list.at + by));
    const top = list.at * ROW, height = scroll.clientHeight - 2 * ROW; // less the head and the row
    if (top < scroll.scrollTop) scroll.scrollTop = top;
    if (top > scroll.scrollTop + height) scroll.scrollTop = top - height;
    draw();
  };
  view.enter = () => list.order.length && openFeature(column("feature")[list.order[list.at]]);
  view.shown = () => { draw(); scroll.scrollTop = Math.max(0, (list.at - 8) * ROW); };
  return h("div", { class: "list" }, h("div", { class: "tools" }, listTools(again), counted), scroll);
}
