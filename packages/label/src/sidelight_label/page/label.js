// One text at a time: it is shown, decided and saved, and the next one comes with the answer.

import { call, key } from "./api.js";
import { el, find, percent } from "./dom.js";

const METRICS = {
  auprc: "AUPRC", auroc: "AUROC", f1: "F1", accuracy: "accuracy", macro_f1: "macro F1",
  recall_at_1pct_fpr: "recall at 1 % FPR", ece: "ECE",
};
const KEYED = 9;

let state = null;
let text = null;
let chosen = new Set();
let isBusy = false;

// The token is in the part of the address that browsers send to nobody. It leaves the address bar.
if (location.hash.length > 1) {
  key.set(location.hash.slice(1));
  history.replaceState(null, "", location.pathname);
}

async function ask(path, body, said) {
  if (isBusy) return;
  isBusy = true;
  try {
    show(await call(path, body), said);
  } catch (error) {
    const message = [401, 403].includes(error.status) ? "Open the address that 'sidelight label' printed." : error.message;
    // Another tab may have been faster: what is true now is shown beside the message.
    if (error.status) await call("api/state").then((now) => show(now), () => {});
    find("#error").textContent = message;
  } finally {
    isBusy = false;
  }
}

function show(now, said) {
  const isFirst = state === null;
  find("#error").textContent = "";
  showState(now);
  text = now.text;
  chosen = new Set();
  showText();
  if (said) find("#said").textContent = `${said} ${now.done} of ${now.total} labelled.${text ? " The next text:" : ""}`;
  if (!isFirst) find("#text").focus();
}

function showState(now) {
  const wasRunning = state?.training.is_running;
  state = now;
  find("#sitting").hidden = false;
  find("#progress").textContent = `${now.done} of ${now.total} labelled, ${now.skipped} skipped`;
  find("#order").textContent = `Order: ${now.order}.`;
  const { is_running, obstacle, failure, folder } = now.training;
  find("#obstacle").textContent = obstacle;
  find("#train").disabled = is_running || Boolean(obstacle);
  find("#undo").disabled = now.last === null;
  if (is_running) {
    find("#training").textContent = "Training. You can label on.";
    setTimeout(poll, 500);
  } else if (failure) {
    find("#training").textContent = failure;
  } else if (now.figures.length) {
    find("#training").textContent = `The probe is in ${folder}.`;
  }
  if (wasRunning && !is_running && !failure) find("#said").textContent = "The probe is trained, and the texts are in its order.";
  find("#figures").replaceChildren(...now.figures.map(figures));
}

async function poll() {
  try {
    showState(await call("api/state"));
  } catch (error) {
    find("#error").textContent = error.message;
  }
}

function figures({ title, note, rows }) {
  const shown = Object.keys(METRICS).filter((metric) => Object.values(rows).some((row) => row[metric]?.value != null));
  const cell = (row, metric) => {
    const { value, ci } = row[metric] ?? {};
    const interval = ci?.[0] != null ? ` [${ci[0].toFixed(2)}, ${ci[1].toFixed(2)}]` : "";
    return el("td", { class: "number" }, value == null ? "–" : value.toFixed(3) + interval);
  };
  return el("div", {},
    el("h3", {}, title),
    note && el("p", { class: "quiet" }, note),
    el("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": title }, el("table", {},
      el("thead", {}, el("tr", {},
        el("th", { scope: "col" }, "probe"),
        el("th", { scope: "col", class: "number" }, "texts"),
        ...shown.map((metric) => el("th", { scope: "col", class: "number" }, METRICS[metric])))),
      el("tbody", {}, ...Object.entries(rows).map(([name, row]) => el("tr", {},
        el("th", { scope: "row" }, name),
        el("td", { class: "number" }, String(row.rows)),
        ...shown.map((metric) => cell(row, metric))))))));
}

function showText() {
  const place = find("#text");
  const turns = text ? [...text.messages] : [];
  if (text && text.response !== null) turns.push({ role: "assistant", content: text.response });
  const isPlain = turns.length === 1 && turns[0].role === "user";
  place.replaceChildren(...turns.flatMap(({ role, content }) => [
    isPlain ? null : el("div", { class: "who" }, role),
    el("div", { class: "text" }, content),
  ]).filter(Boolean));
  if (!text) place.textContent = "All texts are labelled. Press t to train on them, then end the command in the terminal: it prints what comes next.";
  place.scrollTop = 0;
  find("#cut").hidden = !text?.dropped;
  if (text?.dropped) find("#cut").textContent = `Probes read ${text.tokens - text.dropped} of its ${text.tokens} tokens.`;
  showOpinions();
  find("#labels").replaceChildren(...state.labels.map(labelButton));
  find("#save").hidden = state.kind !== "multilabel";
  for (const button of document.querySelectorAll("#labels button, #save, #skip")) button.disabled = !text;
}

function labelButton(label, index) {
  const isSet = state.kind === "multilabel";
  const number = index < KEYED ? String(index + 1) : null;
  const button = el("button", {
    type: "button", "aria-keyshortcuts": number, "aria-pressed": isSet && "false",
    on: { click: () => (isSet ? toggle(label, button) : decide([label])) },
  }, number && el("kbd", {}, number), ` ${label} `, el("small", {}, `(${state.counts[label]})`));
  return button;
}

function showOpinions() {
  const details = find("#opinions");
  const said = Object.entries(text?.opinions ?? {});
  details.hidden = said.length === 0;
  // Closed for each text: whoever sees the verdict first tends to agree with it.
  details.open = false;
  details.querySelector("ul").replaceChildren(...said.map(([name, chances]) => {
    const best = Object.entries(chances).sort(([, a], [, b]) => b - a).slice(0, KEYED);
    return el("li", {}, `${name}: ${best.map(([label, chance]) => `${label} ${percent(chance)}`).join(", ")}`);
  }));
}

function toggle(label, button) {
  if (!chosen.delete(label)) chosen.add(label);
  button.setAttribute("aria-pressed", String(chosen.has(label)));
}

function decide(labels) {
  if (text) ask("api/label", { row: text.row, labels }, `Saved as ${labels.join(", ") || "none of the labels"}.`);
}

function undo() {
  if (state.last !== null) ask("api/undo", { row: state.last }, "Taken back.");
}

find("#save").addEventListener("click", () => decide([...chosen]));
find("#skip").addEventListener("click", () => text && ask("api/skip", { row: text.row }, "Skipped."));
find("#undo").addEventListener("click", undo);
find("#train").addEventListener("click", train);

async function train() {
  if (find("#train").disabled) return;
  find("#train").disabled = true;
  find("#said").textContent = "Training.";
  try {
    showState(await call("api/train", {}));
  } catch (error) {
    find("#error").textContent = error.message;
    find("#train").disabled = false;
  }
}

document.addEventListener("keydown", (event) => {
  // A key that is held down decides one text, not twenty.
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey || !state || !find("#keys").checked) return;
  const onControl = event.target.closest("button, summary, input");
  const button = /^[1-9]$/.test(event.key) ? find("#labels").children[Number(event.key) - 1]
    : event.key === "s" ? find("#skip")
    : event.key === "u" ? find("#undo")
    : event.key === "t" ? find("#train")
    : event.key === "Enter" && !onControl && !find("#save").hidden ? find("#save")
    : null;
  if (!button) return;
  event.preventDefault();
  button.click();
});

ask("api/state");
