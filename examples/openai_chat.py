"""openai-python: the verdicts of an answer and in a stream, and what an error says."""

import os

from openai import BadRequestError, OpenAI

client = OpenAI(
    base_url=os.environ.get("SIDELIGHT_URL", "http://127.0.0.1:8000") + "/v1",
    api_key=os.environ.get("SIDELIGHT_API_KEY", "unused"),
)
model = client.models.list().data[0].id
messages = [{"role": "user", "content": "Where is my refund?"}]

answer = client.chat.completions.create(model=model, messages=messages, max_tokens=20)
print("Answer:", answer.choices[0].message.content)
for verdict in answer.model_extra["sidelight"]["verdicts"]:
    print(f"{verdict['probe']}: {verdict['label']}, flagged: {verdict['flagged']}")
if answer.moderation.input.type == "moderation_results":
    for result in answer.moderation.input.results:
        print(result.model, result.category_scores)

# The verdicts on the prompt come with the first chunk, before any text.
stream = client.chat.completions.create(model=model, messages=messages, max_tokens=20, stream=True)
for chunk in stream:
    if chunk.choices:
        delta = chunk.choices[0].delta
        if delta.role:
            print("Before the text:", [v["label"] for v in delta.sidelight["verdicts"]])
        print(delta.content or "", end="", flush=True)
print()

# A blocked prompt is a 400 too, with the code "content_filter".
try:
    client.chat.completions.create(
        model=model, messages=messages, extra_body={"probes": ["no such probe"]}
    )
except BadRequestError as error:
    print("Refused:", error.code, "-", error.body["message"])
