// The chat: streamed text, verdicts as they come, running scores, marked and shaded words.

import { stream, why } from "./api.js";
import { el, find } from "./dom.js";
import { chip, cut, legend, markedText, shadedText, spansOf, strongest } from "./explain.js";

const WIDTH = 300;
const invitation = "Press a verdict to shade the words by what they add to it.";

export function startChat(server, openWhy) {
  const log = find("#log"), form = find("#composer"), prompt = find("#prompt"), stop = find("#stop");
  let turns = [], running = null;

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (prompt.value.trim() && !running) ask(prompt.value);
  });
  prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
  stop.addEventListener("click", () => running?.abort());
  find("#clear").addEventListener("click", () => {
    running?.abort();
    turns = [];
    log.replaceChildren();
    prompt.focus();
  });

  async function ask(text) {
    const asked = turnOf("You", "user", text), written = turnOf(server.model, "assistant", "");
    const messages = [...turns, { role: "user", content: text }];
    const scores = new Map();
    let answer = "", reason = null, tokens = 0;
    asked.state("Classifying…");
    log.append(asked.box);
    asked.box.scrollIntoView({ block: "nearest" });
    prompt.value = "";
    running = new AbortController();
    stop.hidden = false;
    const body = {
      model: server.model, messages,
      max_tokens: Number(find("#max-tokens").value) || 80,
      temperature: Number(find("#temperature").value) || 0,
      stream_options: { include_scores: true, include_usage: true },
    };
    try {
      for await (const chunk of stream("v1/chat/completions", body, running.signal)) {
        const [choice] = chunk.choices, extension = chunk.sidelight;
        const verdicts = choice?.delta.sidelight?.verdicts;
        if (extension?.running) {
          for (const verdict of extension.running.verdicts) score(verdict, extension.running.tokens);
        }
        if (choice?.delta.role) {
          asked.verdicts(verdicts, messages);
          asked.mark(text, spansOf(verdicts, messages.length - 1));
          if (verdicts.length) asked.explain(messages, server.model, (name) => openWhy(text, name));
          log.append(written.box);
          written.box.setAttribute("aria-busy", "true");
        } else if (verdicts) {
          written.verdicts(verdicts);
          // Spans are those of the text as it was before words of it were replaced.
          if (!server.redacts()) written.mark(answer, spansOf(verdicts, messages.length));
        }
        if (choice?.delta.content) {
          answer += choice.delta.content;
          written.text.append(choice.delta.content);
        }
        reason = choice?.finish_reason ?? reason;
        tokens = chunk.usage?.completion_tokens ?? tokens;
      }
      if (reason === "content_filter") {
        written.box.classList.add("cut");
        written.state(`✂ Cut by the policy after ${tokens} tokens; the last of them were never sent.`);
      } else written.state(`${tokens} tokens${reason === "length" ? ", then the limit of tokens" : ""}.`);
      turns = [...messages, { role: "assistant", content: answer }];
    } catch (error) {
      const failed = written.box.isConnected ? written : asked;
      if (error.name === "AbortError") failed.state("Stopped.");
      else if (error.code === "content_filter") {
        asked.box.classList.add("cut");
        asked.verdicts(error.verdicts);
        asked.state(`${error.message} The model has not answered.`, true);
      } else {
        failed.state(error.message, true);
        if (error.status === 401) server.needsKey();
        if (failed === asked) prompt.value = text;
      }
    } finally {
      running = null;
      stop.hidden = true;
      written.box.removeAttribute("aria-busy");
      form.scrollIntoView({ block: "nearest" });
    }

    // One curve for each probe: the label that is nearest to its threshold, or over it.
    function score(verdict, count) {
      const limits = server.limits(verdict.probe);
      const over = (limit) => verdict.probabilities[limit.label] - limit.threshold;
      const limit = limits.reduce((best, one) => (best && over(best) >= over(one) ? best : one), null);
      if (!limit) return;
      if (!scores.has(verdict.probe)) {
        scores.set(verdict.probe, meter(verdict.probe));
        written.box.append(scores.get(verdict.probe).box);
      }
      scores.get(verdict.probe).push(count, verdict.probabilities[limit.label], limit);
    }
  }

  function turnOf(who, role, content) {
    const text = el("div", { class: "text" }, content);
    const chips = el("ul", { class: "chips", "aria-label": `Verdicts on this ${role === "user" ? "prompt" : "answer"}` });
    const state = el("p", { class: "quiet" }), words = el("div", {});
    const box = el("article", { class: `turn ${role}`, "aria-label": who }, el("div", { class: "who" }, who), text, chips, state, words);
    let shade = () => {}, spans = [];
    chips.hidden = true;
    return {
      box, text,
      mark(said, labelled) {
        spans = labelled;
        text.replaceChildren(...markedText(said, spans));
      },
      state(message, isError = false) {
        state.textContent = message;
        state.className = isError ? "error" : "quiet";
      },
      // With the messages that they are on, they can be explained.
      verdicts(found, messages) {
        const turns = messages?.filter(({ content }) => content);
        state.textContent = "";
        chips.hidden = !found.length;
        chips.replaceChildren(...found.map((verdict) => {
          const earlier = turns?.slice(0, -1)[verdict.turn]?.content;
          const made = chip(verdict, messages && !verdict.error ? () => shade(verdict.probe, made) : undefined, earlier);
          return el("li", {}, made);
        }));
        if (!found.length) state.textContent = role === "user" ? "No probe that this key sees reads the prompt." : "";
      },
      explain(messages, model, more) {
        const index = messages.length - 1, { content } = messages[index];
        const explanations = new Map();
        state.textContent = invitation;
        shade = async (name, pressed) => {
          const isOn = pressed.getAttribute("aria-pressed") === "true";
          for (const other of chips.querySelectorAll("[aria-pressed]")) other.setAttribute("aria-pressed", "false");
          words.replaceChildren();
          text.replaceChildren(...markedText(content, spans));
          state.textContent = invitation;
          if (isOn) return;
          pressed.setAttribute("aria-pressed", "true");
          if (!explanations.has(name)) explanations.set(name, why(model, messages, name));
          let found;
          try {
            found = await explanations.get(name);
          } catch (error) {
            explanations.delete(name);
            state.textContent = error.message;
          }
          // Another verdict may have been pressed meanwhile.
          if (!found || pressed.getAttribute("aria-pressed") !== "true") return;
          if (found.error) {
            state.textContent = "The server's policy does not explain this probe to your key.";
            return;
          }
          state.textContent = legend(found);
          const isOf = (message) => found.tokens.some((token) => token.message === message);
          if (!isOf(index)) {
            const decisive = messages.findIndex((_, message) => isOf(message));
            state.textContent = `Your message “${cut(messages[decisive]?.content ?? "", 60)}” decided, so this one has no shares.`;
            return;
          }
          text.replaceChildren(...shadedText(content, found, index));
          words.append(
            strongest(content, found, index),
            el("button", { type: "button", on: { click: () => more(name) } }, "Heat map of this text"),
          );
        };
      },
    };
  }
}

// The running score of one probe: a line over the tokens, and its threshold.
function meter(probe) {
  const limitLine = el("line", { class: "limit", x1: 0, x2: WIDTH });
  const line = el("path", { class: "score" });
  const said = el("span", {});
  const svg = el("svg", { viewBox: `0 0 ${WIDTH} 100`, preserveAspectRatio: "none", role: "img" }, limitLine, line);
  const points = [];
  return {
    box: el("div", { class: "running" }, svg, said),
    push(count, score, limit) {
      points.push([count, score]);
      const scale = Math.max(count - 1, 30);
      line.setAttribute("d", points.map(([x, y], i) => `${i ? "L" : "M"}${((x - 1) / scale) * WIDTH} ${100 - 100 * y}`).join(" "));
      for (const end of ["y1", "y2"]) limitLine.setAttribute(end, 100 - 100 * limit.threshold);
      const told = `${probe}: ${limit.label} ${score.toFixed(3)}, threshold ${limit.threshold.toFixed(3)}`;
      said.textContent = told;
      svg.setAttribute("aria-label", `Running score. ${told}`);
    },
  };
}
