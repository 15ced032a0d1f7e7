// The feature browser: one page, three views, data in scripts that call dashboard.receive.
// Opened from disk there is no server to ask, so chunks of features are loaded as scripts.
"use strict";

const dashboard = (() => {
  const CHUNK = 32, ROW = 30, BUFFER = 12;
  const waiting = new Map(), data = new Map();
  const state = { sort: "feature", up: true, query: "", concept: "", judged: false, order: [], at: 0 };

  // --- data ----------------------------------------------------------------------------------

  function receive(name, content) {
    data.set(name, content);
    (waiting.get(name) || []).forEach((done) => done(content));
    waiting.delete(name);
    if (name === "index") start(content);
  }

  function load(name) {
    if (data.has(name)) return Promise.resolve(data.get(name));
    return new Promise((done, fail) => {
      if (waiting.has(name)) return waiting.get(name).push(done);
      waiting.set(name, [done]);
      const script = document.createElement("script");
      script.src = `data/${name}.js`;
      script.onerror = () => { waiting.delete(name); fail(new Error(`data/${name}.js is missing`)); };
      document.head.append(script);
    });
  }

  const index = () => data.get("index");
  const column = (key) => index().columns[key];
  const chunkOf = (place) => `features/${String(Math.floor(place / CHUNK)).padStart(5, "0")}`;

  // --- small things ----------------------------------------------------------------------------

  // Text is always a text node: no string of the data is ever read as HTML.
  function h(tag, attributes, ...children) {
    const svg = ["svg", "g", "rect", "line", "text", "circle", "title"].includes(tag);
    const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag)
      : document.createElement(tag);
    for (const [key, value] of Object.entries(attributes || {})) {
      if (key.startsWith("aria-")) { node.setAttribute(key, `${value}`); continue; }
      if (value === null || value === undefined || value === false) continue;
      if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
      else if (key === "style") Object.assign(node.style, value);
      else node.setAttribute(key, value === true ? "" : value);
    }
    for (const child of children.flat(3)) {
      if (child !== null && child !== undefined) node.append(child);
    }
    return node;
  }

  const minus = (text) => text.replace("-", "\u2212");
  const clean = (value) => minus(parseFloat(value.toPrecision(3)).toString());
  function number(value, form = clean) {
    return value === null || value === undefined ? "–" : form(value);
  }
  const percent = (share) => `${clean(100 * share)} %`;
  const two = (value) => minus(value.toFixed(2));
  function bracket(low, high, form = two) {
    return low === null || low === undefined ? "" : ` [${form(low)}, ${form(high)}]`;
  }
  const visible = (token) => token.replace(/ /g, "·").replace(/\n/g, "↵").replace(/\t/g, "→")
    .replace(/[\u0000-\u001f\u2028\u2029\u00a0]/g, "␣") || "(rest of a character)";
  const link = (feature, label) => h("a", { href: `#/feature/${feature}` }, label ?? `${feature}`);

  function tip(node, text) {
    const show = () => {
      const box = document.getElementById("tip"), place = node.getBoundingClientRect();
      box.textContent = text();
      box.hidden = false;
      box.style.left = `${Math.max(4, Math.min(place.left, innerWidth - box.offsetWidth - 8))}px`;
      box.style.top = place.top > 40 ? `${place.top - box.offsetHeight - 4}px` : `${place.bottom + 4}px`;
    };
    const hide = () => { document.getElementById("tip").hidden = true; };
    node.addEventListener("mouseenter", show);
    node.addEventListener("focus", show);
    node.addEventListener("mouseleave", hide);
    node.addEventListener("blur", hide);
    return node;
  }

  function heat(node, value, largest) {
    if (value > 0) {
      node.style.backgroundColor = `rgba(var(--fire), ${0.12 + 0.63 * Math.min(1, value / largest)})`;
    }
    return node;
  }

  // --- the list ----------------------------------------------------------------------------------

  const COLUMNS = [
    { key: "feature", label: "feature", width: "6rem", numeric: true },
    { key: "density", label: "fires on", width: "7rem", numeric: true, form: percent,
      about: "share of held-out tokens" },
    { key: "max", label: "largest", width: "6rem", numeric: true, about: "largest activation" },
    { key: "top_token", label: "top token", width: "9rem", mono: true,
      about: "the commonest among its strongest firings" },
    { key: "n_eff", label: "concepts", width: "11rem", numeric: true, form: two, interval: true,
      about: "effective number of concepts, 1 for a single one, with 95 % interval" },
    { key: "concept", label: "best concept", width: "9rem" },
    { key: "auroc", label: "AUROC", width: "10rem", numeric: true, form: two, interval: true,
      about: "how well it detects that concept, on other people's documents" },
    { key: "interpretability", label: "described", width: "6.5rem", numeric: true, form: two,
      about: "balanced accuracy of its description on other documents; chance 0.5" },
    { key: "description", label: "description", width: "auto" },
  ];

  function select() {
    const words = state.query.toLowerCase().split(/\s+/).filter(Boolean), n = column("feature").length;
    const searched = ["feature", "top_token", "concept", "description"].map(column);
    state.order = [];
    for (let i = 0; i < n; i++) {
      if (state.concept && column("concept")[i] !== state.concept) continue;
      if (state.judged && column("n_eff")[i] === null) continue;
      const found = words.length === 0 || (() => {
        const text = searched.map((of) => of[i] ?? "").join(" ").toLowerCase();
        return words.every((word) => text.includes(word));
      })();
      if (found) state.order.push(i);
    }
    const values = column(state.sort), sign = state.up ? 1 : -1;
    state.order.sort((a, b) => {
      const x = values[a], y = values[b];
      if (x === null || y === null) return (x === null) - (y === null) || a - b; // nothing is last
      return (typeof x === "string" ? x.localeCompare(y) : x - y) * sign || a - b;
    });
    state.at = Math.max(0, Math.min(state.at, state.order.length - 1));
  }

  function listView() {
    const body = h("tbody"), counted = h("span", { class: "soft", role: "status", id: "count" });
    const heads = COLUMNS.map((c) => h("th", { class: c.numeric && "number", scope: "col", "data-key": c.key },
      h("button", { type: "button", title: c.about, onclick: () => sortBy(c) }, c.label)));
    const table = h("table", { "aria-label": "Features" },
      h("colgroup", null, COLUMNS.map((c) => h("col", { style: { width: c.width } }))),
      h("thead", null, h("tr", null, heads)), body);
    const scroll = h("div", { class: "scroll", id: "scroll", onscroll: draw }, table);
    const search = h("input", { type: "search", id: "search", value: state.query,
      placeholder: "number, token, concept, words", "aria-label": "Search",
      oninput: (e) => { state.query = e.target.value; state.at = 0; again(); } });
    const concepts = h("select", { id: "concept", "aria-label": "Concept",
      onchange: (e) => { state.concept = e.target.value; state.at = 0; again(); } },
      h("option", { value: "" }, "any concept"),
      index().about.concepts.map((c) => h("option", { value: c.name, selected: c.name === state.concept }, c.name)));
    const judged = h("input", { type: "checkbox", id: "judged", checked: state.judged,
      onchange: (e) => { state.judged = e.target.checked; state.at = 0; again(); } });

    function sortBy(c) {
      state.up = state.sort === c.key ? !state.up : !c.numeric || c.key === "feature";
      state.sort = c.key;
      state.at = 0;
      again();
    }
    function again() { select(); scroll.scrollTop = 0; draw(); }
    function pad(height) {
      return h("tr", { class: "pad", "aria-hidden": "true" },
        h("td", { colspan: COLUMNS.length, style: { height: `${height}px` } }));
    }
    function draw() {
      const n = state.order.length;
      const first = Math.max(0, Math.floor(scroll.scrollTop / ROW) - BUFFER);
      const last = Math.min(n, first + Math.ceil((scroll.clientHeight || 700) / ROW) + 2 * BUFFER);
      body.replaceChildren(pad(first * ROW), ...state.order.slice(first, last).map(
        (place, i) => row(place, first + i)), pad((n - last) * ROW));
      table.setAttribute("aria-rowcount", n + 1);
      heads.forEach((head) => {
        if (head.dataset.key !== state.sort) head.removeAttribute("aria-sort");
        else head.setAttribute("aria-sort", state.up ? "ascending" : "descending");
      });
      const total = column("feature").length;
      counted.textContent = n === total ? `${n.toLocaleString("en")} features`
        : `${n.toLocaleString("en")} of ${total.toLocaleString("en")} features`;
    }
    function row(place, i) {
      return h("tr", { "aria-selected": i === state.at, "aria-rowindex": i + 2,
        onclick: () => { state.at = i; open(column("feature")[place]); } }, COLUMNS.map((c) => cell(c, place)));
    }
    function cell(c, place) {
      const value = column(c.key)[place];
      if (c.key === "feature") return h("td", { class: "number" }, link(value));
      if (c.key === "density" && value === 0) return h("td", { class: "number soft" }, "dead");
      const text = value === null ? "–" : c.mono ? visible(value) : c.numeric ? number(value, c.form) : value;
      return h("td", { class: [c.numeric && "number", c.mono && "mono", value === null && "soft"].filter(Boolean).join(" "),
        title: typeof value === "string" ? value : null }, text,
        c.interval && value !== null ? h("small", null,
          bracket(column(`${c.key}_low`)[place], column(`${c.key}_high`)[place])) : null);
    }

    select();
    view.move = (by) => {
      state.at = Math.max(0, Math.min(state.order.length - 1, state.at + by));
      const top = state.at * ROW, height = scroll.clientHeight - 2 * ROW;
      if (top < scroll.scrollTop) scroll.scrollTop = top;
      if (top > scroll.scrollTop + height) scroll.scrollTop = top - height;
      draw();
    };
    view.enter = () => state.order.length && open(column("feature")[state.order[state.at]]);
    view.shown = () => { scroll.scrollTop = Math.max(0, (state.at - 4) * ROW); draw(); };
    return h("div", { class: "list" }, h("div", { class: "tools" }, search, concepts,
      h("label", null, judged, "only those active enough to be judged"), counted), scroll);
  }

  // --- contexts ----------------------------------------------------------------------------------

  function contextLine(context, largest) {
    const where = [context.concept, context.source].filter(Boolean).join(", ");
    return h("div", { class: "context" }, h("span", { class: "where" }, where),
      context.tokens.map((token, i) => {
        const act = context.acts[i];
        const node = h("span", { class: i === context.focus ? "token focus" : "token",
          tabindex: act > 0 ? 0 : null, "data-act": act }, token.replace(/\n/g, "↵"));
        return heat(tip(node, () => `${visible(token)}  ${act > 0 ? clean(act) : "silent"}`), act, largest);
      }));
  }

  function contexts(list, largest, none) {
    return list && list.length ? list.map((one) => contextLine(one, largest)) : h("p", { class: "soft" }, none);
  }

  const maxOf = (list) => Math.max(1e-9, ...(list || []).flatMap((c) => c.acts));

  // --- pictures ----------------------------------------------------------------------------------

  function histogram(found, title, n) {
    const width = 380, height = 130, left = 34, bottom = 24, top = 8;
    const bins = found.edges.length - 1, step = (width - left) / bins;
    const sums = Object.entries(found.by_concept).map(([name, counts]) => [name, counts.reduce((a, b) => a + b, 0)]);
    sums.sort((a, b) => b[1] - a[1]);
    const named = sums.slice(0, 5).map(([name]) => name);
    const groups = named.map((name) => [name, found.by_concept[name]]);
    if (sums.length > 5) {
      groups.push(["others", found.edges.slice(1).map((_, i) => sums.slice(5).reduce((a, [name]) => a + found.by_concept[name][i], 0))]);
    }
    const totals = found.edges.slice(1).map((_, i) => groups.reduce((a, [, counts]) => a + counts[i], 0));
    const largest = Math.max(1, ...totals), y = (v) => (height - top) * v / largest;
    const stacked = found.edges.slice(1).map((edge, i) => {
      let base = height;
      return groups.map(([name, counts], c) => {
        base -= y(counts[i]);
        return counts[i] ? h("rect", { x: left + i * step + 0.5, y: base, width: step - 1, height: y(counts[i]),
          fill: `var(--c${c})` }, h("title", null, `${clean(found.edges[i])} to ${clean(edge)}: ${counts[i]} of ${name}`)) : null;
      });
    });
    const total = sums.reduce((a, [, s]) => a + s, 0);
    if (!total) return h("p", { class: "soft" }, "silent on the concept corpus");
    return [h("svg", { viewBox: `0 0 ${width} ${height + bottom}`, role: "img", "aria-label": title },
      stacked, h("line", { class: "axis", x1: left, x2: width, y1: height, y2: height }),
      [0, 0.5, 1].map((share) => h("text", { x: left + share * (width - left), y: height + 12,
        "text-anchor": share === 1 ? "end" : share ? "middle" : "start" }, clean(share * found.edges[bins]))),
      h("text", { x: left + (width - left) / 2, y: height + 22, "text-anchor": "middle" }, "activation"),
      h("text", { x: left - 4, y: top + 4, "text-anchor": "end" }, `${largest}`),
      h("text", { x: left - 4, y: height, "text-anchor": "end" }, "0")),
    h("div", { class: "legend" }, groups.map(([name], c) => h("span", null,
      h("i", { style: { background: `var(--c${c})` } }), name))),
    h("p", { class: "soft" }, `${total.toLocaleString("en")} firings on ${n.toLocaleString("en")} tokens of the concept corpus`)];
  }

  function plainHistogram(found, n) {
    const width = 380, height = 60, left = 34, bins = found.counts.length, step = (width - left) / bins;
    const largest = Math.max(1, ...found.counts), y = (v) => height * Math.log1p(v) / Math.log1p(largest);
    return [h("svg", { viewBox: `0 0 ${width} ${height + 2}`, role: "img", "aria-label": "Held-out activations" },
      found.counts.map((count, i) => h("rect", { x: left + i * step + 0.5, y: height - y(count), width: step - 1,
        height: y(count), fill: "var(--bar)" }, h("title", null,
        `${clean(found.edges[i])} to ${clean(found.edges[i + 1])}: ${count} tokens`))),
      h("line", { class: "axis", x1: left, x2: width, y1: height, y2: height }),
      h("text", { x: left - 4, y: 9, "text-anchor": "end" }, `${largest}`)),
    h("p", { class: "soft" }, `held-out text, ${n.toLocaleString("en")} firings, logarithmic`)];
  }

  function conceptBars(bars) {
    const shown = bars.filter((bar, i) => i < 6 || bar.lift_low > 2).slice(0, 10);
    const width = 380, left = 88, right = 96, line = 17, x = (v) => left + (width - left - right) * v;
    return h("svg", { viewBox: `0 0 ${width} ${shown.length * line + 4}`, role: "img",
      "aria-label": "Shares of concepts" }, shown.map((bar, i) => {
      const y = i * line + 3;
      return h("g", null,
        h("text", { x: left - 6, y: y + 10, "text-anchor": "end" }, bar.concept),
        h("rect", { x: left, y, width: Math.max(0.5, x(bar.share) - left), height: line - 5,
          fill: bar.lift_low > 2 ? "var(--c0)" : "var(--bar)" },
        h("title", null, `${percent(bar.share)} of its activity per token; ${number(bar.lift)} times as often as elsewhere, at least ${number(bar.lift_low)}`)),
        h("line", { class: "whisker", x1: x(bar.share_low), x2: x(bar.share_high), y1: y + 6, y2: y + 6 }),
        h("text", { x: width - right + 6, y: y + 10 },
          `${Math.round(100 * bar.share)} [${Math.round(100 * bar.share_low)}, ${Math.round(100 * bar.share_high)}] %`));
    }));
  }

  // --- a feature ---------------------------------------------------------------------------------

  const panel = (title, note, ...children) => h("section", { class: "panel" },
    h("h3", null, title, note ? h("small", null, note) : null), children);

  function featureView(feature) {
    const place = column("feature").indexOf(feature), about = index().about;
    const page = h("article", { class: "feature", id: "feature", "data-feature": feature });
    if (place < 0) {
      page.append(h("p", { class: "error" }, `Feature ${feature} was not collected: of ${about.d_sae} features there are ${about.n_collected}.`));
      return page;
    }
    const at = state.order.indexOf(place);
    if (at >= 0) state.at = at;
    const value = (key) => column(key)[place];
    page.append(h("h2", null, `Feature ${feature}`, h("small", null, value("description") || "")), h("div", { class: "facts number" },
      fact("fires on", value("density") ? `${percent(value("density"))} of ${about.n_tokens.toLocaleString("en")} held-out tokens` : "no held-out token"),
      fact("largest activation", number(value("max"))),
      fact("effective number of concepts", number(value("n_eff"), two) + bracket(value("n_eff_low"), value("n_eff_high"))),
      value("concept") && fact("detects best", `${value("concept")}, AUROC ${two(value("auroc"))}${bracket(value("auroc_low"), value("auroc_high"))}`),
      fact("description scores", number(value("interpretability"), two))));
    view.move = (by) => {
      const next = state.order[state.order.indexOf(place) + by];
      if (next !== undefined) open(column("feature")[next]);
    };
    const body = h("div", null, h("p", { class: "soft" }, "Loading …"));
    page.append(body);
    load(chunkOf(place)).then((chunk) => {
      const entry = chunk.find((one) => one.feature === feature);
      body.replaceChildren(...featureBody(entry, value, about));
      page.dataset.ready = "true";
    }, (error) => body.replaceChildren(h("p", { class: "error" }, error.message)));
    return page;
  }

  const fact = (label, text) => h("span", null, h("span", { class: "soft" }, `${label} `), h("b", null, text));

  function featureBody(entry, value, about) {
    const largest = Math.max(value("max") || 0, maxOf(entry.examples.top)), n = about.n_concept_tokens;
    const isDead = !value("n_firings");
    const why = isDead ? "It fires on none of the held-out tokens." : "It fires too rarely to be judged by concepts: on fewer than 50 tokens or 40 documents of a half of the corpus.";
    const left = h("div", null,
      panel("Activations by concept", null, histogram(entry.histogram, "Activations by concept", n),
        isDead ? null : plainHistogram(entry.histogram, value("n_firings"))),
      panel("Concepts", "share of activity per token, 95 % intervals; blue: lift over 2",
        entry.concepts ? conceptBars(entry.concepts) : h("p", { class: "soft" }, why)),
      entry.precision ? panel(`As a detector of ${entry.precision.concept || value("concept")}`, "threshold from other documents",
        smallTable(["precision", "recall", "F1", "average precision"], [[
          entry.precision.precision ?? entry.precision.value, entry.precision.recall, entry.precision.f1,
          entry.precision.average_precision].map((v) => number(v, two))])) : null,
      panel("Logits", "what it writes, times the unembedding", h("div", { class: "logits" },
        ["top", "bottom"].map((end) => smallTable([end === "top" ? "likelier" : "less likely", ""],
          entry.logits[end].map(([token, v]) => [h("span", { class: "mono" }, visible(token)), two(v)]))))),
      entry.effect ? effectPanel(entry.effect) : null,
      panel("Nearest features", "cosine of decoder rows", entry.neighbours.length
        ? smallTable(["dictionary", "seed", "feature", "cosine"], entry.neighbours.map((other) => [
          h("a", { href: `../${encodeURIComponent(other.sae.replace(/\//g, "_"))}/index.html#/feature/${other.feature}` }, other.sae),
          `${other.seed ?? "–"}${other.same_seed ? " (same)" : ""}`, `${other.feature}`, two(other.cosine)]))
        : h("p", { class: "soft" }, "no other dictionary of this width in the run")));
    const right = h("div", null,
      panel("Strongest", "at most one of a document where there are enough", contexts(entry.examples.top, largest, why)),
      entry.examples.intervals.map((part) => panel(`${clean(part.low)} to ${clean(part.high)}`,
        part.n_firings === undefined ? null : `${part.n_firings.toLocaleString("en")} firings, some drawn at random`,
        contexts(part.contexts, largest, "none"))),
      panel("Silent, though alike", "on the same tokens, or in the most similar contexts",
        contexts(entry.examples.near_miss, largest, "not measured: it fires too rarely")));
    const pair = h("div", { class: "pair" }, beside("Nearest neuron", entry.nearest_neuron, about),
      beside("Random direction", entry.random_direction, about));
    return [h("div", { class: "columns" }, left, right),
      h("h3", null, "At the same firing rate, on the concept corpus"), pair,
      h("details", null, h("summary", null, "Provenance"), aboutTable())];
  }

  function beside(title, unit, about) {
    if (!unit) return panel(title, null, h("p", { class: "soft" }, "not measured"));
    const note = unit.neuron === undefined ? null
      : `${unit.hook_name} ${unit.neuron}, correlation ${two(unit.correlation)}`;
    const named = (unit.concepts || []).slice(0, 3).map((bar) => `${bar.concept} ${Math.round(100 * bar.share)} %`).join(", ");
    return panel(title, note,
      h("p", null, "effective number of concepts ", h("b", null, number(unit.n_eff, two)), named ? `: ${named}` : ""),
      unit.histogram_by_concept ? histogram(unit.histogram_by_concept, title, about.n_concept_tokens) : null,
      contexts(unit.contexts, maxOf(unit.contexts), "silent"));
  }

  function effectPanel(effect) {
    return panel("What the model loses without it", "KL of the next token, nats",
      h("p", null, `mean ${clean(effect.kl)}; a random direction of its size ${clean(effect.kl_random)} (${effect.n_firings} tokens)`),
      smallTable(["concept", "KL", "tokens"], [...effect.by_concept].sort((a, b) => b.kl - a.kl)
        .map((one) => [one.concept, clean(one.kl), `${one.n_firings}`])));
  }

  function smallTable(heads, rows) {
    return h("table", { class: "small" }, h("thead", null, h("tr", null, heads.map((head, i) =>
      h("th", { class: i ? "number" : null }, head)))), h("tbody", null, rows.map((row) =>
      h("tr", null, row.map((cell, i) => h("td", { class: i ? "number" : null }, cell))))));
  }

  // --- prompts -----------------------------------------------------------------------------------

  function promptsView() {
    const known = data.get("prompts") || [];
    const text = h("div", { class: "text mono", id: "prompt-text" }), side = h("aside", { id: "prompt-side" });
    const choose = h("select", { id: "prompt", "aria-label": "Text", onchange: () => show(known[choose.value]) },
      known.map((prompt, i) => h("option", { value: i }, prompt.title)));
    const left = h("div", null, h("div", { class: "row" }, h("label", { for: "prompt" }, "Text"), choose), live(), text);

    function live() {
      if (!location.protocol.startsWith("http")) {
        return h("p", { class: "soft" }, "To type a text of your own: python -m data_visualization.serve");
      }
      const area = h("textarea", { id: "live-text", "aria-label": "A text of your own", placeholder: "A text of your own" });
      const error = h("span", { class: "error", role: "alert" });
      const ask = async () => {
        error.textContent = "";
        const answer = await fetch("encode", { method: "POST", headers: { "Content-Type": "application/json" },
          body: JSON.stringify({ text: area.value }) });
        const found = await answer.json();
        if (answer.ok) show(found); else error.textContent = found.error;
      };
      return h("div", null, area, h("div", { class: "row" },
        h("button", { type: "button", id: "live-button", onclick: ask }, "Read"), error));
    }

    function show(prompt, only = null) {
      if (!prompt) return;
      const strength = prompt.features.map((list) => {
        const found = only === null ? list[0] : list.find(([feature]) => feature === only);
        return found ? found[1] : 0;
      });
      const largest = Math.max(1e-9, ...strength);
      const buttons = prompt.tokens.map((token, i) => {
        const [first] = prompt.features[i];
        const node = h("button", { type: "button", "aria-pressed": "false", onclick: () => pin(i) },
          token.replace(/\n/g, "↵\n"));
        return heat(tip(node, () => first ? `${visible(token)}  feature ${first[0]}: ${clean(first[1])}` : `${visible(token)}  nothing fires`),
          strength[i], largest);
      });
      function pin(i) {
        buttons.forEach((node, j) => node.setAttribute("aria-pressed", j === i));
        const most = Math.max(1e-9, ...prompt.features[i].map(([, act]) => act));
        side.replaceChildren(panel(`On ${visible(prompt.tokens[i])}`, "strongest features",
          prompt.features[i].length ? prompt.features[i].map(([feature, act]) => {
            const place = column("feature").indexOf(feature);
            return h("div", { class: "strength number" }, link(feature),
              h("div", { class: "bar", style: { width: `${100 * act / most}%` } }), h("span", null, clean(act)),
              h("p", null, (place >= 0 && column("description")[place]) || "", " ",
                h("button", { type: "button", onclick: () => show(prompt, feature) }, "where else")));
          }) : h("p", { class: "soft" }, "Nothing fires here: the first positions and special tokens are left out.")));
      }
      text.replaceChildren(...buttons);
      side.replaceChildren(panel(only === null ? "Strongest feature of each token" : `Feature ${only}`, null,
        h("p", { class: "soft" }, "Choose a token to see what fires on it."),
        only === null ? null : h("p", null, link(only, "open it"), " ", h("button", { type: "button", onclick: () => show(prompt) }, "all features"))));
    }

    if (known.length) show(known[0]);
    else text.append(h("p", { class: "soft" }, "No texts were collected."));
    return h("div", { class: "prompts" }, left, side);
  }

  // --- about -------------------------------------------------------------------------------------

  function aboutTable() {
    const { about, environment, config } = index(), rows = [];
    const flat = (of) => Object.entries(of || {}).forEach(([key, value]) => {
      if (value === null || value === "") return;
      const text = key === "concepts" && Array.isArray(value) ? value.map((c) => `${c.name} (${c.superclass})`).join(", ")
        : typeof value === "object" ? JSON.stringify(value) : `${value}`;
      if (text !== "[]" && text !== "{}") rows.push(h("dt", null, key.replaceAll("_", " ")), h("dd", { class: "mono" }, text));
    });
    [about, environment, config].forEach(flat);
    return h("dl", null, rows);
  }

  const aboutView = () => h("article", { class: "feature" }, h("h2", null, index().about.name),
    h("p", null, "Examples, densities and logits are of held-out text. Concepts are chosen on one source of a labelled corpus and measured on another, by other people; intervals draw documents anew."), aboutTable());

  // --- moving about --------------------------------------------------------------------------------

  const view = { move: () => {}, enter: () => {}, shown: () => {} };
  const open = (feature) => { location.hash = `#/feature/${feature}`; };

  function route() {
    if (!index()) return;
    document.getElementById("tip").hidden = true;
    Object.assign(view, { move: () => {}, enter: () => {}, shown: () => {} });
    const [, name = "", rest = ""] = location.hash.split("/");
    const views = { feature: () => featureView(Number(rest)), prompts: promptsView, about: aboutView };
    const main = document.getElementById("main");
    if (!state.order.length) select();
    main.replaceChildren((views[name] || listView)());
    main.scrollTop = 0;
    document.querySelectorAll("nav a").forEach((a) => {
      if (a.dataset.view === (views[name] && name !== "feature" ? name : "index")) a.setAttribute("aria-current", "page");
      else a.removeAttribute("aria-current");
    });
    document.title = name === "feature" ? `Feature ${rest}, ${index().about.name}` : index().about.name;
    view.shown();
  }

  function keys(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = ["INPUT", "TEXTAREA", "SELECT"].includes(event.target.tagName);
    if (event.key === "Escape") {
      if (document.getElementById("help").open) return;
      if (typing) event.target.blur(); else location.hash = "#/";
      return;
    }
    if (typing && event.target.id !== "search") return;
    const acts = typing ? { ArrowDown: () => view.move(1), ArrowUp: () => view.move(-1), Enter: () => view.enter() } : {
      j: () => view.move(1), k: () => view.move(-1), ArrowDown: () => view.move(1), ArrowUp: () => view.move(-1),
      Enter: () => view.enter(), p: () => { location.hash = "#/prompts"; },
      "/": () => { if (!document.getElementById("search")) { location.hash = "#/"; route(); } document.getElementById("search").focus(); },
      "?": () => document.getElementById("help").showModal(),
    };
    if (event.key === "Enter" && ["BUTTON", "A"].includes(event.target.tagName)) return;
    const onFeature = location.hash.startsWith("#/feature") && event.key.startsWith("Arrow");
    if (acts[event.key] && !onFeature) { event.preventDefault(); acts[event.key](); }
  }

  function theme(chosen) {
    document.documentElement.dataset.theme = chosen;
    try { localStorage.setItem("theme", chosen); } catch { /* not allowed from disk in some browsers */ }
  }

  function start(content) {
    const { about } = content;
    document.getElementById("title").textContent = about.name;
    document.getElementById("subtitle").textContent = [about.lm, about.hook_name, about.architecture,
      about.ratio && `1:${about.ratio}`, `${about.n_collected.toLocaleString("en")} of ${about.d_sae.toLocaleString("en")} features`].filter(Boolean).join(" · ");
    route();
  }

  let remembered = null;
  try { remembered = localStorage.getItem("theme"); } catch { /* as above */ }
  theme(remembered || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
  addEventListener("hashchange", route);
  addEventListener("keydown", keys);
  document.getElementById("help-button").addEventListener("click", () => document.getElementById("help").showModal());
  document.getElementById("theme-button").addEventListener("click",
    () => theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
  return { receive };
})();
