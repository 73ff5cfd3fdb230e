"""The table of outcomes in docs/policies.md is what a live server does."""

import re
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from policy_contract import ADMIN, CHATS, chunks_of
from sidelight.engines.base import ResponseScored, Sampling, TextDelta
from sidelight.engines.transformers.engine import TransformersEngine
from sidelight.models.conversation import Reads
from sidelight.policy.rules import Policy, Rule
from sidelight.probes.probe import Probe
from worlds.data import documented_table
from worlds.models import tiny_backbone, untrained_probe
from worlds.servers import MODEL, events_of, faults, in_process, run_engine

TEXT = "hello"
TOKENS = 24
REQUEST = {
    "model": MODEL,
    "messages": [{"role": "user", "content": TEXT}],
    "temperature": 0,
    "max_tokens": TOKENS,
}
# The forward pass in which faults strike: it reads the response's eighth token.
FAULTY_PASS = 9
CUT_AT = FAULTY_PASS - 1
MIDWAY = {"at_pass": FAULTY_PASS, "cut_at": CUT_AT}
BACKBONE = tiny_backbone()


@dataclass(frozen=True)
class Case:
    """One way in which a request goes; ``fault`` strikes the probe, at the start or in a pass."""

    side: str
    rule: Rule = field(default_factory=Rule)
    fault: Callable[[Probe], None] = lambda probe: None
    at_pass: int = 0
    cut_at: int = 0
    is_reloaded: bool = False
    is_unaudited: bool = False


def spoil(probe):
    """Its logits are no numbers from now on."""
    probe.mechanism.bias.fill_(float("nan"))


def derange(probe):
    """Its next use raises, as torch does where shapes do not fit."""
    probe.mechanism.gate = nn.Parameter(torch.zeros(4, 32, 9), requires_grad=False)


def fail(_probe):
    raise RuntimeError("out of memory")


FLAGS_ALL = Rule(threshold=0.0)
FLAGS_NONE = Rule(threshold=1.0)


def written():
    """The whole text by deltas, and the running score of each token."""
    probes = [untrained_probe(BACKBONE, "late", reads=Reads("response"))]
    sampling = Sampling(temperature=0.0, max_tokens=TOKENS)
    events = run_engine(
        BACKBONE,
        lambda engine: events_of(engine, TEXT, sampling, monitored=("late",)),
        probes=probes,
    )
    verdicts = [event.verdicts.verdicts[0] for event in events if isinstance(event, ResponseScored)]
    deltas = [event for event in events if isinstance(event, TextDelta)]
    return deltas, [verdict.probabilities["toxic"] for verdict in verdicts]


DELTAS, SCORES = written()


def midway_threshold():
    """A threshold that two tokens in a row reach in the middle of the text, and none before."""
    for cut_at in range(6, TOKENS - 6):
        threshold = min(SCORES[cut_at - 2 : cut_at])
        streaks = [min(SCORES[i - 2 : i]) >= threshold for i in range(2, cut_at)]
        if not any(streaks):
            return threshold, cut_at
    raise AssertionError("this text has no such place")


THRESHOLD, FLAGGED_AT = midway_threshold()
CASES = {
    "probe reloaded from garbage, prompt flagged": Case("input", FLAGS_ALL, is_reloaded=True),
    "prompt flagged": Case("input", FLAGS_ALL),
    "audit log cannot be written": Case("input", FLAGS_NONE, is_unaudited=True),
    "prompt's verdict is NaN": Case("input", FLAGS_NONE, fault=spoil),
    "prompt longer than `max_tokens`": Case("input", replace(FLAGS_NONE, max_tokens=3)),
    "prompt's probe raises": Case("input", FLAGS_NONE, fault=derange),
    "response flagged midway": Case("output", Rule(threshold=THRESHOLD), cut_at=FLAGGED_AT),
    "flagged response shorter than the warm-up": Case(
        "output", Rule(threshold=0.0, warm_up=TOKENS)
    ),
    "response's verdict is NaN": Case("output", FLAGS_NONE, fault=spoil),
    "response's verdict is NaN midway": Case("output", FLAGS_NONE, fault=spoil, **MIDWAY),
    "response longer than `max_tokens`": Case(
        "output", replace(FLAGS_NONE, max_tokens=CUT_AT - 1), cut_at=CUT_AT
    ),
    "response's probe raises midway": Case("output", FLAGS_NONE, fault=derange, **MIDWAY),
    "engine fails midway": Case("output", FLAGS_NONE, fault=fail, **MIDWAY),
}


