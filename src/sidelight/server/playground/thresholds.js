// A threshold over the curve that a probe stores: what it would have caught and falsely flagged,
// and the policy file that sets it.

import { copier, el, find, percent } from "./dom.js";

export function startThresholds(server) {
  const select = find("#threshold-probe"), labels = find("#threshold-label"), box = find("#threshold-result");
  const slider = find("#threshold"), mode = find("#threshold-mode");
  const none = find("#threshold-none"), toml = find("#toml"), download = find("#toml-download");
  // By probe: the chosen threshold and mode.
  const rules = new Map();
  let card = null, current = 0;
  find("#toml-tools").prepend(copier(() => toml.textContent));

  select.addEventListener("change", choose);
  labels.addEventListener("change", chooseLabel);
  // Rounded, for a file that people read.
  slider.addEventListener("input", () => change(Number(card.curve.thresholds[point()].toPrecision(6))));
  mode.addEventListener("change", () => change(current));
  find("#threshold-reset").addEventListener("click", () => { place(card.threshold); change(card.threshold); });
  download.addEventListener("click", () => {
    const url = URL.createObjectURL(new Blob([toml.textContent], { type: "application/toml" }));
    el("a", { href: url, download: "policy.toml" }).click();
    setTimeout(() => URL.revokeObjectURL(url), 1000);
  });
  const hasCurve = (probe) => probe?.thresholds?.some((limit) => limit.curve);
  server.onProbes(() => {
    if (!hasCurve(server.probe(select.value))) select.value = server.probes.find(hasCurve)?.name ?? select.value;
    choose();
  });

  function choose() {
    const probe = server.probe(select.value), limits = probe?.thresholds ?? [];
    const usable = limits.filter((limit) => limit.curve);
    labels.replaceChildren(...usable.map((limit) => el("option", { value: limit.label }, limit.label)));
    find("#threshold-label-box").hidden = usable.length < 2;
    find("#threshold-tools").hidden = !usable.length;
    none.hidden = usable.length > 0;
    if (usable.length) return chooseLabel();
    card = null;
    none.textContent = reason(probe);
  }

  function reason(probe) {
    if (!probe) return "No probe is loaded. Start the server with --probe FOLDER.";
    if (!probe.thresholds) return "The server's policy discloses no scores of this probe to your key, so it shows no thresholds either.";
    if (probe.kind === "multiclass") return "This probe has several classes and names the most probable one, so it has no threshold.";
    return "This probe stores no curve. Train it again, or run sidelight recalibrate on labelled texts.";
  }

  function chooseLabel() {
    const probe = server.probe(select.value);
    card = probe.thresholds.find((limit) => limit.label === labels.value);
    slider.max = card.curve.thresholds.length - 1;
    const rule = rules.get(probe.name);
    mode.value = rule?.mode ?? (probe.mode === "score" ? "block" : probe.mode);
    mode.querySelector("[value=route]").disabled = probe.reads !== "prompt";
    mode.querySelector("[value=redact]").disabled = !probe.labels_spans;
    const threshold = rule && (rule.label ?? card.label) === card.label ? rule.threshold : card.threshold;
    place(threshold);
    draw(threshold);
  }

  // Thresholds rise to the right, as people expect of a slider; the curve's own fall.
  const point = () => card.curve.thresholds.length - 1 - Number(slider.value);

  function place(threshold) {
    const distances = card.curve.thresholds.map((one) => Math.abs(one - threshold));
    slider.value = distances.length - 1 - distances.indexOf(Math.min(...distances));
  }

  function change(threshold) {
    const probe = server.probe(select.value);
    const label = probe.kind === "multilabel" ? card.label : null;
    rules.set(probe.name, { side: probe.reads === "prompt" ? "input" : "output", mode: mode.value, threshold, label });
    draw(threshold);
  }

  function draw(threshold) {
    current = threshold;
    const { curve, label } = card, at = point();
    const caught = curve.true_positives[at], alarms = curve.false_positives[at];
    const told = [
      `Catches ${caught} of ${curve.positives} texts that are “${label}” (${percent(caught / Math.max(curve.positives, 1))})`,
      `Falsely flags ${alarms} of ${curve.negatives} others (${percent(alarms / Math.max(curve.negatives, 1))})`,
    ];
    find("#threshold-value").textContent = threshold.toFixed(3);
    slider.setAttribute("aria-valuetext", `${threshold.toFixed(3)}: ${told.join("; ")}`);
    box.replaceChildren(
      el("p", {}, told[0]), bar(caught / Math.max(curve.positives, 1)),
      el("p", {}, told[1]), bar(alarms / Math.max(curve.negatives, 1), "bad"),
      el("p", { class: "quiet" }, caught + alarms
        ? `${percent(caught / (caught + alarms))} of what it flags is right. Each text was judged by a probe that was not trained on it.`
        : "It flags nothing."),
      plot(curve, at),
    );
    toml.textContent = written();
  }

  const bar = (part, kind = "") => el("div", { class: `bar ${kind}`, "aria-hidden": "true" }, el("div", { style: { "--part": part } }));

  function plot(curve, at) {
    const x = (index) => 300 * (curve.false_positives[index] / Math.max(curve.negatives, 1));
    const y = (index) => 100 - 100 * (curve.true_positives[index] / Math.max(curve.positives, 1));
    const path = curve.thresholds.map((_, index) => `${index ? "L" : "M"}${x(index)} ${y(index)}`).join(" ");
    return el("figure", {},
      el("svg", { class: "curve", viewBox: "-8 -8 316 116", role: "img", "aria-label": "Caught against falsely flagged, with the chosen threshold" },
        el("path", { class: "score", d: path }), el("circle", { class: "dot", cx: x(at), cy: y(at), r: 4 })),
      el("figcaption", { class: "quiet" }, "Up: more caught. Right: more falsely flagged. The dot is your threshold."));
  }

  function written() {
    if (!rules.size) return "# Move the slider, or choose what a flag does.";
    const name = (text) => (/^[\w-]+$/.test(text) ? text : JSON.stringify(text));
    const tables = [...rules].map(([probe, rule]) =>
      `[${rule.side}.${name(probe)}]\nmode = "${rule.mode}"\n`
      + (rule.mode === "redact" ? "# Words have thresholds of their own, from training.\n" : `threshold = ${rule.threshold}\n`)
      + (rule.label === null || rule.mode === "redact" ? "" : `# The rule has one threshold, so it counts one label.\nlabels = [${JSON.stringify(rule.label)}]\n`));
    const blocks = [...rules.values()].some((rule) => rule.mode === "block" && rule.side === "input");
    const head = blocks ? '# "trust" if only your application writes system turns: no probe reads them.\nsystem_turns = "refuse"\n\n' : "";
    return head + tables.join("\n");
  }
}
