// One feature: what it fires on, what it writes, its kin; beside it a neuron and a direction.
"use strict";

const DEAD = "It fires on none of the held-out tokens: there is nothing to show.";
const RARE = "It fires too rarely to be judged by concepts.";

function featureView(feature) {
  const place = column("feature").indexOf(feature), { about } = index();
  const page = h("article", { class: "feature", id: "feature", "data-feature": feature });
  if (place < 0) {
    page.append(h("p", { class: "error" },
      `Feature ${feature} was not collected: there are ${whole(about.n_collected)} of ${whole(about.d_sae)}.`));
    return page;
  }
  const row = (key) => column(key)[place], body = h("div", null, soft("Loading …"));
  const at = list.order.indexOf(place);
  if (at >= 0) list.at = at;
  const beyond = (by) => (at < 0 ? undefined : list.order[at + by]);
  view.move = (by) => { if (beyond(by) !== undefined) openFeature(column("feature")[beyond(by)]); };
  page.append(heading(feature, row, at, beyond), facts(row, about), body);
  load(chunkOf(place)).then((chunk) => {
    const entry = chunk.find((one) => one.feature === feature);
    body.replaceChildren(...featureBody(entry, row, about));
    page.dataset.ready = "true";
  }, (error) => body.replaceChildren(h("p", { class: "error" }, error.message)));
  return page;
}

function heading(feature, row, at, beyond) {
  const step = (by, sign, name) => beyond(by) !== undefined && h("a", { href: `#/feature/${column("feature")[beyond(by)]}`,
    "aria-label": name, title: `${name} (${by > 0 ? "j" : "k"})` }, sign);
  return h("div", { class: "heading" }, h("h2", null, `Feature ${feature}`), h("p", null, row("description") || ""),
    at >= 0 && h("nav", { "aria-label": "Features" }, step(-1, "‹", "Previous feature"),
      h("span", { class: "soft number" }, `${whole(at + 1)} of ${whole(list.order.length)}`), step(1, "›", "Next feature")));
}

const fact = (name, value, note) => h("div", null, h("dt", null, name),
  h("dd", null, h("b", null, value), note && h("small", null, note)));

function facts(row, about) {
  return h("dl", { class: "facts" },
    fact("density", row("density") ? percent(row("density")) : "dead",
      `${whole(row("n_firings"))} of ${whole(about.n_tokens)} ${about.split || ""} tokens`),
    fact("largest activation", number(row("max"))),
    fact("effective concepts", number(row("n_eff"), two), bracket(row("n_eff_low"), row("n_eff_high"))),
    fact("best concept", row("concept") || "–"),
    fact("AUROC", number(row("auroc"), two), bracket(row("auroc_low"), row("auroc_high"))),
    fact("description's accuracy", number(row("interpretability"), two), isKnown(row("interpretability")) && "chance 0.5"));
}

function featureBody(entry, row, about) {
  const examples = entry.examples || {}, colours = palette(entry.histogram?.by_concept, entry.nearest_neuron?.histogram_by_concept?.by_concept);
  const why = row("n_firings") === 0 ? DEAD : isKnown(row("n_eff")) ? "not measured" : RARE;
  const largest = Math.max(row("max") || 0, largestOf(examples.top));
  const left = h("div", null,
    panel("Activations", "by concept", row("n_firings") === 0 ? soft(DEAD) : [
      conceptHistogram(entry.histogram, colours, about.n_concept_tokens), heldoutHistogram(entry.histogram, about.n_tokens)]),
    panel("Concepts", "share of activity per token, 95 % intervals; blue: lift over 2",
      entry.concepts ? conceptBars(entry.concepts, 6) : soft(why)),
    detectorPanel(entry.precision, row("concept"), why),
    logitsPanel(entry.logits),
    effectPanel(entry.effect),
    neighboursPanel(entry.neighbours));
  const right = h("div", null,
    panel("Strongest", "one of a document as far as there are enough", contextLines(examples.top, largest, why)),
    (examples.intervals || []).map((part) => panel(`${clean(part.low)} to ${clean(part.high)}`,
      isKnown(part.n_firings) && firings(part.n_firings, part.contexts.length),
      contextLines(part.contexts, largest, "no firing is as strong as this"))),
    panel("Silent, though alike", "the same token, or the most similar contexts",
      contextLines(examples.near_miss, largest, why)));
  return [h("div", { class: "columns" }, left, right), ...comparison(entry, row, about, colours, why),
    h("details", null, h("summary", null, "Provenance"), provenance())];
}

const firings = (n, nShown) => (n === 1 ? "1 firing"
  : `${whole(n)} firings${n > nShown ? `; ${whole(nShown)} drawn at random` : ""}`);

