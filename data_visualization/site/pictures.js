// Histograms and bars, drawn as SVG in the page's colours.
"use strict";

const N_COLOURS = 5; // and one for all others
const WIDTH = 400;
const sum = (values) => values.reduce((a, b) => a + b, 0);

// Concepts that have a colour of their own: the commonest of each histogram in turn.
function palette(...histograms) {
  const ranked = histograms.filter(Boolean).map((counts) => Object.keys(counts)
    .sort((a, b) => sum(counts[b]) - sum(counts[a])));
  const chosen = new Set();
  for (let rank = 0; chosen.size < N_COLOURS && ranked.some((names) => rank < names.length); rank++) {
    ranked.forEach((names) => { if (rank < names.length && chosen.size < N_COLOURS) chosen.add(names[rank]); });
  }
  return [...chosen];
}

// [name, counts, colour] of every part of a stacked histogram.
function stackOf(counts, colours) {
  const own = colours.filter((name) => counts[name]).map((name) => [name, counts[name], `var(--c${colours.indexOf(name)})`]);
  const rest = Object.keys(counts).filter((name) => !colours.includes(name)).map((name) => counts[name]);
  if (rest.length) own.push([`${rest.length} others`, rest[0].map((_, i) => sum(rest.map((of) => of[i]))), `var(--c${N_COLOURS})`]);
  return own;
}

// Bars of parts [name, counts, colour] over `edges`; `scale` takes a count to its height.
function bars(edges, parts, label, height, scale = (v) => v) {
  const left = 42, bottom = 30, top = 8, n = edges.length - 1, step = (WIDTH - left - 6) / n;
  const totals = edges.slice(1).map((_, i) => sum(parts.map(([, counts]) => counts[i])));
  const largest = Math.max(1, ...totals), y = (v) => height * scale(v) / scale(largest);
  const columns = totals.map((_, i) => {
    let below = 0;
    return parts.map(([name, counts, colour]) => {
      if (!counts[i]) return null;
      const from = y(below), to = y(below += counts[i]);
      const tip = `${clean(edges[i])} to ${clean(edges[i + 1])}: ${whole(counts[i])} ${name}`;
      return h("rect", { x: left + i * step + 0.5, y: top + height - to, width: Math.max(1, step - 1), height: to - from,
        fill: colour, "data-tip": tip });
    });
  });
  const ground = top + height, at = (share) => left + share * n * step;
  return h("svg", { viewBox: `0 0 ${WIDTH} ${top + height + bottom}`, role: "img", "aria-label": label },
    columns, h("line", { class: "axis", x1: left, x2: at(1), y1: ground, y2: ground }),
    [0, 0.5, 1].map((share) => h("text", { x: at(share), y: ground + 14, "text-anchor": share === 1 ? "end" : share ? "middle" : "start" },
      clean(edges[0] + share * (edges[n] - edges[0])))),
    h("text", { x: at(0.5), y: ground + 27, "text-anchor": "middle" }, "activation"),
    h("text", { x: left - 6, y: top + 9, "text-anchor": "end" }, whole(largest)),
    h("text", { x: left - 6, y: ground, "text-anchor": "end" }, "0"));
}

// Firings on the concept corpus, stacked by concept.
function conceptHistogram(found, colours, nTokens, height = 130) {
  const counts = found?.by_concept;
  if (!counts) return soft("not measured");
  const n = sum(Object.values(counts).map(sum));
  if (!n) return soft("silent on the concept corpus");
  const parts = stackOf(counts, colours);
  return [bars(found.edges, parts, "Firings by activation and concept", height),
    h("ul", { class: "legend" }, parts.map(([name, , colour]) => h("li", null, h("i", { style: { background: colour } }), name))),
    soft(`${whole(n)} firings on ${whole(nTokens)} tokens of the concept corpus`)];
}

function heldoutHistogram(found, nTokens) {
  if (!found?.counts || !sum(found.counts)) return null;
  return [bars(found.edges, [["tokens", found.counts, "var(--bar)"]], "Firings by activation, held-out text", 56, Math.log1p),
    soft(`${whole(sum(found.counts))} firings on ${whole(nTokens)} held-out tokens, logarithmic scale`)];
}

// Shares of concepts with their 95 % intervals; those with a lift surely over 2 stand out.
function conceptBars(list, n) {
  const shown = list.filter((bar, i) => i < n || (n > 5 && bar.lift_low > 2)).slice(0, 12);
  const left = 96, right = 112, line = 20, width = WIDTH - left - right;
  const longest = Math.max(0.1, ...shown.map((bar) => bar.share_high ?? bar.share));
  const x = (share) => left + width * share / longest;
  const round = (share) => `${Math.round(100 * share)}`;
  return h("svg", { viewBox: `0 0 ${WIDTH} ${shown.length * line + 2}`, role: "img", "aria-label": "Shares of concepts" },
    shown.map((bar, i) => {
      const y = i * line + 3, tip = `${bar.concept}: ${percent(bar.share)} of its activity per token; fires ${number(bar.lift)} times`
        + ` as often as elsewhere, at least ${number(bar.lift_low)}`;
      return h("g", { "data-tip": tip },
        h("text", { x: left - 8, y: y + 11, "text-anchor": "end" }, bar.concept),
        h("rect", { x: left, y, width: Math.max(1, x(bar.share) - left), height: 14, fill: bar.lift_low > 2 ? "var(--c0)" : "var(--bar)" }),
        isKnown(bar.share_low) && h("line", { class: "whisker", x1: x(bar.share_low), x2: x(bar.share_high), y1: y + 7, y2: y + 7 }),
        h("text", { class: "strong", x: WIDTH - right + 40, y: y + 11, "text-anchor": "end" }, `${round(bar.share)} %`),
        isKnown(bar.share_low) && h("text", { x: WIDTH - right + 46, y: y + 11 }, `[${round(bar.share_low)}, ${round(bar.share_high)}]`));
    }));
}
