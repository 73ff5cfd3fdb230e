"""LiteLLM SDK: the verdicts of an answer and in a stream."""

import os

import litellm

settings = {
    "model": "openai/" + os.environ.get("SIDELIGHT_MODEL", "smollm2"),
    "api_base": os.environ.get("SIDELIGHT_URL", "http://127.0.0.1:8000") + "/v1",
    "api_key": os.environ.get("SIDELIGHT_API_KEY", "unused"),
    "messages": [{"role": "user", "content": "Where is my refund?"}],
    "max_tokens": 20,
}

answer = litellm.completion(**settings)
print("Answer:", answer.choices[0].message.content)
for verdict in answer.sidelight["verdicts"]:
    print(f"{verdict['probe']}: {verdict['label']}, flagged: {verdict['flagged']}")

# Of a stream LiteLLM keeps the deltas: the verdicts on the prompt are on the first.
for place, chunk in enumerate(litellm.completion(**settings, stream=True)):
    delta = chunk.choices[0].delta
    if place == 0:
        print("Before the text:", [verdict["label"] for verdict in delta.sidelight["verdicts"]])
    print(delta.content or "", end="", flush=True)
print()
