// The page: data that arrive in scripts, places (#/feature/7), keys.
// Opened from disk there is no server to ask, so data are scripts that call dashboard.receive.
"use strict";

// --- data --------------------------------------------------------------------------------------

const data = new Map(), waiting = new Map();

const dashboard = {
  receive(name, content) {
    data.set(name, content);
    waiting.get(name)?.done(content);
    if (name === "index") start();
  },
};

function load(name) {
  if (data.has(name)) return Promise.resolve(data.get(name));
  if (waiting.has(name)) return waiting.get(name).promise;
  const one = {};
  one.promise = new Promise((done, fail) => Object.assign(one, { done, fail }));
  waiting.set(name, one);
  document.head.append(h("script", { src: `data/${name}.js`, onerror: () => {
    waiting.delete(name);
    one.fail(new Error(`data/${name}.js is missing: build the site again`));
  } }));
  return one.promise;
}

const index = () => data.get("index");
const column = (key) => index().columns[key];
const chunkOf = (place) => `features/${String(Math.floor(place / index().chunk)).padStart(5, "0")}`;

// --- places ------------------------------------------------------------------------------------

const view = { move() {}, enter() {}, shown() {} }; // what keys do in the view that is open
const STILL = { ...view };
const VIEWS = { feature: (rest) => featureView(Number(rest)), prompts: (rest) => promptsView(Number(rest)), about: aboutView };
const openFeature = (feature) => { location.hash = `#/feature/${feature}`; };

function route() {
  if (!index()) return;
  const [, name = "", rest = ""] = location.hash.split("/"), main = document.getElementById("main");
  const { name: title = "Features" } = index().about;
  hideTip();
  Object.assign(view, STILL);
  main.replaceChildren((Object.hasOwn(VIEWS, name) ? VIEWS[name] : listView)(rest));
  main.scrollTop = 0;
  const current = name === "prompts" || name === "about" ? name : "index";
  document.querySelectorAll("nav a[data-view]").forEach((a) => {
    if (a.dataset.view === current) a.setAttribute("aria-current", "page"); else a.removeAttribute("aria-current");
  });
  document.title = name === "feature" ? `Feature ${rest}, ${title}` : title;
  view.shown();
}

function start() {
  const { about } = index(), of = `${whole(about.n_collected)} of ${whole(about.d_sae)} features`;
  document.getElementById("title").textContent = about.name || "Features";
  document.getElementById("subtitle").textContent = [about.lm, about.hook_name, about.architecture,
    isKnown(about.ratio) && `1:${about.ratio}`, of].filter(Boolean).join(" · ");
  selectRows();
  route();
}

// --- keys --------------------------------------------------------------------------------------

function search() {
  if (!document.getElementById("search")) { location.hash = "#/"; route(); }
  document.getElementById("search").focus();
}

const help = () => document.getElementById("help");
const KEYS = { j: () => view.move(1), k: () => view.move(-1), Enter: () => view.enter(), "/": search,
  p: () => { location.hash = "#/prompts"; }, "?": () => help().showModal() };
const LIST_KEYS = { ArrowDown: () => view.move(1), ArrowUp: () => view.move(-1), Enter: () => view.enter() };

function keys(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || help().open) return;
  const { target, key } = event, isTyping = ["INPUT", "TEXTAREA", "SELECT"].includes(target.tagName);
  const isBox = target.type === "checkbox", inList = Boolean(document.getElementById("scroll"));
  if (key === "Escape") {
    if (isTyping) target.blur(); else location.hash = "#/";
    return;
  }
  if (key === "Enter" && ["BUTTON", "A", "SUMMARY"].includes(target.tagName)) return;
  const known = isTyping && !isBox ? (target.id === "search" ? LIST_KEYS : {}) : { ...KEYS, ...(inList ? LIST_KEYS : {}) };
  if (Object.hasOwn(known, key)) { event.preventDefault(); known[key](); }
}

addEventListener("hashchange", route);
addEventListener("keydown", keys);
document.getElementById("help-button").addEventListener("click", () => help().showModal());
document.getElementById("theme-button").addEventListener("click", () => theme.turn());
