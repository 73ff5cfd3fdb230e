// As real_clients.py, for the AI SDK: node ai_sdk.mjs SCORING BLOCKING
// Its packages are found from the folder in SIDELIGHT_NODE, which holds node_modules; exit code 3: not installed.
import { createRequire } from "node:module";
import { resolve } from "node:path";
import { pathToFileURL } from "node:url";

const [address, blocking] = process.argv.slice(2);
const require = createRequire(resolve(process.env.SIDELIGHT_NODE ?? ".", "index.js"));
const load = (name) => import(pathToFileURL(require.resolve(name)).href);
let ai, sdk, z;
try {
  ai = await load("ai");
  sdk = await load("@ai-sdk/openai-compatible");
  ({ z } = await load("zod"));
} catch (error) {
  console.error(error.message);
  process.exit(3);
}

const settings = (url) => ({
  model: sdk.createOpenAICompatible({
    name: "sidelight", baseURL: `${url}/v1`, apiKey: "x", includeUsage: true,
    supportsStructuredOutputs: true,
  })("tiny/llama"),
  prompt: "hello", temperature: 0, maxOutputTokens: 4, maxRetries: 0,
});

async function outcome(ask) {
  try {
    await ask();
    return "answered";
  } catch (error) {
    const said = `${error} ${error.responseBody ?? ""} ${error.cause ?? ""}`;
    if (said.includes("--engine vllm")) return "refused";
    return said.includes("was blocked by") ? "raises" : `fails: ${said}`;
  }
}

const { text } = await ai.generateText(settings(address));
let streamed = "";
const stream = ai.streamText(settings(address));
for await (const piece of stream.textStream) streamed += piece;
const usage = await stream.usage;
const clock = ai.tool({ inputSchema: z.object({}), execute: async () => "noon" });
const output = ai.Output.object({ schema: z.object({ number: z.number() }) });
console.log(JSON.stringify({ lanes: {}, client: {
  chat: text ? "works" : "empty",
  stream: streamed === text ? "works" : "differs",
  "usage of a stream": usage.inputTokens ? "kept" : "lost",
  tools: await outcome(() => ai.generateText({ ...settings(address), tools: { clock } })),
  "typed output": await outcome(() => ai.generateText({ ...settings(address), output })),
  "blocked prompt": await outcome(() => ai.generateText(settings(blocking))),
}}));