_ROWS = [[*row.values()] for row in documented_table("policies.md", "case", "rule")]
# That generation stops where a client leaves is a law of ``test_server_audit``: it takes a socket.
LEAVING = "client leaves midway"
TOLD = [row for row in _ROWS if row[0] != LEAVING]


def test_documented_table_lists_every_case():
    assert {row[0] for row in _ROWS} == {*CASES, LEAVING}


@pytest.mark.slow
@pytest.mark.parametrize("row", TOLD, ids=[f"{row[0]}, {row[1]}" for row in TOLD])
def test_server_behaves_as_documented_table_states(row, tmp_path):
    name, rule, plain, streamed, text = row
    case = CASES[name]
    with serving(case, rule, tmp_path) as http:
        assert plain_result(http) == plain
    with serving(case, rule, tmp_path) as http:
        result, sent = streamed_result(http)
    assert result == streamed
    assert shape(sent, case) == text


@contextmanager
def serving(case, rule, folder):
    prompt_probe = untrained_probe(BACKBONE, "early")
    response_probe = untrained_probe(BACKBONE, "late", reads=Reads("response"))
    fault = partial(case.fault, prompt_probe if case.side == "input" else response_probe)
    if not case.at_pass:
        fault()
    # A real device on which every write fails as on a full disk.
    audit = Path("/dev/full") if case.is_unaudited else None
    engine = TransformersEngine(BACKBONE, [prompt_probe, response_probe])
    options = {"policy": policy_of(case, rule), "admin_key": ADMIN, "audit_log": audit}
    with faults(BACKBONE, {case.at_pass: fault}), in_process(engine, **options) as http:
        if case.is_reloaded:
            (folder / "probe.safetensors").write_bytes(b"\x00garbage")
            key, body = {"Authorization": f"Bearer {ADMIN}"}, {"probe": [str(folder)]}
            refused = http.put("/admin/probes", json=body, headers=key)
            assert refused.status_code == 400, refused.text
        yield http


def policy_of(case, cell):
    mode, *settings = re.findall(r"`([^`]+)`", cell)
    assert settings in ([], ['on_failure = "pass"'])
    rule = replace(case.rule, mode=mode, on_failure="pass" if settings else "block")
    by_side = {"input": {"early": rule}} if case.side == "input" else {"output": {"late": rule}}
    return Policy(**by_side)


def plain_result(http):
    response = http.post(CHATS, json=REQUEST)
    body = response.json()
    if response.status_code != 200:
        assert "choices" not in body
        return f"{response.status_code} {body['error']['code']}"
    (choice,) = body["choices"]
    return told(choice["finish_reason"], body["moderation"])


def streamed_result(http):
    response = http.post(CHATS, json={**REQUEST, "stream": True})
    chunks = chunks_of(response)
    if response.status_code != 200:
        return f"{response.status_code} {chunks[0]['error']['code']}", ""
    deltas = [chunk["choices"][0] for chunk in chunks if chunk.get("choices")]
    text = "".join(delta["delta"].get("content", "") for delta in deltas)
    if "error" in chunks[-1]:
        assert "[DONE]" not in response.text
        assert "out of memory" not in response.text
        return f"200 error {chunks[-1]['error']['code']}", text
    moderation = [chunk["moderation"] for chunk in chunks if "moderation" in chunk][-1]
    return told(deltas[-1]["finish_reason"], moderation), text


def told(reason, moderation):
    return f"200 {reason} {moderation['output'].get('code', '')}".strip()


def shape(text, case):
    full = "".join(delta.text for delta in DELTAS)
    if text in ("", full):
        return "all" if text else "none"
    assert full.startswith(text)
    return "classified part" if text == scored_prefix(case.cut_at) else "part"


def scored_prefix(cut_at, hold_back=2, first_decidable_token=2):
    """By definition: a text is sent once a token ``hold_back`` later was judged, before the cut."""
    return "".join(
        delta.text
        for delta in DELTAS
        if any(delta.tokens + hold_back <= i >= first_decidable_token for i in range(1, cut_at))
    )
