// What a probe says, and why: chips, marked and shaded words, a heat map of tokens and layers.

import { el, signed } from "./dom.js";

// A chip for one verdict; with `press`, a button. `earlier` is the message that decided, if not this.
export function chip(verdict, press, earlier) {
  if (verdict.error) return el("span", { class: "chip flagged" }, el("b", {}, verdict.probe), "no verdict");
  const probability = verdict.probabilities?.[verdict.label];
  const names = verdict.labels?.join(", ") || verdict.label || "none";
  const parts = [
    el("b", {}, verdict.probe),
    el("span", { class: "label" }, verdict.flagged ? `⚑ ${names}` : names),
    probability === undefined ? null : el("span", {}, probability.toFixed(2)),
    el("span", { class: "unseen" }, verdict.flagged ? "flagged" : "not flagged"),
    earlier && el("span", { class: "earlier", title: earlier }, `by the earlier “${cut(earlier, 24)}”`),
  ];
  const look = `chip${verdict.flagged ? " flagged" : ""}`;
  return press
    ? el("button", { type: "button", class: look, "aria-pressed": "false", on: { click: press } }, ...parts)
    : el("span", { class: look }, ...parts);
}

// The beginning of a text.
export function cut(text, most) {
  const characters = Array.from(text);
  return characters.length > most ? `${characters.slice(0, most).join("").trimEnd()}…` : text;
}

// The words of one message that verdicts label; a span without a message is of the only one.
export function spansOf(verdicts, message) {
  return verdicts.flatMap(({ probe, spans = [] }) => spans
    .filter((span) => (span.message ?? message) === message)
    .map((span) => ({ ...span, probe })));
}

// A text whose labelled words are marked; spans that overlap share a mark. Offsets count characters
// as Python does, so an emoji is one.
export function markedText(text, spans) {
  const characters = Array.from(text), parts = [], runs = [];
  const slice = (start, end) => characters.slice(start, end).join("");
  for (const span of [...spans].sort((a, b) => a.start - b.start)) {
    const run = runs.at(-1);
    if (run && span.start < run.end) {
      run.end = Math.max(run.end, span.end);
      run.spans.push(span);
    } else runs.push({ start: span.start, end: span.end, spans: [span] });
  }
  let written = 0;
  for (const run of runs) {
    const told = run.spans.map((span) => `“${slice(span.start, span.end)}” ${span.label} ${span.probability.toFixed(2)}, by ${span.probe}`);
    const labels = [...new Set(run.spans.map((span) => span.label))].join(", ");
    parts.push(slice(written, run.start), el(
      "mark", { title: told.join("; ") }, slice(run.start, run.end),
      el("small", {}, el("span", { class: "unseen" }, " labelled "), labels),
    ));
    written = run.end;
  }
  return [...parts, slice(written)];
}

// The words of a text with the shares of their tokens.
export function wordShares(text, tokens) {
  const words = [];
  let start = 0;
  for (const piece of text.match(/\s*\S+|\s+$/gu) ?? []) {
    const end = start + Array.from(piece).length;
    words.push({ text: piece, end, share: 0 });
    start = end;
  }
  for (const token of tokens) {
    const word = words.find((one) => token.start < one.end) ?? words.at(-1);
    if (word) word.share += token.share;
  }
  return words;
}

function shaded(text, share, most) {
  const part = most > 0 ? share / most : 0;
  return el(
    "span",
    { class: `share ${share < 0 ? "against" : "for"}`, style: { "--share": part.toFixed(3) }, title: signed(share) },
    text,
  );
}

// The text of one message, shaded.
export function shadedText(text, explanation, message = 0) {
  const words = wordShares(text, explanation.tokens.filter((token) => token.message === message));
  const most = Math.max(...words.map((word) => Math.abs(word.share)), 1e-9);
  return words.map((word) => {
    const gap = word.text.match(/^\s*/u)[0];
    return el("span", {}, gap, shaded(word.text.slice(gap.length), word.share, most));
  });
}

// The strongest words as a table: what the colours say, for eyes and screen readers alike.
export function strongest(text, explanation, message = 0) {
  const words = wordShares(text, explanation.tokens.filter((token) => token.message === message));
  const top = words.filter((word) => word.text.trim()).sort((a, b) => Math.abs(b.share) - Math.abs(a.share)).slice(0, 6);
  return el(
    "table", {},
    el("caption", { class: "unseen" }, `Words with the largest shares for ${explanation.label}`),
    el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "Word"), el("th", { scope: "col", class: "number" }, `Share in “${explanation.label}”`))),
    el("tbody", {}, ...top.map((word) => el(
      "tr", {}, el("td", {}, shaded(word.text.trim(), word.share, Math.abs(top[0].share))),
      el("td", { class: "number" }, signed(word.share)),
    ))),
  );
}

export const legend = (explanation) => `Orange words speak for “${explanation.label}”, blue ones against it.`;

export function summary(explanation) {
  const how = explanation.method === "exact" ? "exact shares" : `integrated gradients, ${explanation.steps} steps`;
  const words = explanation.tokens.reduce((sum, token) => sum + token.share, 0);
  return `Logit for “${explanation.label}”: ${signed(explanation.logit)} = ${signed(words)} from the words, `
    + `${signed(explanation.template)} from the chat template, ${signed(explanation.baseline)} from the probe's baseline (${how}).`;
}

// Tokens down, layers across. The arrow keys walk through the cells.
export function heatMap(texts, explanation) {
  const { tokens } = explanation;
  const layers = explanation.layers.map((_, layer) => layer);
  const most = Math.max(...tokens.flatMap((token) => token.layers.map(Math.abs)), 1e-9);
  const said = el("p", { role: "status", class: "quiet" }, "Arrow keys or the pointer show a cell's share.");
  const cells = tokens.map((token) => {
    const name = Array.from(texts[token.message]).slice(token.start, token.end).join("");
    return { name, row: token.layers.map((share, layer) => el("td", {
      class: `share ${share < 0 ? "against" : "for"}`, style: { "--share": (share / most).toFixed(3) },
      "aria-label": signed(share), "data-said": `“${name}”, layer ${layer}: ${signed(share)}`,
    })) };
  });
  const table = el(
    "table", { class: "heat" },
    el("caption", { class: "unseen" }, `Share of each token in each layer for ${explanation.label}`),
    el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "Token"), ...layers.map((layer) => el("th", { scope: "col" }, `${layer}`)))),
    el("tbody", {}, ...cells.map(({ name, row }) => el("tr", {}, el("th", { scope: "row" }, name.replace(/\n/g, "⏎").replace(/^\s+$/, "␣")), ...row))),
  );
  const here = { row: 0, layer: 0 };
  function show(row, layer) {
    cells[here.row]?.row[here.layer]?.classList.remove("here");
    Object.assign(here, { row, layer });
    const cell = cells[row].row[layer];
    cell.classList.add("here");
    cell.scrollIntoView({ block: "nearest", inline: "nearest" });
    said.textContent = cell.dataset.said;
  }
  const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  const box = el("div", {
    class: "scroll", tabindex: "0", role: "region", "aria-label": "Heat map of tokens and layers",
    on: {
      keydown: (event) => {
        const step = steps[event.key];
        if (!step || !cells.length) return;
        event.preventDefault();
        const within = (value, size) => Math.min(Math.max(value, 0), size - 1);
        show(within(here.row + step[0], cells.length), within(here.layer + step[1], layers.length));
      },
      pointerover: (event) => { if (event.target.dataset.said) said.textContent = event.target.dataset.said; },
    },
  }, table);
  return el("div", {}, said, box);
}
