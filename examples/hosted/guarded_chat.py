"""Guard a model that you do not host: check the prompt, ask, check the answer.

    sidelight serve --probe guard:injection --policy examples/hosted/policy.toml
    export MODEL_URL=https://api.openai.com/v1 MODEL_API_KEY=... MODEL=...
    python examples/hosted/guarded_chat.py "Where is my refund?"

If Sidelight does not answer, ``is_flagged`` raises: nothing is asked or shown unchecked.
"""

import os
import sys

from openai import BadRequestError, OpenAI

if missing := {"MODEL_URL", "MODEL_API_KEY", "MODEL"} - os.environ.keys():
    sys.exit(f"Set {', '.join(sorted(missing))}: the address, key and name of the hosted model.")

guard = OpenAI(
    base_url=os.environ.get("SIDELIGHT_URL", "http://127.0.0.1:8000") + "/v1",
    api_key=os.environ.get("SIDELIGHT_API_KEY", "unused"),
)
hosted = OpenAI(base_url=os.environ["MODEL_URL"], api_key=os.environ["MODEL_API_KEY"])


def is_flagged(*texts: str) -> bool:
    """Whether a guard flags a text: a question, a document, a tool's result, an answer."""
    try:
        checked = guard.moderations.create(input=texts)
    except BadRequestError:
        # The policy refuses the text, or it is too long to be checked.
        return True
    return any(result.flagged for result in checked.results)


def ask(question: str) -> str:
    """The hosted model's answer, unless a guard flags the question or the answer."""
    if is_flagged(question):
        return "Your message was blocked."
    messages = [{"role": "user", "content": question}]
    completion = hosted.chat.completions.create(model=os.environ["MODEL"], messages=messages)
    answer = completion.choices[0].message.content or ""
    if answer and is_flagged(answer):
        return "The answer was withheld."
    return answer


print(ask(sys.argv[1]))
