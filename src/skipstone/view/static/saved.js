// A saved page: the panels of the live one, told again what they were told when it was saved.
import { Panel } from "./panel.js";

const state = JSON.parse(document.getElementById("saved").textContent);
if (state) show(state);

function show({ request, events, models, neurons, attended, pinned, saved }) {
  const { temperature, seed, draft } = request;
  const facts = { "new tokens": request.new_tokens, temperature, ...(temperature ? { seed } : {}), ...(draft ? { draft } : {}), saved };
  document.getElementById("prompt").textContent = request.prompt;
  document.getElementById("settings").textContent = Object.entries(facts).map(([name, value]) => `${name} ${value}`).join(" · ");
  const panels = models.map((model, i) => new Panel(model, i, {
    budget: request.budgets?.[i] ?? null, neurons: neurons[i], attended: attended?.[i] ?? {},
  }));
  const place = document.getElementById("panels");
  place.replaceChildren(...panels.map((panel) => panel.element));
  place.classList.toggle("two", panels.length > 1);
  for (const event of events) panels[event.model].take(event);
  panels.forEach((panel, i) => {
    panel.finish();
    panel.pin(pinned?.[i] ?? null);
  });
}
