// The page: asks the server, reads its events, hands them to the panels of the models.
import { Panel } from "./panel.js";
import { download } from "./saving.js";

const byId = (id) => document.getElementById(id);
const form = byId("ask");
let panels = [];
let running = null; // AbortController of the request that streams
let shown = null; // what the panels show, as a saved page needs it: the request and its events

function say(text, trouble = false) {
  byId("status").textContent = text;
  byId("status").classList.toggle("trouble", trouble);
}

function request() {
  const number = (id) => Number(byId(id).value);
  return {
    prompt: byId("prompt").value,
    models: panels.map((_, i) => i),
    new_tokens: Math.trunc(number("new-tokens")),
    temperature: number("temperature"),
    seed: Math.trunc(number("seed")),
    budgets: panels.map((panel) => panel.budget),
    twin: byId("twin").checked,
    draft: byId("draft").value || null,
  };
}

// Server-sent events of a POST request: EventSource can only GET.
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const events = text.split("\n\n");
    text = events.pop();
    for (const event of events) if (event.startsWith("data: ")) yield JSON.parse(event.slice(6));
  }
}

// What the last of some tokens attends to in each block of a model.
async function attention(model, tokens, signal) {
  const budget = shown.request.budgets[model];
  const response = await fetch("/api/attention", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ model, tokens, budget }),
    signal,
  });
  if (!response.ok) throw new Error((await response.json()).error);
  for await (const event of eventsOf(response)) {
    if (event.type === "error") throw new Error(event.message);
    if (event.type === "attention") return event.layers;
  }
  throw new Error("the server does not answer");
}

async function run() {
  running?.abort();
  const mine = (running = new AbortController());
  byId("stop").disabled = false;
  panels.forEach((panel) => panel.clear());
  say("computing …");
  const asked = request();
  shown = { request: asked, events: [] };
  byId("save").disabled = true;
  try {
    const response = await fetch("/api/generate", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(asked),
      signal: mine.signal,
    });
    if (!response.ok) throw new Error((await response.json()).error);
    for await (const event of eventsOf(response)) {
      if (event.type === "waiting") say(`waiting: ${event.ahead} ahead`);
      else if (event.type === "error") throw new Error(event.message);
      else {
        if (event.type === "start") say("computing …");
        panels[event.model].take(event);
        shown.events.push(event);
      }
    }
    say("done");
  } catch (error) {
    if (mine !== running) return; // another request has taken over
    if (error.name === "AbortError") say("stopped");
    else say(error.message || "the server does not answer", true);
  } finally {
    if (mine === running) {
      running = null;
      byId("stop").disabled = true;
      byId("save").disabled = !shown.events.length;
      panels.forEach((panel) => panel.finish());
    }
  }
}

// The page as one file that opens offline: the same panels, with what they have been told written into it.
async function save() {
  const empty = await (await fetch("/api/saved-page")).text();
  const models = panels.map((panel) => panel.model);
  const state = { ...shown, models, neurons: panels.map((panel) => panel.neurons),
    attended: panels.map((panel) => panel.attended), pinned: panels.map((panel) => panel.pinned), saved: new Date().toISOString().slice(0, 10) };
  const page = empty.replace(">null</script>", () => `>${JSON.stringify(state).replaceAll("<", "\\u003c")}</script>`);
  const names = models.map((model) => model.name.replace(/[^\w.-]+/g, "-"));
  download(new Blob([page], { type: "text/html" }), `skipstone-${names.join("-")}.html`);
}

async function start() {
  const answer = await (await fetch("/api/models")).json();
  byId("prompt").maxLength = answer.limits.prompt;
  byId("new-tokens").max = answer.limits.new_tokens;
  panels = answer.models.map((model, i) => new Panel(model, i, {
    rerun: () => byId("prompt").value && run(),
    ask: (tokens, signal) => attention(i, tokens, signal),
  }));
  byId("panels").replaceChildren(...panels.map((panel) => panel.element));
  byId("panels").classList.toggle("two", panels.length > 1);
  if (!answer.models.some((model) => model.twin)) {
    byId("twin").checked = false;
    byId("twin").disabled = true;
  }
  say("");
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});
byId("stop").addEventListener("click", () => running?.abort());
byId("save").addEventListener("click", () => save().catch(() => say("the page could not be saved: the server does not answer", true)));
start().catch(() => say("the server does not answer", true));
