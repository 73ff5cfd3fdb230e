// The server's public API, with the user's key. The key stays in this tab's storage.

const STORED = "sidelight-key";
export const key = {
  get: () => sessionStorage.getItem(STORED) ?? "",
  set: (value) => (value ? sessionStorage.setItem(STORED, value) : sessionStorage.removeItem(STORED)),
};

export class ApiError extends Error {
  // `verdicts` are those on a prompt that was refused.
  constructor(status, body, verdicts = []) {
    super(body?.error?.message ?? `The server answered ${status}.`);
    this.status = status;
    this.code = body?.error?.code ?? null;
    this.verdicts = verdicts;
  }
}

async function send(path, body, signal) {
  const headers = key.get() ? { Authorization: `Bearer ${key.get()}` } : {};
  if (body) headers["Content-Type"] = "application/json";
  const answer = await fetch(path, {
    method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal,
    credentials: "omit", cache: "no-store",
  });
  if (answer.ok) return answer;
  const told = answer.headers.get("x-sidelight-verdicts");
  throw new ApiError(answer.status, await answer.json().catch(() => null), told ? JSON.parse(told) : []);
}

export async function call(path, body) {
  return (await send(path, body)).json();
}

// The chunks of a streamed answer, as they come.
export async function* stream(path, body, signal) {
  const answer = await send(path, { ...body, stream: true }, signal);
  let rest = "";
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new ApiError(0, { error: { message: "The answer broke off." } });
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(200, chunk);
      yield chunk;
    }
  }
}

// Why a probe says what it says of a conversation.
export async function why(model, turns, name, explain = true) {
  const body = { model, input: turns, questions: [{ type: "predicate", name }], explain };
  const { explanations } = await call("v1/decisions", body);
  return explanations.find((one) => one.probe === name);
}

// What one probe says of a text, or of an answer to it, and why.
export async function judge(probe, text, answer, explain) {
  const prompt = { role: "user", content: text };
  if (probe.reads === "prompt") {
    const [{ results }, explanation] = await Promise.all([
      call("v1/moderations", { input: [text], probes: [probe.name] }),
      why(probe.model, [prompt], probe.name, explain),
    ]);
    return { verdict: results[0].sidelight.verdicts[0], explanation };
  }
  if (probe.kind === "multilabel") throw new Error("Probes of answers with several labels are shown in the chat only.");
  const said = await call("v1/decisions", {
    model: probe.model,
    input: [prompt, { role: "assistant", content: answer }],
    questions: [{ type: "choice", name: probe.name, choices: probe.labels.map((value) => ({ value })) }],
    explain,
  });
  const found = said.answers[0];
  if (found.type === "refusal") throw new Error(`Probe '${probe.name}' gives no verdict here. Write an answer for it to judge.`);
  const probabilities = Object.fromEntries(found.probabilities.map((one) => [one.value, one.probability]));
  const limits = probe.thresholds ?? [];
  const marked = new Set(said.spans?.[probe.name]?.map((span) => span.label));
  const held = limits.filter((limit) => marked.has(limit.label) || probabilities[limit.label] >= limit.threshold)
    .map((limit) => limit.label);
  // Without scores, the choice is at the rule's threshold.
  const isScored = probe.kind === "binary" && limits.length > 0;
  const label = isScored ? held[0] ?? probe.labels[0] : found.choice;
  const flagged = probe.kind === "binary" && label === probe.labels[1];
  return {
    verdict: { probe: probe.name, label, labels: [label], probabilities, flagged },
    explanation: said.explanations?.[0],
  };
}
