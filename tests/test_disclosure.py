"""What clients learn of verdicts: no route tells the scores that a policy withholds.

What each place tells is a law of both servers (``policy_contract``).
"""

import re
from dataclasses import replace

import pytest

from policy_contract import ADMIN, CHATS, GUARDRAIL
from sidelight.engines.transformers.engine import TransformersEngine
from sidelight.models.conversation import Reads
from sidelight.policy.request import labels_only
from sidelight.policy.rules import Policy, Rule
from worlds.models import (
    INTENT,
    TOPICS,
    TOXICITY,
    spans_probe,
    three_probes,
    untrained_probe,
)
from worlds.servers import MODEL, in_process, post_paths

TEXT = "Where is my refund?"
TURNS = [{"role": "user", "content": TEXT}]
CHAT = {"model": MODEL, "messages": TURNS, "temperature": 0, "max_tokens": 4}
COMPLETION = {"model": MODEL, "prompt": TEXT, "temperature": 0, "max_tokens": 4}
ANSWERED = [*TURNS, {"role": "assistant", "content": "I cannot help with that."}]
NAMES = ("toxicity", "intent", "topics", "words", "late")
QUESTIONS = [
    *({"type": "predicate", "name": name} for name in ("toxicity", "violence", "late", "refund")),
    {"type": "choice", "name": "intent", "choices": [{"value": v} for v in INTENT.labels]},
    {"type": "choice", "name": "toxicity", "choices": [{"value": True}, {"value": False}]},
]
DECISIONS = {"model": MODEL, "input": TEXT, "questions": QUESTIONS}
# Whatever an outsider may try for a score.
ATTEMPTS = [
    *((CHATS, {**CHAT, "stream": stream}) for stream in (False, True)),
    (CHATS, {**CHAT, "stream": True, "stream_options": {"include_usage": True}}),
    *((CHATS, {**CHAT, "n": 2, "temperature": 1, "seed": 1, "stream": s}) for s in (False, True)),
    *((CHATS, {**CHAT, "probes": [name]}) for name in NAMES),
    (CHATS, {**CHAT, "policies": {"toxicity": {"threshold": 0.5}}}),
    *(("/v1/completions", {**COMPLETION, "stream": s}) for s in (False, True)),
    ("/v1/completions", {**COMPLETION, "n": 2, "prompt": [TEXT, "x"]}),
    ("/v1/moderations", {"input": [TEXT, "x"]}),
    *(("/v1/moderations", {"input": TEXT, "probes": [name]}) for name in NAMES),
    *(("/v1/decisions", {**DECISIONS, "input": text}) for text in (TEXT, ANSWERED)),
    ("/v1/decisions", {**DECISIONS, "explain": True}),
    ("/v1/redact", {"input": [TEXT, "x"]}),
    *(("/classify", {"model": name, "input": [TEXT, "x"]}) for name in NAMES),
    *(("/v1/classify", {"model": name, "messages": ANSWERED}) for name in NAMES),
    *((GUARDRAIL, {"input_type": kind, "texts": [TEXT]}) for kind in ("request", "response")),
    ("/api/v1/text/contents", {"contents": [TEXT, "x"], "detector_params": {"threshold": 0.0}}),
    *(("/api/v1/text/chat", {"messages": turns, "tools": []}) for turns in (TURNS, ANSWERED)),
    ("/api/v1/text/generation", {"prompt": TEXT, "generated_text": "I cannot help with that."}),
    ("/v1/probes", None),
    ("/v1/models", None),
]


def probes_of(backbone, *, with_new_scores=False):
    """Probes of both sides and each kind; the others give other scores and rank as these do."""
    response_probe = untrained_probe(backbone, "late", reads=Reads("response"))
    words = spans_probe(backbone, "words", threshold=0.5)
    probes = [*three_probes(backbone), words, response_probe]
    return [rescored(probe) for probe in probes] if with_new_scores else probes


def rescored(probe):
    """With other probabilities; of a multi-label probe another label has the highest."""
    outputs = probe.task.outputs
    shift = (0.0,) * outputs if probe.task.kind == "multiclass" else (0.3, 5.0)[:outputs]
    calibration = replace(probe.calibration, scale=(0.4,) * outputs, shift=shift)
    spans = probe.spans and replace(probe.spans, calibration=calibration)
    return probe.changed(calibration=calibration, spans=spans)


