"""LangChain: verdicts from the response headers, the one lane that it keeps."""

import json
import os

from langchain_openai import ChatOpenAI

# In a stream the headers hold the verdicts on the prompt.
chat = ChatOpenAI(
    model=os.environ.get("SIDELIGHT_MODEL", "smollm2"),
    base_url=os.environ.get("SIDELIGHT_URL", "http://127.0.0.1:8000") + "/v1",
    api_key=os.environ.get("SIDELIGHT_API_KEY", "unused"),
    max_tokens=20,
    include_response_headers=True,
)


def verdicts(message):
    return json.loads(message.response_metadata["headers"]["x-sidelight-verdicts"])


message = chat.invoke("Where is my refund?")
print("Answer:", message.content)
for verdict in verdicts(message):
    print(f"{verdict['probe']}: {verdict['label']}, flagged: {verdict['flagged']}")

for place, chunk in enumerate(chat.stream("Where is my refund?")):
    if place == 0:
        print("Before the text:", [verdict["label"] for verdict in verdicts(chunk)])
    print(chunk.content, end="", flush=True)
print()
