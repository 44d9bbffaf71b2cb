import { saveable } from "./saving.js";

export { saveable };

// Pictures as SVG, built from elements: no text of a model ever becomes markup.

const SVG = "http://www.w3.org/2000/svg";
const CELL = { width: 12, height: 17, left: 46, top: 6, gap: 1 };
const FAINTEST = 0.16; // a kept token whose weight is next to nothing must not look skipped
const SIGNS = { " ": "·", "\n": "↵", "\t": "⇥", "\r": "␍" };

export const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`;

export function short(value) {
  for (const [size, letter] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (value >= size) return `${Number((value / size).toPrecision(3))} ${letter}`;
  }
  return String(Math.round(value));
}

// White space and control characters as signs that can be seen.
export const visible = (text) => [...text].map((c) => SIGNS[c] ?? (/\p{C}/u.test(c) ? "\ufffd" : c)).join("") || "∅";

export function h(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

function s(name, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

// The numbers of a picture as a table that can be opened. remember: called with whether it is open.
export function tabled(heads, rows, open = false, remember = () => {}) {
  const cells = (kind, row) => h("tr", {}, ...row.map((cell) => h(kind, kind === "th" ? { scope: "col" } : {}, String(cell))));
  const details = h("details", { class: "numbers", ...(open ? { open: "" } : {}) }, h("summary", {}, "Table"),
    h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Numbers of the picture" },
      h("table", {}, h("thead", {}, cells("th", heads)), h("tbody", {}, ...rows.map((row) => cells("td", row))))));
  details.addEventListener("toggle", () => remember(details.open));
  return details;
}

// The label of a token below a column: upright if it is one character, else turned; returned with the room it needs.
function tokenLabel(label, x, y) {
  const cut = label.length > 10 ? `${label.slice(0, 9)}…` : label;
  return s("text", { class: "token", ...(label.length > 1 ? { "text-anchor": "end", transform: `rotate(-90 ${x + 9} ${y - 7})`, x: x + 9, y: y - 7 }
    : { "text-anchor": "middle", x: x + 5.5, y: y + 1 }) }, cut);
}

function picture(width, height, title, children) {
  return s("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img" }, s("title", {}, title), ...children);
}

// Tokens across, blocks up, and below them the loss of what each token predicted.
export function drawMap(tokens, model) {
  const { width, height, left, top, gap } = CELL;
  const strongest = Math.max(...tokens.flatMap((token) => token.blocks.map((block) => Math.abs(block.weight))), 1e-9);
  const hardest = Math.max(...tokens.map((token) => token.read.loss ?? 0), 1e-9);
  const floor = top + height * model.layers;
  const labels = tokens.map((token) => visible(token.label));
  const longest = Math.min(Math.max(...labels.map((label) => label.length)), 10);
  const parts = [];
  for (let layer = 0; layer < model.layers; layer++) {
    const y = floor - height * (layer + 1);
    parts.push(s("text", { x: left - 8, y: y + height / 2 + 4, class: "tick", "text-anchor": "end" }, String(layer)));
    tokens.forEach((token, t) => {
      const block = token.blocks[layer];
      const attributes = { x: left + width * t, y, width: width - gap, height: height - gap, "data-t": t };
      if (!block.slots.length) attributes.class = "plain";
      else if (!block.kept) attributes.class = "skipped";
      else {
        attributes.class = block.weight < 0 ? "less" : "more";
        attributes["fill-opacity"] = (FAINTEST + (1 - FAINTEST) * Math.min(Math.abs(block.weight) / strongest, 1)).toFixed(2);
      }
      parts.push(s("rect", attributes));
    });
  }
  parts.push(s("text", { x: left - 8, y: floor + 15, class: "tick", "text-anchor": "end" }, "loss"));
  tokens.forEach((token, t) => {
    const x = left + width * t;
    const share = (token.read.loss ?? 0) / hardest;
    parts.push(s("rect", { x, y: floor + 4, width: width - gap, height: 13, class: "loss", "fill-opacity": share.toFixed(2), "data-t": t }));
    parts.push(tokenLabel(labels[t], x, floor + 30));
    parts.push(s("rect", { class: "column", x: x - 0.5, y: top - 1, width, height: floor - top + 20, "data-t": t }));
  });
  const room = longest > 1 ? 24 + 6.4 * longest : 38;
  return picture(left + width * tokens.length + 8, floor + room, "Blocks that each token took", parts);
}

// The residual stream from the first block (below) to the last: through a block's update, or past it.
export function drawPath(blocks, title) {
  const row = Math.max(14, Math.min(24, 480 / blocks.length)), through = 88, past = 40, box = { width: 44, height: 0.6 * row };
  const floor = row * blocks.length + 12;
  const rows = blocks.map((block, layer) => ({ ...block, layer, y: floor - row * (layer + 0.5) - 6, x: block.kept ? through : past }));
  const parts = [];
  let line = `M ${past} ${floor + 6}`;
  let from = { x: past, y: floor + 6 };
  for (const { x, y } of rows) {
    line += ` C ${from.x} ${from.y - 10} ${x} ${y + 18} ${x} ${y + 7} L ${x} ${y - 7}`;
    from = { x, y: y - 7 };
  }
  line += ` C ${from.x} ${from.y - 8} ${past} 12 ${past} 2`;
  for (const { layer, y, kept, weight, slots } of rows) {
    const frame = { x: through - box.width / 2, y: y - box.height / 2, ...box, rx: 3 };
    const fill = !slots.length ? "plain" : !kept ? "skipped" : weight < 0 ? "less" : "more";
    const opacity = slots.length && kept ? FAINTEST + (1 - FAINTEST) * Math.min(Math.abs(weight), 1) : 1;
    parts.push(s("rect", { ...frame, class: `${fill} box`, "fill-opacity": opacity.toFixed(2) }));
    parts.push(s("text", { x: 24, y: y + 4, class: "tick", "text-anchor": "end" }, String(layer)));
    parts.push(s("text", { x: through + 32, y: y + 4, class: "said" }, said(slots)));
  }
  parts.push(s("path", { d: line, class: "path" }));
  const longest = Math.max(...blocks.map((block) => said(block.slots).length));
  return picture(Math.max(330, through + 36 + 6.4 * longest), floor + 10, title, parts);
}

function said(slots) {
  if (!slots.length) return "every token";
  return slots.map(({ mechanism, score, weight, kept }) => {
    const name = mechanism.split("_").map((word) => (mechanism.length > 9 ? word[0] : word)).join("").toLowerCase();
    const number = score === null ? "not reached" : `score ${score.toFixed(2)}`;
    return `${name}: ${number}${score === null ? "" : kept ? `, ×${weight.toFixed(2)}` : ", skips"}`;
  }).join("  ·  ");
}

// A row of neurons for each layer; a neuron has the colour of preference + logits at their largest.
export function drawNeurons(map, mix, colours, open, remember) {
  const width = 900, height = 16, left = 46;
  const parts = [], counts = [];
  map.layers.forEach(({ layer, preference }, i) => {
    const cell = (width - left) / preference.length;
    const y = height * (map.layers.length - 1 - i) + 4;
    parts.push(s("text", { x: left - 8, y: y + 12, class: "tick", "text-anchor": "end" }, String(layer)));
    if (mix[i].includes(null)) {
      parts.push(s("text", { x: left, y: y + 12, class: "tick" }, "skipped: no neuron was asked"));
      counts.push([layer, ...map.names.map(() => "skipped")]);
      return;
    }
    const best = preference.map((row) => row.reduce((best, value, k) => (value + mix[i][k] > row[best] + mix[i][best] ? k : best), 0));
    counts.push([layer, ...map.names.map((_, k) => best.filter((one) => one === k).length)]);
    for (let start = 0, end; start < best.length; start = end) {
      for (end = start + 1; end < best.length && best[end] === best[start]; end++);
      parts.push(s("rect", { x: left + cell * start, y, width: cell * (end - start), height: height - 2, class: `series-${best[start] % colours}` },
        s("title", {}, `block ${layer}: ${map.names[best[start]]}`)));
    }
  });
  const drawn = picture(width, height * map.layers.length + 8, "Activation that each neuron prefers", parts);
  const names = map.names.map((name, k) => h("span", { class: "key" }, h("i", { class: `box series-${k % colours}` }), name));
  const every = Math.max(...map.layers.map((layer) => layer.every));
  const note = every > 1 ? [h("span", { class: "key" }, `one neuron of ${every} is shown`)] : [];
  const table = tabled(["block", ...map.names.map((name) => `neurons with ${name}`)], counts, open, remember);
  return [drawn, h("p", { class: "legend" }, ...names, ...note), h("div", { class: "tools" }, saveable(() => drawn, "neurons"), table)];
}

// To which tokens one attends in each block: tokens across up to itself, blocks up; darkest is the largest weight of a block.
export function drawAttention(layers, labels, title) {
  const { width, height, left, top, gap } = CELL;
  const floor = top + height * layers.length, parts = [];
  layers.forEach((weights, layer) => {
    const y = floor - height * (layer + 1);
    parts.push(s("text", { x: left - 8, y: y + height / 2 + 4, class: "tick", "text-anchor": "end" }, String(layer)));
    if (!weights) {
      parts.push(s("text", { x: left, y: y + height / 2 + 4, class: "tick" }, "skipped: attends to nothing"));
      return;
    }
    const most = Math.max(...weights, 1e-9);
    weights.forEach((weight, t) => parts.push(s("rect", { x: left + width * t, y, width: width - gap, height: height - gap,
      class: "attended", "fill-opacity": (weight / most).toFixed(2), "data-t": t }, s("title", {}, `${labels[t]}, token ${t}: ${percent(weight)}`))));
  });
  const longest = Math.min(Math.max(...labels.map((label) => label.length)), 10);
  labels.forEach((label, t) => parts.push(tokenLabel(label, left + width * t, floor + 13)));
  return picture(left + width * labels.length + 8, floor + (longest > 1 ? 8 + 6.4 * longest : 20), title, parts);
}