function detectorPanel(found, concept, why) {
  if (!found) return panel("As a detector", null, soft(why));
  const scores = { precision: found.precision ?? found.value, recall: found.recall, F1: found.f1,
    "average precision": found.average_precision };
  return panel(`As a detector of ${found.concept || concept}`, "threshold with the best F1 on source A, measured on B",
    h("dl", { class: "facts" }, Object.entries(scores).map(([name, value]) => fact(name, number(value, two)))));
}

function logitsPanel(logits) {
  const end = (key, name) => smallTable([name, "logit"], (logits[key] || []).map(([token, value]) =>
    [h("bdi", { class: "mono" }, visible(token)), number(value, two)]));
  return panel("Logits", "decoder row times unembedding", logits
    ? h("div", { class: "logits" }, end("top", "likelier"), end("bottom", "less likely")) : soft("not measured"));
}

function effectPanel(effect) {
  if (!effect) return panel("Effect of taking it away", null, soft("not measured"));
  const byConcept = [...(effect.by_concept || [])].sort((a, b) => b.kl - a.kl);
  return panel("Effect of taking it away", "KL of the next token, nats",
    h("p", null, h("b", null, number(effect.kl)), ` on average over ${whole(effect.n_firings)} tokens; `,
      `a random direction of its size ${number(effect.kl_random)}`),
    smallTable(["concept", "KL", "tokens"], byConcept.map((one) => [one.concept, number(one.kl), whole(one.n_firings)])));
}

function neighboursPanel(neighbours) {
  const note = "cosine of decoder rows";
  if (!neighbours) return panel("Nearest features", note, soft("not measured"));
  if (!neighbours.length) return panel("Nearest features", note, soft("no other dictionary of this width in the run"));
  return panel("Nearest features", note, smallTable(["dictionary", "ratio", "seed", "feature", "cosine"],
    neighbours.map((other) => [siteLink(other), isKnown(other.ratio) ? `1:${other.ratio}` : "–",
      `${other.seed ?? "–"}${other.same_seed ? " (same)" : ""}`, `${other.feature}`, number(other.cosine, two)])));
}

// The same feature in the site beside this one, if that was built.
function siteLink(other) {
  const folder = other.sae.replaceAll("/", "_");
  if (location.protocol !== "file:" || !(data.get("sites") || []).includes(folder)) return other.sae;
  return h("a", { href: `../${encodeURIComponent(folder)}/index.html#/feature/${other.feature}` }, other.sae);
}

// The feature, its nearest neuron and a random direction side by side.
function comparison(entry, row, about, colours, why) {
  const neuron = entry.nearest_neuron;
  const itself = { n_eff: row("n_eff"), concepts: entry.concepts, contexts: entry.on_concepts, histogram_by_concept: entry.histogram };
  const column = (title, note, unit, limits, silence) => panel(title, note, unit ? [
    h("p", null, "effective concepts ", h("b", null, number(unit.n_eff, two)), " ", h("small", null, limits)),
    unit.concepts ? conceptBars(unit.concepts, 4) : soft(silence),
    unit.histogram_by_concept && conceptHistogram(unit.histogram_by_concept, colours, about.n_concept_tokens, 80),
    contextLines(unit.contexts, largestOf(unit.contexts), silence)] : soft("not measured"));
  const nearest = neuron && `${neuron.hook_name} ${neuron.neuron}, correlation ${number(neuron.correlation, two)}`;
  return [h("h2", null, "Beside others", h("small", null, "that fire as often as it does, on the concept corpus")),
    h("div", { class: "trio" },
      column("This feature", null, itself, bracket(row("n_eff_low"), row("n_eff_high")), why),
      column("Nearest neuron", nearest, neuron, "", "active too rarely to be judged"),
      column("Random direction", null, entry.random_direction, "", "active too rarely to be judged"))];
}

// --- about -------------------------------------------------------------------------------------

function provenance() {
  const { about, environment, config } = index();
  const told = (value) => Array.isArray(value) && value[0]?.superclass
    ? value.map((concept) => `${concept.name} (${concept.superclass})`).join(", ")
    : typeof value === "object" ? Object.entries(value).map(([key, one]) => `${key} ${one}`).join(", ") : `${value}`;
  const isSaid = (value) => isKnown(value) && value !== "" && !(typeof value === "object" && !Object.keys(value).length);
  const terms = (of) => h("dl", { class: "terms" }, Object.entries(of || {}).filter(([, value]) => isSaid(value))
    .map(([key, value]) => [h("dt", null, key.replaceAll("_", " ")), h("dd", { class: "mono" }, told(value))]));
  return [["Dictionary and texts", about], ["Machine", environment], ["Settings", config]].map(([title, of]) =>
    [h("h3", null, title), terms(of)]);
}

const aboutView = () => h("article", { class: "feature" }, h("h2", null, index().about.name || "About"),
  h("p", null, "Densities, examples and logits are of held-out text. Concepts are chosen on one source of a labelled corpus "
    + "(A) and measured on another (B); intervals are of 95 % and draw documents anew."), provenance());