def policy_of(rule, *names):
    """The rule for these probes; the labels of the multi-class one never count."""
    input_rules = dict.fromkeys(names or NAMES, rule)
    if "intent" in input_rules and rule.mode in ("block", "flag"):
        input_rules["intent"] = replace(rule, labels=("refund",))
    output_rules = {"late": input_rules.pop("late")} if "late" in input_rules else {}
    return Policy(input=input_rules, output=output_rules)


def ask(http, path, body=None, key="user-key"):
    """The server has no keys of users, so that every caller is one."""
    method, headers = "GET" if body is None else "POST", {"Authorization": f"Bearer {key}"}
    return http.request(method, path, json=body, headers=headers)


def asking(backbone, probes, policy):
    return in_process(TransformersEngine(backbone, probes), policy=policy, admin_key=ADMIN)


def heard(response):
    """The answer, without what differs from one request to the next."""
    headers = {k: v for k, v in response.headers.items() if k.startswith("x-sidelight")}
    text = re.sub(r'"(id|created)":("[^"]*"|\d+)', "", f"{response.text} {headers}")
    # Batches of other shapes round otherwise.
    return response.status_code, re.sub(r"-?\d+\.[\de-]+", lambda found: rounded(found[0]), text)


def rounded(number):
    return f"{float(number):.4f}"


def counted(response):
    """The series, with the values of scores.

    Times differ from run to run, and counts too: how far the texts beside a blocked one have come.
    """
    lines = [line for line in response.text.splitlines() if line[0] != "#"]
    pairs = [line.rsplit(" ", 1) for line in lines if not re.search("seconds|_created", line)]
    return [(name, rounded(n) if "probe_" in name else "") for name, n in pairs]


def all_heard(backbone, policy, *, with_new_scores=False, attempts=ATTEMPTS, key="user-key"):
    probes = probes_of(backbone, with_new_scores=with_new_scores)
    with asking(backbone, probes, policy) as http:
        answers = [heard(ask(http, path, body, key)) for path, body in attempts]
        return [*answers, counted(ask(http, "/metrics", key=key))]


@pytest.mark.slow
@pytest.mark.parametrize("threshold", [0.0, 1.0])
@pytest.mark.parametrize("rule", [Rule("block"), Rule("flag", disclose="labels")])
def test_answers_do_not_depend_on_hidden_scores(tiny, rule, threshold):
    """Two servers whose probes differ in their scores alone cannot be told apart."""
    policy = policy_of(replace(rule, threshold=threshold))
    assert all_heard(tiny, policy) == all_heard(tiny, policy, with_new_scores=True)


@pytest.mark.slow
def test_attempts_reveal_scores_that_are_not_hidden(tiny):
    policy = policy_of(Rule("flag", threshold=0.0))
    first, second = (
        all_heard(tiny, policy, with_new_scores=with_new_scores)
        for with_new_scores in (False, True)
    )
    pairs = list(zip(first, second, strict=True))
    # Plain text has no verdict, nor has a prompt alone from a probe of responses.
    answered = [
        index
        for index, (path, body) in enumerate(ATTEMPTS)
        if path not in ("/v1/completions", "/v1/probes", "/v1/models")
        and "late" not in str(body)
        and "policies" not in str(body)
    ]
    assert len(answered) > 12
    assert [ATTEMPTS[index] for index in answered if pairs[index][0] == pairs[index][1]] == []
    assert pairs[-1][0] != pairs[-1][1]


@pytest.mark.slow
def test_admin_key_reveals_everything(tiny):
    """As where the rules of the prompt's probes disclose their scores."""
    # One text at a time: texts that are read side by side share batches, which round otherwise.
    attempts = [(p, body) for p, body in ATTEMPTS if not {"n", "explain"} & (body or {}).keys()]
    plain = Rule("block", threshold=1.0, disclose="scores")
    usual = all_heard(tiny, policy_of(plain, *NAMES[:-1]), attempts=attempts)
    hiding = policy_of(Rule("block", threshold=1.0, disclose="labels"), *NAMES[:-1])
    assert all_heard(tiny, hiding, attempts=attempts, key=ADMIN) == usual
    assert any(name.startswith("sidelight_probe_score") for name, _ in usual[-1])


def test_attempts_cover_every_post_route(tiny):
    with asking(tiny, [], Policy()) as http:
        assert post_paths(http) == {path for path, body in ATTEMPTS if body is not None}


