"""LangChain: ask probes about one text, as OpenAI's decisions.

sidelight serve --probe guard:injection
python examples/langchain_decisions.py "Where is my refund?"
"""

import os
import sys

from langchain_openai import OpenAIDecisions
from langchain_openai.decisions import Predicate

decisions = OpenAIDecisions(
    model=os.environ.get("SIDELIGHT_MODEL", "smollm2"),
    base_url=os.environ.get("SIDELIGHT_URL", "http://127.0.0.1:8000") + "/v1",
    api_key=os.environ.get("SIDELIGHT_API_KEY", "unused"),
)
# The name of a question is that of a probe, which was trained for it: instructions are not read.
question = {"injection": Predicate(instructions="Does the text give orders to the model?")}
answer = decisions.invoke({"input": sys.argv[1], "questions": question})
print(f"injection: {answer.predicates['injection'].probability:.2f}")
