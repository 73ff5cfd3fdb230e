// Starts the page: the key, the served model, its probes, and the tabs.

import { call, key } from "./api.js";
import { startChat } from "./chat.js";
import { find, offer } from "./dom.js";
import { startThresholds } from "./thresholds.js";
import { startCompare, startWhy } from "./why.js";

const LOADING_MS = 2000;

// What the server has.
const listeners = [];
const server = {
  model: "", probes: [],
  probe: (name) => server.probes.find((one) => one.name === name),
  limits: (name) => server.probe(name)?.thresholds ?? [],
  // Whether words of answers are replaced before they are sent.
  redacts: () => server.probes.some((one) => one.reads !== "prompt" && one.mode === "redact"),
  onProbes: (listen) => listeners.push(listen),
  needsKey() {
    say(find("#key").value ? "The server does not know this key. Enter another one under “Key”." : "This server needs an API key. Enter yours under “Key”.", true);
    find("#key-box").open = true;
    find("#key").focus();
  },
};

function say(message, isError = false) {
  find("#status").textContent = message;
  find("#status").className = isError ? "error" : "quiet";
}

async function connect() {
  say("Connecting…");
  try {
    const { data } = await call("v1/models");
    const { probes } = await call("v1/probes");
    server.model = data[0].id;
    server.probes = probes.map((probe) => ({ ...probe, model: server.model }));
    const names = probes.map((probe) => probe.name);
    for (const select of document.querySelectorAll("select.probes")) offer(select, names);
    for (const listen of listeners) listen();
    say(`${server.model}, ${names.length === 1 ? "1 probe" : `${names.length} probes`}: ${names.join(", ") || "start the server with --probe FOLDER"}`);
    find("#key-box").open = false;
  } catch (error) {
    if (error.status === 401) server.needsKey();
    else if (error.status === 503) {
      say(`${error.message} Trying again…`);
      setTimeout(connect, LOADING_MS);
    } else say(error.message, true);
  }
}

const tabs = [...document.querySelectorAll('[role="tab"]')];
function open(tab, focus = false) {
  for (const one of tabs) {
    const isOpen = one === tab;
    one.setAttribute("aria-selected", `${isOpen}`);
    one.tabIndex = isOpen ? 0 : -1;
    find(`#${one.getAttribute("aria-controls")}`).hidden = !isOpen;
  }
  if (focus) tab.focus();
}
for (const [index, tab] of tabs.entries()) {
  tab.addEventListener("click", () => open(tab));
  tab.addEventListener("keydown", (event) => {
    const to = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: tabs.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    open(tabs.at(to % tabs.length), true);
  });
}

find("#key").value = key.get();
find("#key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set(find("#key").value.trim());
  connect();
});
const why = startWhy(server);
startCompare(server);
startThresholds(server);
startChat(server, (text, name) => {
  open(find("#why-tab"), true);
  why(text, name);
});
for (const button of document.querySelectorAll("[data-example]")) {
  button.addEventListener("click", () => {
    find("#prompt").value = button.dataset.example;
    find("#prompt").focus();
  });
}
open(tabs[0]);
connect();
