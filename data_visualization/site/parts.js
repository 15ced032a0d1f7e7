// What all views are made of: elements, numbers, tokens, small tables, the tip at the pointer.
// Text is always a text node: no string of the data is ever read as markup.
"use strict";

const SVG = new Set(["svg", "g", "rect", "line", "text", "title"]);

function h(tag, attributes, ...children) {
  const node = SVG.has(tag) ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key === "style") Object.assign(node.style, value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

const soft = (text) => h("p", { class: "soft" }, text);
const panel = (title, note, ...children) => h("section", { class: "panel" },
  h("h3", null, title, note && h("small", null, note)), children);
const featureLink = (feature, label) => h("a", { href: `#/feature/${feature}` }, label ?? `${feature}`);

function smallTable(heads, rows) {
  const kind = (i) => (i ? "number" : null);
  return h("table", { class: "small" },
    h("thead", null, h("tr", null, heads.map((head, i) => h("th", { class: kind(i), scope: "col" }, head)))),
    h("tbody", null, rows.map((row) => h("tr", null, row.map((cell, i) => h("td", { class: kind(i) }, cell))))));
}

// --- numbers -----------------------------------------------------------------------------------

const isKnown = (value) => value !== null && value !== undefined;
const minus = (text) => text.replace("-", "\u2212");
const clean = (value) => minus(parseFloat(value.toPrecision(3)).toString());
const two = (value) => minus(value.toFixed(2));
const percent = (share) => `${clean(100 * share)} %`;
const number = (value, form = clean) => (isKnown(value) ? form(value) : "–");
const whole = (value) => number(value, (n) => n.toLocaleString("en"));
const bracket = (low, high, form = two) => (isKnown(low) && isKnown(high) ? `[${form(low)}, ${form(high)}]` : "");

// --- tokens ------------------------------------------------------------------------------------

// Characters without a shape, and those that turn the direction of all that follows.
const SHAPELESS = /[\u0000-\u001f\u007f-\u009f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g;
const signs = (text) => text.replace(/\r?\n/g, "↵").replace(/\t/g, "⇥").replace(SHAPELESS, "␣");

// A token by itself, in one line.
const visible = (token) => (token === "" ? "(rest of a character)" : signs(token).replace(/[ \u00a0]/g, "·"));

// A token within its text. A blank stays a blank, with a faint dot over it: drawn by the token
// where it begins with its only one, as most do, else by an element of each blank.
const isPlain = (token) => !/[\n\r]| .* |[^ ] /.test(token);
const tokenClass = (token) => (isPlain(token) && token.startsWith(" ") ? "token blank" : "token");

function tokenText(token) {
  if (isPlain(token)) return signs(token);
  return token.split(/( |\r?\n)/).map((part) => {
    if (part === " ") return h("span", { class: "blank" }, " ");
    if (/^\r?\n$/.test(part)) return h("span", { class: "sign" }, "↵");
    return part && signs(part);
  });
}

// Colours a token by its share of the largest activation.
function heated(node, act, largest) {
  if (act > 0) {
    node.classList.add("lit");
    node.style.setProperty("--heat", `${12 + 63 * Math.min(1, act / largest)}%`);
  }
  return node;
}

function contextLine(context, largest) {
  const where = [context.concept, context.source].filter(Boolean).join(" · ");
  return h("div", { class: "context" },
    h("p", null, context.tokens.map((token, i) => {
      const act = context.acts[i];
      return heated(h("span", { class: tokenClass(token) + (i === context.focus ? " focus" : ""),
        tabindex: act > 0 ? 0 : null, "aria-describedby": act > 0 ? "tip" : null,
        "data-tip": `${visible(token)}   ${act > 0 ? clean(act) : "silent"}` }, tokenText(token)), act, largest);
    })),
    h("span", { class: "where", title: where }, where));
}

const largestOf = (list) => Math.max(1e-9, ...(list || []).flatMap((context) => context.acts));

function contextLines(list, largest, otherwise) {
  return list && list.length ? list.map((context) => contextLine(context, largest)) : soft(otherwise);
}

// --- the tip -----------------------------------------------------------------------------------

function showTip(event) {
  const node = event.target.closest?.("[data-tip]"), box = document.getElementById("tip");
  box.hidden = !node;
  if (!node) return;
  box.textContent = node.dataset.tip;
  const place = node.getClientRects()[0] ?? node.getBoundingClientRect(); // a broken line has two
  const left = Math.min(place.left, innerWidth - box.offsetWidth - 8);
  const above = place.top - box.offsetHeight - 4;
  box.style.left = `${Math.max(4, left)}px`;
  box.style.top = `${above > 0 ? above : place.bottom + 4}px`;
}

function hideTip() { document.getElementById("tip").hidden = true; }

document.addEventListener("mouseover", showTip);
document.addEventListener("focusin", showTip);
document.addEventListener("focusout", hideTip);
document.addEventListener("scroll", hideTip, true);