def test_get_routes_disclose_no_hidden_threshold_or_shadow_probe(tiny):
    """Over all that the server has, so that a new route is asked too."""
    probes = [*three_probes(tiny)[:1], *(untrained_probe(tiny, n) for n in ("second", "newer"))]
    threshold = 0.7654321
    rules = {
        "toxicity": Rule("block", threshold=threshold),
        "second": Rule("flag", disclose="labels", threshold=threshold),
        "newer": Rule("shadow", shadow_of="toxicity"),
    }
    with asking(tiny, probes, Policy(input=rules)) as http:
        paths = http.get("/openapi.json").json()["paths"]
        read = [path for path, methods in paths.items() if "get" in methods]
        answers = {path: ask(http, path).text for path in read if path != "/metrics"}
    assert len(answers) > 3
    for path, text in answers.items():
        assert "newer" not in text, path
        assert str(threshold) not in text, path


def change_rule(http, path, rule):
    path.write_text(f"[input.toxicity]\n{rule}\n")
    change = {"json": {"policy": str(path)}, "headers": {"Authorization": f"Bearer {ADMIN}"}}
    http.put("/admin/probes", **change).raise_for_status()


@pytest.mark.parametrize(
    ("rule", "is_open"),
    [
        ("", True),
        ('mode = "block"\ndisclose = "scores"', True),
        ('mode = "block"', False),
        ('mode = "shadow"', False),
        ('mode = "flag"\ndisclose = "labels"', False),
    ],
)
def test_metrics_require_key_once_rule_hides_scores(tiny, tmp_path, rule, is_open):
    with asking(tiny, probes_of(tiny), Policy()) as http:
        ask(http, "/v1/moderations", {"input": TEXT})
        assert ask(http, "/metrics").status_code == 200
        change_rule(http, tmp_path / "policy.toml", rule)
        refused, allowed = (ask(http, "/metrics", key=key) for key in ("user-key", ADMIN))
    assert (refused.status_code == 200) == is_open
    if not is_open:
        error = refused.json()["error"]
        assert (refused.status_code, error["code"]) == (403, "metrics_key_required")
        assert "SIDELIGHT_METRICS_KEY" in error["message"]
    assert 'sidelight_probe_score_count{label="toxic",probe="toxicity"} 1.0' in allowed.text


def test_metrics_stay_protected_after_hiding_rule_is_replaced(tiny, tmp_path):
    """They still have what was counted under it, also of probes that are gone."""
    with asking(tiny, probes_of(tiny), Policy()) as http:
        for rule, status in (("", 200), ('mode = "block"', 403), ("", 403)):
            change_rule(http, tmp_path / "policy.toml", rule)
            assert ask(http, "/metrics").status_code == status


@pytest.mark.parametrize(
    ("task", "labels", "label"),
    [
        (TOXICITY, ("toxic",), "toxic"),
        (TOXICITY, (), "fine"),
        (INTENT, ("billing", "refund"), "billing"),
        (INTENT, (), "refund"),
        (TOPICS, ("violence", "sexual"), "violence"),
        (TOPICS, (), ""),
    ],
)
def test_labels_only_verdict_does_not_reveal_score_ranking(task, labels, label):
    """Of a multi-class probe that flags, the most probable class would be a second threshold."""
    scores = {name: [0.3, 0.6, 0.1][index] for index, name in enumerate(task.labels)}
    thresholds = {name: 0.0 if name in labels else 1.0 for name in task.labels[-2:]}
    thresholds |= dict.fromkeys(labels, 0.0)
    ordered = {name: thresholds[name] for name in task.labels if name in thresholds}
    visible_verdict = labels_only(task.decide("probe", scores, ordered))
    assert (visible_verdict.label, visible_verdict.flagged) == (label, bool(labels))
    expected = labels or ((label,) if label else ())
    assert visible_verdict.probabilities == {name: float(name in expected) for name in task.labels}


def test_highest_scoring_turn_is_sent_only_with_scores(tiny):
    """It would say which of many turns the probe finds worst, although it flags none."""
    probe = untrained_probe(tiny, "toxicity", reads=Reads(scope="each_turn"))
    later = [{"role": "assistant", "content": "OK."}, {"role": "user", "content": "Go ahead."}]
    body = {**CHAT, "messages": [*TURNS, *later]}
    with asking(tiny, [probe], policy_of(Rule("block", threshold=1.0), "toxicity")) as http:
        told = [ask(http, CHATS, body, key).json()["sidelight"]["verdicts"] for key in ("", ADMIN)]
    entry = {"probe": "toxicity", "version": "", "label": "fine", "labels": ["fine"]}
    assert told[0] == [{**entry, "flagged": False}]
    assert told[1][0]["turn"] == 2
