// One model: its budget, its counters, its text, and the token that is looked at.
import { h, saveable, tabled, drawMap, drawPath, drawAttention, drawNeurons, visible, percent, short } from "./pictures.js";

const ACTIVATION_CLASSES = 6; // colours in the style sheet

// rerun: called for another budget; null on a saved page, which shows the one it was saved with. ask: fetches what a token
// attends to; attended: what is known of it already, by token.
export class Panel {
  constructor(model, number, { rerun = null, budget = null, neurons = null, ask = null, attended = {} } = {}) {
    this.ask = ask;
    this.saved = attended;
    this.model = model;
    this.number = number;
    this.rerun = rerun;
    this.budget = budget;
    this.neurons = neurons;
    this.element = this.build();
    this.clear();
    if (model.neurons && !neurons) this.loadNeurons();
  }

  build() {
    const { model } = this;
    const id = (name) => `${name}-${this.number}`;
    this.executed = meter("this model", "own");
    this.dense = meter("dense twin", "twin");
    this.speed = meter("this model", "own");
    this.denseSpeed = meter("dense twin", "twin");
    this.text = h("div", { class: "depth stream", role: "group", "aria-label": `Text of ${model.name}, by compute` });
    this.details = h("div", { class: "details" });
    this.draft = h("span", { class: "drafts" });
    this.map = h("div", { class: "scroll map", tabindex: "0", role: "region", "aria-label": "Map of tokens and blocks" });
    this.table = h("tbody");
    this.neuronMap = h("div", { class: "neurons" });
    this.attention = h("div", { class: "attention" });
    this.text.addEventListener("pointerover", (event) => this.look(tokenOf(event)));
    this.text.addEventListener("pointerleave", () => this.look(this.pinned));
    this.text.addEventListener("click", (event) => this.pin(tokenOf(event)));
    this.text.addEventListener("keydown", (event) => this.key(event));
    this.text.addEventListener("focusin", (event) => this.look(tokenOf(event)));
    this.map.addEventListener("pointerover", (event) => this.look(tokenOf(event)));
    this.map.addEventListener("pointerleave", () => this.look(this.pinned));
    this.map.addEventListener("click", (event) => this.pin(tokenOf(event)));
    const slots = model.slots.filter(([, mechanism]) => mechanism);
    return h("section", { class: "panel", "aria-labelledby": id("name") },
      h("h2", { id: id("name") }, model.name),
      h("p", { class: "note" }, `${model.mechanisms} · ${short(model.parameters)} parameters · ${model.layers} blocks`),
      this.budgetRow(id),
      h("div", { class: "counters" },
        h("div", {}, h("h3", {}, "FLOPs executed"), this.executed.element, this.dense.element),
        h("div", {}, h("h3", {}, "Tokens a second"), this.speed.element, this.denseSpeed.element)),
      h("div", { class: "reading" },
        h("div", { class: "words" }, this.text,
          h("p", { class: "legend" }, h("span", { class: "key" }, "no block ", h("i", { class: "ramp" }), " every block"),
            h("span", { class: "key" }, h("i", { class: "unread" }), "chosen, not read yet"), this.draft)),
        h("div", { class: "aside" }, this.details, this.attention)),
      h("figure", { class: "scroll" }, h("figcaption", {}, "Blocks that each token took"), this.map,
        h("p", { class: "legend" }, key("skipped", "skipped"), key("more", "update, darker by weight"),
          ...(slots.length < model.slots.length ? [key("plain", "not routed: every token")] : []), key("loss", "loss of the next token"),
          saveable(() => this.map.querySelector("svg"), `${model.name}-map`)),
        h("details", {}, h("summary", {}, "The same as a table"),
          h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `Table of ${model.name}` }, h("table", {},
            h("thead", {}, h("tr", {}, ...["position", "token", "compute", "entropy", "loss", ...slots.map(([layer, name]) =>
              `block ${layer}, ${name.replaceAll("_", " ")}`)].map((title) => h("th", { scope: "col" }, title)))), this.table)))),
      ...(model.neurons ? [h("figure", { class: "scroll" }, h("figcaption", {}, "Activation that each neuron prefers for the token"),
        this.neuronMap)] : []));
  }

  budgetRow(id) {
    const { budgets } = this.model;
    if (!this.rerun) {
      const set = this.budget === null ? "as trained" : `${percent(this.budget)} of the dense FLOPs`;
      return budgets ? h("p", { class: "note budget" }, `Budget: ${set}.`) : "";
    }
    if (!budgets) {
      const why = this.model.has_thresholds ? [h("code", {}, "skipstone calibrate"), " writes the table that it needs."] : ["this model has no thresholds to set."];
      return h("p", { class: "note" }, "No budget slider: ", ...why);
    }
    const shown = h("output", { for: id("budget") });
    const slider = h("input", { id: id("budget"), type: "range", min: budgets[0], max: budgets[1], step: 0.005, value: this.model.trained_budget });
    const trained = h("input", { type: "checkbox", checked: "" });
    const update = (chosen) => {
      this.budget = chosen ? Number(slider.value) : null;
      trained.checked = !chosen;
      if (!chosen) slider.value = this.model.trained_budget;
      shown.textContent = `${percent(chosen ? this.budget : this.model.trained_budget)} of the dense FLOPs`;
    };
    update(false);
    slider.addEventListener("input", () => update(true));
    slider.addEventListener("change", () => this.rerun());
    trained.addEventListener("change", () => { update(!trained.checked); this.rerun(); });
    return h("div", { class: "budget" }, h("label", { for: id("budget") }, "Budget"), slider, shown,
      h("label", { class: "check" }, trained, " as trained"));
  }

  clear() {
    this.element.classList.add("empty"); // pictures are shown once there is a text
    this.tokens = []; // {text, label, span, read}: read is what a pass told of the token
    this.pinned = this.looked = null;
    this.guesses = this.accepted = this.dropped = 0;
    this.attended = this.saved; // a saved page is told of one text only
    this.saved = {};
    this.asking?.abort();
    this.attention.replaceChildren();
    this.draft.textContent = "";
    this.passes = { tokens: 0, seconds: 0, dense: 0 };
    this.text.replaceChildren(h("span", { class: "quiet" }, "The text appears here."));
    this.map.replaceChildren();
    this.table.replaceChildren();
    this.details.replaceChildren(h("p", { class: "note" }, "Point at a token, or move to it with the arrow keys. A click keeps it."));
    this.neuronMap.replaceChildren(h("p", { class: "note" }, "Point at a token."));
    for (const each of [this.executed, this.dense, this.speed, this.denseSpeed]) each.set("–", 0);
    this.picture = null;
  }

  take(event) {
    if (event.type === "start") {
      this.element.classList.remove("empty");
      this.text.replaceChildren();
      this.tokens = event.prompt.map((token, i) => this.add(token, i, "prompt"));
      this.focusable(0);
    } else if (event.type === "pass") {
      event.read.forEach((read, i) => this.tell(event.first + i, read));
      this.reject(event);
      this.tokens.push(this.add(event.token, this.tokens.length, event.guessed ? "new guessed" : "new"));
      this.drafted(event);
      this.count(event);
      this.draw();
    }
  }

  finish() {
    this.draw(true);
    if (this.tokens.length && this.looked === null) this.look(this.tokens.findLastIndex((token) => token.read));
  }

  add(token, index, origin) {
    const span = h("span", { class: `token unread ${origin}`, role: "button", tabindex: "-1", "data-t": index, "aria-pressed": "false",
      "aria-label": `token ${index}: ${visible(token.label)}` });
    span.textContent = token.text === "" ? unwritten(token.label) : token.text.replace(/\n/g, "↵\n");
    if (token.text === "") span.classList.add("unwritten");
    this.text.append(span);
    return { ...token, span, read: null };
  }

  // Proposals that the model took back, struck, before the token that it chose instead.
  reject({ rejected, token }) {
    if (!rejected?.length) return;
    const labels = rejected.map(({ label }) => visible(label));
    const told = `the draft proposed ${labels.join(" ")}; the model chose ${visible(token.label)}`;
    this.text.append(h("del", { class: "rejected", title: told }, ...labels.map((label) => h("span", {}, label))));
    this.dropped += rejected.length;
  }

  tell(index, read) {
    const token = this.tokens[index];
    token.read = read;
    token.blocks = this.blocksOf(read);
    token.span.classList.remove("unread");
    token.span.style.setProperty("--depth-share", read.compute);
    token.span.setAttribute("aria-label", `token ${index}: ${visible(token.label)}, ${percent(read.compute)} of the blocks' work`);
    const number = (value) => (value === null ? "–" : value.toFixed(2));
    const cells = this.model.slots.flatMap(([, mechanism], i) =>
      mechanism ? [`${read.kept[i] ? `×${number(read.weight[i])}` : "skipped"}${read.score[i] === null ? "" : `, score ${number(read.score[i])}`}`] : []);
    this.table.append(h("tr", {}, ...[index, visible(token.label), percent(read.compute), number(read.entropy), number(read.loss), ...cells]
      .map((cell) => h("td", {}, String(cell)))));
  }

  // A block's mechanisms together: kept by all of them, and the product of their weights.
  blocksOf(read) {
    const blocks = [];
    this.model.slots.forEach(([layer, mechanism], i) => {
      const block = (blocks[layer] ??= { kept: true, weight: 1, slots: [] });
      block.kept &&= read.kept[i];
      block.weight *= read.weight[i];
      if (mechanism) block.slots.push({ mechanism, score: read.score[i], weight: read.weight[i], kept: read.kept[i] });
    });
    return blocks;
  }

  drafted(event) {
    this.guesses += event.guesses;
    this.accepted += event.guessed ? 1 : 0;
    if (!this.guesses) return;
    const key = (name, text) => h("span", { class: "key" }, h("i", { class: name }), text);
    this.draft.replaceChildren(key("guessed", `draft: ${this.accepted} of ${this.guesses} tokens accepted`),
      h("span", { class: "key" }, h("del", { class: "rejected" }, "abc"), `${this.dropped} rejected`));
  }

  count(event) {
    const most = Math.max(event.flops, event.dense_flops);
    this.executed.set(`${short(event.flops)} (${percent(event.flops / event.dense_flops)})`, event.flops / most);
    this.dense.set(short(event.dense_flops), event.dense_flops / most);
    if (event.first === 0) return; // the pass over the prompt is no decoding
    this.passes.tokens += 1;
    this.passes.seconds += event.seconds;
    this.passes.dense += event.dense_seconds ?? 0;
    const own = this.passes.tokens / this.passes.seconds;
    const dense = this.passes.dense ? this.passes.tokens / this.passes.dense : 0;
    const times = dense ? ` (${(own / dense).toFixed(2)}×)` : "";
    this.speed.set(`${own.toFixed(0)}${times}`, own / Math.max(own, dense));
    this.denseSpeed.set(dense ? dense.toFixed(0) : "not timed", dense / Math.max(own, dense));
  }

  // At most a picture for each frame of the screen.
  draw(now = false) {
    if (now) {
      cancelAnimationFrame(this.picture);
      this.picture = null;
      this.drawNow();
    } else this.picture ??= requestAnimationFrame(() => { this.picture = null; this.drawNow(); });
  }

  drawNow() {
    const read = this.tokens.filter((token) => token.read);
    if (read.length) this.map.replaceChildren(drawMap(read, this.model));
    this.mark();
  }

  focusable(index) {
    this.text.querySelector('[tabindex="0"]')?.setAttribute("tabindex", "-1");
    this.tokens[index]?.span.setAttribute("tabindex", "0");
  }

  key(event) {
    const at = tokenOf(event);
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -Infinity, End: Infinity };
    if (event.key in steps && at !== null) {
      const next = Math.min(Math.max(at + steps[event.key], 0), this.tokens.length - 1);
      this.focusable(next);
      this.tokens[next].span.focus();
    } else if ((event.key === "Enter" || event.key === " ") && at !== null) this.pin(at);
    else if (event.key === "Escape") this.pin(this.pinned);
    else return;
    event.preventDefault();
  }

  pin(index) {
    if (index === null) return;
    this.pinned = this.pinned === index ? null : index;
    this.tokens.forEach((token, i) => token.span.setAttribute("aria-pressed", String(i === this.pinned)));
    this.attend();
    this.focusable(index);
    this.look(index);
  }

  look(index) {
    if (index === null || index === undefined || !this.tokens[index]) return;
    this.looked = index;
    this.mark();
    const { label, read, blocks } = this.tokens[index];
    const title = h("p", { class: "at" }, h("code", {}, visible(label)), ` token ${index}`);
    if (!read) {
      this.details.replaceChildren(title, h("p", { class: "note" }, "Chosen last: no pass has read it."));
      return;
    }
    const fact = (name, value) => h("div", {}, h("dt", {}, name), h("dd", {}, value));
    const nats = (value) => (value === null ? "–" : `${value.toFixed(2)} nats`);
    this.details.replaceChildren(title,
      h("dl", { class: "facts" }, fact("compute", `${percent(read.compute)} of the blocks' work`),
        fact("entropy of the next token", nats(read.entropy)), fact("loss of the next token", nats(read.loss))),
      drawPath(blocks, `Path of token ${index} through the blocks`),
      h("div", { class: "tools" }, saveable(() => this.details.querySelector("svg"), `${this.model.name}-token-${index}`),
        tabled(["block", "mechanism", "score", "weight", "decision"], blocks.flatMap(({ slots }, layer) => slots.length
          ? slots.map(({ mechanism, score, weight, kept }) => [layer, mechanism.replaceAll("_", " "), score?.toFixed(4) ?? "not reached", weight?.toFixed(4) ?? "–", kept ? "keeps" : "skips"])
          : [[layer, "–", "–", "–", "every token"]]), this.tableIsOpen, (open) => { this.tableIsOpen = open; })));
    if (this.neurons && read.mix) this.neuronMap.replaceChildren(...drawNeurons(this.neurons, read.mix, ACTIVATION_CLASSES,
      this.neuronsAreOpen, (open) => { this.neuronsAreOpen = open; }));
  }

  // What the pinned token attends to, beside its path: asked for once, and drawn when it comes.
  async attend() {
    this.asking?.abort();
    const at = this.pinned;
    if (at === null || !this.tokens[at]?.read) return this.attention.replaceChildren();
    if (!this.attended[at] && this.ask) {
      this.attention.replaceChildren(h("p", { class: "note" }, "computing what it attends to …"));
      this.asking = new AbortController();
      try {
        this.attended[at] = await this.ask(this.tokens.slice(0, at + 1).map((token) => token.id), this.asking.signal);
      } catch (error) {
        if (error.name !== "AbortError") this.attention.replaceChildren(h("p", { class: "note" }, error.message));
        return;
      }
    }
    if (this.pinned !== at) return;
    const layers = this.attended[at];
    if (!layers) return this.attention.replaceChildren();
    const labels = this.tokens.slice(0, at + 1).map((token) => visible(token.label));
    const drawn = drawAttention(layers, labels, `What token ${at} attends to`);
    const strongest = layers.flatMap((weights, layer) => weights ? [[layer, ...strongestOf(weights, labels)]] : []);
    this.attention.replaceChildren(h("p", { class: "at" }, `What token ${at} attends to, mean over heads`),
      h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `Attention of token ${at}` }, drawn),
      h("div", { class: "tools" }, saveable(() => drawn, `${this.model.name}-attention-${at}`),
        tabled(["block", "most", "second", "third"], strongest)));
  }

  mark() {
    this.text.querySelector(".looked")?.classList.remove("looked");
    this.map.querySelector(".looked")?.classList.remove("looked");
    if (this.looked === null) return;
    this.tokens[this.looked]?.span.classList.add("looked");
    this.map.querySelector(`rect.column[data-t="${this.looked}"]`)?.classList.add("looked");
  }

  async loadNeurons() {
    this.neurons = await (await fetch(`/api/neurons/${this.number}`)).json();
  }
}

// What stands for a token that has no text of its own: a special token's name, or a sign for a part of a character.
function unwritten(label) {
  return label === "" || label.includes("\ufffd") ? "▫" : visible(label);
}

function tokenOf(event) {
  const found = event.target.closest?.("[data-t]");
  return found ? Number(found.dataset.t) : null;
}

// The three largest weights in words.
function strongestOf(weights, labels) {
  const order = weights.map((weight, t) => [weight, t]).sort((a, b) => b[0] - a[0]).slice(0, 3);
  return [0, 1, 2].map((i) => (order[i] ? `${labels[order[i][1]]} (${order[i][1]}) ${percent(order[i][0])}` : "–"));
}

const key = (kind, text) => h("span", { class: "key" }, h("i", { class: `box ${kind}` }), text);

function meter(name, kind) {
  const value = h("b", {}, "–");
  const bar = h("i", { class: `bar ${kind}` });
  const element = h("div", { class: "meter" }, h("span", {}, name), h("span", { class: "track" }, bar), value);
  return {
    element,
    set(text, share) {
      value.textContent = text;
      bar.style.setProperty("--share", Number.isFinite(share) ? share : 0);
    },
  };
}
