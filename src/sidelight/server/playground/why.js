// Why one probe says what it says of one text, and two probes on the same text.

import { judge } from "./api.js";
import { el, find } from "./dom.js";
import { chip, heatMap, legend, shadedText, strongest, summary } from "./explain.js";

export function startWhy(server) {
  const form = find("#why-form"), shown = find("#why-result"), text = find("#why-text"), answer = find("#why-answer");
  const select = find("#why-probe"), answerBox = find("#why-answer-box");
  const chosen = () => server.probe(select.value);
  const update = () => { answerBox.hidden = chosen()?.reads === "prompt"; };
  select.addEventListener("change", update);
  server.onProbes(update);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    explainNow(false);
  });

  const explainNow = (isDrawn) => guarded(server, shown, async () => {
    const probe = chosen(), texts = [text.value, answer.value];
    const { verdict, explanation } = await judge(probe, ...texts, isDrawn ? "matrix" : true);
    shown.replaceChildren(...explained(verdict, explanation, texts, answerBox.hidden));
    if (explanation.error) shown.append(el("p", {}, "The server's policy does not explain this probe to your key."));
    else if (!isDrawn) shown.append(el("button", { type: "button", on: { click: () => explainNow(true) } }, "Show the heat map of tokens and layers"));
    else {
      shown.append(el("h3", {}, "Tokens and layers"), heatMap(texts, explanation));
      shown.querySelector("[tabindex]").focus();
    }
  });

  // The heat map of this text by the probe of this name.
  return (given, name) => {
    text.value = given;
    select.value = name;
    update();
    explainNow(true);
  };
}

export function startCompare(server) {
  const form = find("#compare-form"), shown = find("#compare-result"), text = find("#compare-text"), answer = find("#compare-answer");
  const selects = [find("#compare-a"), find("#compare-b")], answerBox = find("#compare-answer-box");
  const update = () => {
    answerBox.hidden = selects.every((select) => server.probe(select.value)?.reads === "prompt");
  };
  for (const select of selects) select.addEventListener("change", update);
  server.onProbes(() => {
    if (selects[1].options.length > 1 && selects[0].value === selects[1].value) selects[1].selectedIndex = 1;
    update();
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    return guarded(server, shown, async () => {
      const texts = [text.value, answer.value], probes = selects.map((select) => server.probe(select.value));
      const found = await Promise.all(probes.map((probe) => judge(probe, ...texts, true)));
      const [a, b] = found.map((one) => one.verdict);
      const said = (verdict) => {
        if (server.probe(verdict.probe).kind === "multiclass") return `says “${verdict.label}”`;
        return verdict.flagged ? "flags it" : "does not flag it";
      };
      shown.replaceChildren(
        el("p", {}, `A, ${a.probe}, ${said(a)}; B, ${b.probe}, ${said(b)}.`),
        el("div", { class: "pair" }, ...found.map(({ verdict, explanation }, index) => el(
          "section", { "aria-label": `Probe ${"AB"[index]}` },
          el("h3", {}, `${"AB"[index]}: ${verdict.probe}`),
          ...explained(verdict, explanation, texts, probes[index].reads === "prompt"),
          el("h3", {}, "Probabilities"), probabilities(verdict),
        ))),
      );
    });
  });
}

function explained(verdict, explanation, texts, isPrompt) {
  const head = el("p", {}, chip(verdict));
  if (explanation.error) return [head];
  const parts = [0, 1].filter((index) => explanation.tokens.some((token) => token.message === index));
  return [
    head,
    ...parts.map((index) => el(
      "div", { class: "text" }, isPrompt || parts.length < 2 ? "" : el("b", {}, index ? "Answer: " : "Prompt: "),
      ...shadedText(texts[index], explanation, index),
    )),
    el("p", { class: "quiet" }, `${legend(explanation)} ${summary(explanation)}`),
    ...parts.map((index) => strongest(texts[index], explanation, index)),
  ];
}

function probabilities(verdict) {
  if (!verdict.probabilities) return el("p", { class: "quiet" }, "The policy tells your key no scores.");
  return el("table", {}, el("caption", { class: "unseen" }, `Probabilities of ${verdict.probe}`), el(
    "tbody", {}, ...Object.entries(verdict.probabilities).map(([label, value]) => el(
      "tr", {}, el("th", { scope: "row" }, label), el("td", { class: "number" }, value.toFixed(3)),
    )),
  ));
}

// Shows a failure where the result would be.
async function guarded(server, place, work) {
  place.replaceChildren(el("p", { class: "quiet" }, "Classifying…"));
  try {
    await work();
  } catch (error) {
    place.replaceChildren(el("p", { class: "error" }, error.message));
    if (error.status === 401) server.needsKey();
  }
}
