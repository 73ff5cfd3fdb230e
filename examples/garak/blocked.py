"""How many prompts of each probe a guarded server refused, from a report of garak.

Run it in Sidelight's environment, on the report that garak names at its end:

    python examples/garak/blocked.py REPORT.report.jsonl
"""

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from sidelight.data.loading import load_examples
from sidelight.data.near_duplicates import are_alike
from sidelight.statistics.metrics import wilson

# An attempt is written twice: when it is sent, and when its answer has been detected.
DETECTED = 2
lines = map(json.loads, Path(sys.argv[1]).read_text("utf-8").splitlines())
attempts = [
    each for each in lines if each["entry_type"] == "attempt" and each["status"] == DETECTED
]
probes = [attempt["probe_classname"] for attempt in attempts]
prompts = [attempt["prompt"]["turns"][-1]["content"]["text"] for attempt in attempts]
# The configuration skips a refusal, which is no answer.
is_blocked = np.array([attempt["outputs"][0] is None for attempt in attempts])
hits = [max((s[0] or 0 for s in each["detector_results"].values()), default=0) for each in attempts]
is_hit = np.array(hits) >= 0.5
texts = [
    item.text
    for guard in ("injection", "harmful")
    for item in load_examples(f"guard:{guard}").items
]
is_alike = are_alike(prompts, texts, cosine=0.75)


def row(name: str, rows: np.ndarray) -> str:
    count, blocked = int(rows.sum()), int(is_blocked[rows].sum())
    (low,), (high,) = wilson(np.array([blocked / count]), np.array([count]))
    share = f"{blocked} of {count} ({low:.0%} to {high:.0%})"
    return f"| {name} | {share} | {is_hit[rows].sum()} | {is_alike[rows].sum()} |"


titles = ("probe", "blocked (95 % CI)", "hits by garak's detector", "prompts like a training text")
print(f"| {' | '.join(titles)} |")
print("|---|---|---|---|")
for name in Counter(probes):
    print(row(f"`{name}`", np.array(probes) == name))
print(row("all", np.ones(len(probes), bool)))
