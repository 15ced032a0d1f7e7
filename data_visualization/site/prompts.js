// Texts with the features that fire on each token; served by a program, also the reader's own.
"use strict";

function promptsView(chosen) {
  const page = h("div", { class: "prompts" }, soft("Loading …"));
  load("prompts").then((prompts) => page.replaceChildren(...promptsBody(prompts || [], chosen)),
    (error) => page.replaceChildren(h("p", { class: "error" }, error.message)));
  return page;
}

function promptsBody(prompts, chosen) {
  const text = h("div", { class: "text mono", id: "prompt-text" }), side = h("aside", { id: "prompt-side" });
  const at = prompts[chosen] ? chosen : 0;
  const show = (prompt) => new Prompt(prompt, text, side).draw();
  const choose = h("select", { id: "prompt", onchange: (e) => { location.hash = `#/prompts/${e.target.value}`; } },
    prompts.map((prompt, i) => h("option", { value: i, selected: i === at }, prompt.title)));
  if (prompts.length) show(prompts[at]);
  else text.append(soft("No texts were collected."));
  return [h("div", null, h("div", { class: "line" }, h("label", { for: "prompt" }, "Text"), choose), ownText(show), text), side];
}

function ownText(show) {
  if (!location.protocol.startsWith("http")) return soft("For a text of your own: python -m data_visualization.serve RUN");
  const area = h("textarea", { id: "live-text", "aria-label": "A text of your own", placeholder: "A text of your own" });
  const error = h("span", { class: "error", role: "alert" });
  const read = async () => {
    error.textContent = "reading …";
    try {
      const answer = await fetch("encode", { method: "POST", headers: { "Content-Type": "application/json" },
        body: JSON.stringify({ text: area.value }) });
      const found = await answer.json();
      error.textContent = answer.ok ? "" : found.error;
      if (answer.ok) show(found);
    } catch { error.textContent = "the server does not answer; is it still running?"; }
  };
  return h("div", null, area, h("div", { class: "line" },
    h("button", { type: "button", id: "live-button", onclick: read }, "Read"), error));
}

class Prompt {
  constructor({ tokens, features }, text, side) { Object.assign(this, { tokens, features, text, side, at: -1 }); }

  // All tokens by their strongest feature, or by one feature.
  draw(only = null) {
    const strongest = this.features.map((fired) => (only === null ? fired[0] : fired.find(([feature]) => feature === only)));
    const largest = Math.max(1e-9, ...strongest.map((one) => one?.[1] ?? 0));
    this.buttons = this.tokens.map((token, i) => {
      const tip = strongest[i] ? `feature ${strongest[i][0]}: ${clean(strongest[i][1])}` : only === null ? "nothing fires" : "silent";
      return heated(h("button", { type: "button", class: tokenClass(token), "aria-pressed": "false", "aria-describedby": "tip",
        "data-tip": `${visible(token)}   ${tip}`, onclick: () => this.pin(i) }, tokenText(token)), strongest[i]?.[1] ?? 0, largest);
    });
    // A button is not broken into lines: where its token ends one, the text does.
    this.text.replaceChildren(...this.tokens.flatMap((token, i) => [this.buttons[i], ...(token.includes("\n") ? ["\n"] : [])]));
    this.side.replaceChildren(only === null
      ? panel("Strongest feature of each token", null, soft("Choose a token to see what fires on it."))
      : panel(`Feature ${only}`, `fires on ${strongest.filter(Boolean).length} of ${this.tokens.length} tokens`, this.described(only),
        h("p", null, featureLink(only, "open it"), " ", h("button", { type: "button", onclick: () => this.draw() }, "all features"))));
    view.move = (by) => {
      this.pin(Math.max(0, Math.min(this.tokens.length - 1, this.at + by)));
      this.buttons[this.at].focus();
    };
  }

  described(feature) {
    const place = column("feature").indexOf(feature);
    return soft((place >= 0 && column("description")[place]) || "");
  }

  pin(i) {
    this.at = i;
    this.buttons.forEach((button, j) => button.setAttribute("aria-pressed", j === i));
    const fired = this.features[i], largest = Math.max(1e-9, ...fired.map(([, act]) => act));
    this.side.replaceChildren(panel(`On ${visible(this.tokens[i])}`, "strongest features", fired.length
      ? fired.map(([feature, act]) => h("div", { class: "strength number" }, featureLink(feature),
        h("div", { class: "bar" }, h("div", { style: { width: `${100 * act / largest}%` } })), h("span", null, clean(act)),
        h("button", { type: "button", title: "on which tokens of this text it fires", onclick: () => this.draw(feature) }, "where else"),
        this.described(feature)))
      : soft("None of the collected features fires here. The first position and special tokens are left out.")));
  }
}
