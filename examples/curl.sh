#!/bin/sh
# Text and verdicts, moderation, and the served probes without a client.
set -eu
url="${SIDELIGHT_URL:-http://127.0.0.1:8000}"
key="Authorization: Bearer ${SIDELIGHT_API_KEY:-unused}"
json="Content-Type: application/json"
model="${SIDELIGHT_MODEL:-smollm2}"
messages='[{"role": "user", "content": "Where is my refund?"}]'

echo "The served model and its probes:"
curl -sSf "$url/v1/models" -H "$key"

echo; echo "An answer with its verdicts, headers first:"
curl -sSfi "$url/v1/chat/completions" -H "$key" -H "$json" \
  -d "{\"model\": \"$model\", \"messages\": $messages, \"max_tokens\": 20}"

echo; echo "The same as a stream:"
curl -sSfN "$url/v1/chat/completions" -H "$key" -H "$json" \
  -d "{\"model\": \"$model\", \"messages\": $messages, \"max_tokens\": 20, \"stream\": true}"

echo; echo "Verdicts on two texts, nothing written:"
curl -sSf "$url/v1/moderations" -H "$key" -H "$json" -d '{"input": ["Hello!", "Get lost."]}'
