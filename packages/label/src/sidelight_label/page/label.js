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
let polling = null;
// The criterion that is being edited, as it was before.
let edited = null;

// The token is in the part of the address that browsers never send. It leaves the address bar.
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
  } else if (failure) {
    find("#training").textContent = failure;
  } else if (now.comparisons.length) {
    find("#training").textContent = `The probe is in ${folder}.`;
  }
  if (wasRunning && !is_running && !failure) find("#said").textContent = "The probe is trained, and the texts are in its order.";
  find("#comparisons").replaceChildren(...now.comparisons.map(comparisons));
  showCriterion(now.criterion);
  showJudge(now.judge);
  if ((is_running || now.judge?.is_asked) && !polling) polling = setTimeout(poll, 500);
}

function showCriterion(criterion) {
  find("#criterion").hidden = !criterion;
  if (!criterion) return;
  const place = find("#criterion-text");
  // An update from the server must not overwrite unsaved edits.
  if (!isEdited()) {
    place.value = criterion.text;
    edited = criterion.text;
  }
  const label = criterion.label ? `A text that meets it is '${criterion.label}'. ` : "";
  find("#criterion-note").textContent = `${label}It is in ${criterion.file}.${state.judge ? " After an edit, the judge is asked again, and a new sample checks it. Your labels stay." : ""}`;
  showEdited();
}

function isEdited() {
  return edited !== null && find("#criterion-text").value !== edited;
}

function showEdited() {
  for (const name of ["#criterion-save", "#criterion-reset"]) find(name).disabled = !isEdited();
}

function showJudge(judge) {
  find("#judge").hidden = !judge;
  if (!judge) return;
  const failed = judge.failed ? ` It gave no answer to ${judge.failed}, which come to you.` : "";
  const count = judge.positives === null ? "" : `, ${judge.positives} of them as '${state.labels[1]}'`;
  find("#judge-title").textContent = `The judge: ${judge.name}`;
  find("#judge-state").textContent = `${stateOf(judge)} It has labelled ${judge.answered} texts${count}.${failed}`;
  find("#judge-agreement").textContent = judge.agreement ? `Balanced agreement with you: ${judge.agreement}.` : "";
  find("#judge-earlier").textContent = judge.earlier
    ? `On texts that you labelled outside of this sample: ${judge.earlier}. They may have shaped the criterion, so they do not count.` : "";
  const ask = find("#ask");
  ask.hidden = judge.is_asked || !(judge.state === "unasked" || (judge.state === "passed" && (judge.cost || !judge.is_doubted)));
  ask.textContent = judge.state === "unasked" ? "Ask the judge about a first part"
    : judge.cost ? `Let the judge label the rest: ${judge.cost}` : "Look for labels that the probe doubts";
  find("#judge-asked").textContent = judge.is_asked
    ? (judge.progress ? `Asked about ${judge.progress.done} of ${judge.progress.total} texts. You can label on.` : "Fitting a probe. You can label on.")
    : judge.failure;
  const place = find("#differences");
  place.hidden = judge.disagreements.length === 0;
  place.querySelector(".scroll").replaceChildren(differences(judge.disagreements));
}

function stateOf(judge) {
  const least = judge.least.toFixed(2);
  if (judge.state === "passed") return "It has passed: its labels count.";
  if (judge.state === "open") return `Label a blind sample first: ${judge.left} texts are left. The judge's labels count if your agreement with it is at least ${least}.`;
  if (judge.state === "unasked") return "It has not labelled the texts under this criterion.";
  if (judge.state === "too_few") return "The texts have too few of one label to check it, so its labels do not count. Add more texts.";
  if (!judge.agreement) return "It gives all texts the same label, so its labels do not count. Edit the criterion, or take another judge.";
  return `Its agreement is below ${least}, so its labels do not count. Edit the criterion, or take another judge.`;
}

function differences(rows) {
  const heads = ["text", "you", "judge"].map((name) => el("th", { scope: "col" }, name));
  return el("table", {},
    el("thead", {}, el("tr", {}, ...heads)),
    el("tbody", {}, ...rows.map(({ text: words, person, judge, probability }) => el("tr", {},
      el("td", {}, el("div", { class: "text", tabindex: "0", role: "group", "aria-label": "Text" }, words)),
      el("td", {}, person),
      el("td", {}, `${judge} (${state.labels[1]}: ${percent(probability)})`)))));
}

async function poll() {
  polling = null;
  try {
    const before = state;
    const now = await call("api/state");
    // What the judge has answered changes which text is next.
    if (before.judge?.is_asked && !now.judge?.is_asked && now.text?.row !== text?.row) show(now, "The judge has answered.");
    else showState(now);
  } catch (error) {
    find("#error").textContent = error.message;
  }
}

function comparisons({ title, note, rows }) {
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
  // Closed for each text: people who see the verdict first tend to agree with it.
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
find("#ask").addEventListener("click", () => ask("api/ask", {}, "The judge is asked."));
find("#criterion-text").addEventListener("input", showEdited);
find("#criterion-reset").addEventListener("click", () => {
  find("#criterion-text").value = edited = state.criterion.text;
  showEdited();
});
find("#criterion-save").addEventListener("click", async () => {
  try {
    const now = await call("api/criterion", { text: find("#criterion-text").value, seen: edited });
    find("#criterion-text").value = edited = now.criterion.text;
    show(now, "The criterion is saved.");
  } catch (error) {
    find("#error").textContent = error.message;
  }
});

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
  if (event.target.closest("textarea")) return;
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
