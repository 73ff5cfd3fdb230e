"""What clients learn of verdicts: no route tells the scores that a policy withholds."""

import json
import re
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from live import MODEL, served
from sidelight.engines.transformers import TransformersEngine
from sidelight.policy.decisions import LabelsOnly
from sidelight.policy.rules import BoundRule, Policy, Rule
from sidelight.prompts import Reads
from tiny import INTENT, TOPICS, TOXICITY, tiny_backbone, untrained_probe

PAGE = Path(__file__).parent.parent / "docs" / "policy-file.md"
KEY, ADMIN = "user-key", "admin-key"
TEXT = "Where is my refund?"
CHAT = {
    "model": MODEL,
    "messages": [{"role": "user", "content": TEXT}],
    "temperature": 0,
    "max_tokens": 4,
}
COMPLETION = {"model": MODEL, "prompt": TEXT, "temperature": 0, "max_tokens": 4}
ANSWERED = [
    {"role": "user", "content": TEXT},
    {"role": "assistant", "content": "I cannot help with that."},
]
NAMES = ("toxicity", "intent", "topics", "late")
CHATS = "/v1/chat/completions"
GUARDRAIL = "/beta/litellm_basic_guardrail_api"
QUESTIONS = [
    *({"type": "predicate", "name": name} for name in ("toxicity", "violence", "late", "refund")),
    {"type": "choice", "name": "intent", "choices": [{"value": v} for v in INTENT.labels]},
    {"type": "choice", "name": "toxicity", "choices": [{"value": True}, {"value": False}]},
]

# Whatever an outsider may try for a score.
ATTEMPTS = [
    *((CHATS, {**CHAT, "stream": stream}) for stream in (False, True)),
    (CHATS, {**CHAT, "stream": True, "stream_options": {"include_usage": True}}),
    *((CHATS, {**CHAT, "n": 3, "temperature": 1, "seed": 1, "stream": s}) for s in (False, True)),
    *((CHATS, {**CHAT, "probes": [name]}) for name in NAMES),
    *(("/v1/completions", {**COMPLETION, "stream": s}) for s in (False, True)),
    ("/v1/completions", {**COMPLETION, "n": 2, "prompt": [TEXT, "x"]}),
    ("/v1/moderations", {"input": [TEXT, "x"]}),
    *(("/v1/moderations", {"input": TEXT, "probes": [name]}) for name in NAMES),
    *(("/classify", {"model": name, "input": TEXT}) for name in NAMES),
    *(
        ("/v1/decisions", {"model": MODEL, "input": i, "questions": QUESTIONS})
        for i in (TEXT, ANSWERED)
    ),
    *(
        ("/v1/decisions", {"model": MODEL, "input": i, "questions": QUESTIONS, "explain": True})
        for i in (TEXT, ANSWERED)
    ),
    *((GUARDRAIL, {"input_type": kind, "texts": [TEXT]}) for kind in ("request", "response")),
]


@pytest.fixture(scope="module")
def backbone():
    return tiny_backbone()


def probes_of(backbone, *, other_scores=False):
    """Probes of both sides and each kind; the others give other scores and rank as these do."""
    probes = [
        untrained_probe(backbone, "toxicity"),
        untrained_probe(backbone, "intent", task=INTENT),
        untrained_probe(backbone, "topics", task=TOPICS),
        untrained_probe(backbone, "late", reads=Reads("response")),
    ]
    return [rescored(probe) for probe in probes] if other_scores else probes


def rescored(probe):
    """With other probabilities; of a multi-label probe another label has the highest."""
    outputs = probe.task.outputs
    shift = (0.0,) * outputs if probe.task.kind == "multiclass" else (0.3, 5.0)[:outputs]
    calibration = replace(probe.calibration, scale=(0.4,) * outputs, shift=shift)
    return replace(probe, calibration=calibration)


def policy_of(rule, *names):
    """The rule for these probes; the labels of the multi-class one never count."""
    own = dict.fromkeys(names or NAMES, rule)
    if "intent" in own and rule.mode in ("block", "flag"):
        own["intent"] = replace(rule, labels=("refund",))
    late = {"late": own.pop("late")} if "late" in own else {}
    return Policy(input=own, output=late)


@contextmanager
def asking(engine, policy):
    """A function that asks with a key, the user's unless it is told otherwise.

    The server has no keys of users, so that everybody is one, and may read the metrics.
    """
    with (
        served(engine, policy=policy, admin_key=ADMIN) as address,
        httpx.Client(base_url=address, timeout=30) as http,
    ):

        def ask(path, body=None, key=KEY):
            method = "GET" if body is None else "POST"
            headers = {"Authorization": f"Bearer {key}"}
            return http.request(method, path, json=body, headers=headers)

        yield ask


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


def all_heard(engine, policy, *, attempts=ATTEMPTS, key=KEY):
    with asking(engine, policy) as ask:
        answers = [heard(ask(path, body, key)) for path, body in attempts]
        return [*answers, counted(ask("/metrics", key=key))]


@pytest.mark.slow
@pytest.mark.parametrize("threshold", [0.0, 1.0])
@pytest.mark.parametrize("rule", [Rule("block"), Rule("flag", disclose="labels")])
def test_no_answer_depends_on_scores_that_a_policy_withholds(backbone, rule, threshold):
    """Two servers whose probes differ in their scores alone cannot be told apart."""
    policy = policy_of(replace(rule, threshold=threshold))
    found = [
        all_heard(TransformersEngine(backbone, probes_of(backbone, other_scores=other)), policy)
        for other in (False, True)
    ]
    assert found[0] == found[1]


@pytest.mark.slow
def test_the_attempts_would_tell_scores_that_are_not_withheld(backbone):
    policy = policy_of(Rule("flag", threshold=1.0))
    first, second = (
        all_heard(TransformersEngine(backbone, probes_of(backbone, other_scores=other)), policy)
        for other in (False, True)
    )
    pairs = list(zip(first, second, strict=True))
    # Plain text has no verdict, nor has a prompt alone from a probe of responses.
    judged = [
        index
        for index, (path, body) in enumerate(ATTEMPTS)
        if path != "/v1/completions" and "late" not in str(body)
    ]
    assert [ATTEMPTS[index] for index in judged if pairs[index][0] == pairs[index][1]] == []
    assert pairs[-1][0] != pairs[-1][1]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["score", "flag", "block"])
def test_no_answer_depends_on_a_verdict_of_which_nothing_is_disclosed(backbone, mode):
    """Not even on the label, but where the guardrail or a blocking rule refuses by it."""
    attempts = [(path, body) for path, body in ATTEMPTS if path != GUARDRAIL]
    thresholds = (1.0, 1.0) if mode == "block" else (0.0, 1.0)
    found = [
        all_heard(
            TransformersEngine(backbone, probes_of(backbone, other_scores=bool(index))),
            policy_of(Rule(mode, threshold=threshold, disclose="none")),
            attempts=attempts,
        )
        for index, threshold in enumerate(thresholds)
    ]
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.parametrize("disclose", ["labels", "none"])
def test_an_admin_key_sees_everything(backbone, disclose):
    """As where the rules of the prompt's probes disclose their scores and explain."""
    prompt = ("toxicity", "intent", "topics")
    withheld = policy_of(Rule("block", threshold=1.0, disclose=disclose), *prompt)
    plain = policy_of(Rule("block", threshold=1.0, disclose="scores", explain=True), *prompt)
    engines = [TransformersEngine(backbone, probes_of(backbone)) for _ in range(2)]
    # One text at a time: texts that are read side by side share batches, which round otherwise.
    attempts = [(path, body) for path, body in ATTEMPTS if "n" not in body]
    seen, usual = (
        all_heard(engine, policy, attempts=attempts, key=key)
        for engine, policy, key in zip(engines, (withheld, plain), (ADMIN, KEY), strict=True)
    )
    assert seen == usual
    assert any(name.startswith("sidelight_probe_score") for name, _ in seen[-1])


def test_an_admin_key_sees_the_scores_of_what_is_blocked(backbone):
    policy = policy_of(Rule("block", threshold=0.0), "toxicity")
    with asking(TransformersEngine(backbone, probes_of(backbone)), policy) as ask:
        shown = {
            key: json.loads(ask(CHATS, CHAT, key).headers["x-sidelight-verdicts"])[0]
            for key in (KEY, ADMIN)
        }
    assert shown[KEY] == {"probe": "toxicity", "label": "toxic", "flagged": True}
    assert shown[ADMIN]["probabilities"].keys() == {"fine", "toxic"}


def test_what_is_not_disclosed_blocks_all_the_same(backbone):
    policy = policy_of(Rule("block", threshold=0.0, disclose="none"), "toxicity")
    with asking(TransformersEngine(backbone, probes_of(backbone)), policy) as ask:
        blocked = ask(CHATS, CHAT)
        guarded = ask(GUARDRAIL, {"input_type": "request", "texts": [TEXT]}).json()
    assert blocked.json()["error"]["message"] == "The prompt was blocked by toxicity."
    assert "toxicity" not in blocked.headers["x-sidelight-verdicts"]
    assert "x-sidelight-flagged" not in blocked.headers
    assert guarded["action"] == "BLOCKED"
    assert "toxicity" not in str(guarded["sidelight"])


def test_a_failed_verdict_of_which_nothing_is_disclosed_is_in_no_answer(backbone):
    broken = untrained_probe(backbone, "toxicity")
    broken.mechanism.bias.fill_(float("nan"))
    policy = policy_of(Rule("flag", disclose="none"), "toxicity")
    others = probes_of(backbone)[1:]
    with asking(TransformersEngine(backbone, [broken, *others]), policy) as ask:
        chat, checked = ask(CHATS, CHAT), ask("/v1/moderations", {"input": TEXT})
        guarded = ask(GUARDRAIL, {"input_type": "request", "texts": [TEXT]})
    assert (chat.status_code, checked.status_code) == (200, 200)
    assert "toxicity" not in f"{chat.text} {chat.headers} {checked.text}"
    # An unjudged text is never taken for a harmless one.
    assert guarded.status_code == 500


def test_a_shadow_of_what_blocks_shows_no_scores_in_the_metrics(backbone):
    probes = [*probes_of(backbone)[:1], untrained_probe(backbone, "newer")]
    rules = {"toxicity": Rule("block"), "newer": Rule("shadow", shadow_of="toxicity")}
    with asking(TransformersEngine(backbone, probes), Policy(input=rules)) as ask:
        ask("/v1/moderations", {"input": TEXT})
        shown, all_series = (ask("/metrics", key=key).text for key in (KEY, ADMIN))
    assert "sidelight_probe_score_" not in shown
    assert all_series.count("sidelight_probe_score_sum") == 2
    assert 'shadow="newer"' in shown


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
def test_the_label_ranks_no_scores_of_labels_that_hold(task, labels, label):
    """Of a multi-class probe that flags, the most probable class would be a second threshold."""
    scores = {name: [0.3, 0.6, 0.1][index] for index, name in enumerate(task.labels)}
    thresholds = {name: 0.0 if name in labels else 1.0 for name in task.labels[-2:]}
    thresholds |= dict.fromkeys(labels, 0.0)
    verdict = task.decide(
        "probe", scores, {k: thresholds[k] for k in task.labels if k in thresholds}
    )
    shown = LabelsOnly.of(verdict)
    assert (shown.label, shown.flagged) == (label, bool(labels))
    held = labels or ((label,) if label else ())
    assert shown.probabilities == {name: float(name in held) for name in task.labels}


def test_the_turn_with_the_highest_score_is_told_with_scores_alone(backbone):
    """It would say which of many turns the probe finds worst, although it flags none."""
    probe = untrained_probe(backbone, "toxicity", reads=Reads(scope="each_turn"))
    turns = [
        {"role": "user", "content": TEXT},
        {"role": "assistant", "content": "OK."},
        {"role": "user", "content": "Go ahead."},
    ]
    policy = policy_of(Rule("block", threshold=1.0), "toxicity")
    with asking(TransformersEngine(backbone, [probe]), policy) as ask:
        body = {**CHAT, "messages": turns}
        told = [ask(CHATS, body, key).json()["sidelight"]["verdicts"][0] for key in (KEY, ADMIN)]
    assert told[0] == {"probe": "toxicity", "label": "fine", "labels": ["fine"], "flagged": False}
    assert told[1]["turn"] == 2


def rows():
    """The documented words, by place and setting."""
    table = PAGE.read_text().split("| where |")[1].split("\n\n")[0]
    lines = [line.strip("|").split("|") for line in f"where |{table}".splitlines()]
    settings = [cell.strip(' `"') for cell in lines[0][1:]]
    cells = [[cell.strip() for cell in line] for line in lines[2:]]
    return {row[0]: dict(zip(settings, row[1:], strict=True)) for row in cells}


def word(answer, *path):
    """The table's word for what stands at this place of an answer."""
    if answer.status_code != 200:
        return f"{answer.status_code} {answer.json()['error']['code']}"
    value = answer.json()
    for step in path:
        value = value[step] if step in value or isinstance(value, list) else value["code"]
        if isinstance(value, str):
            return value
    return "1.0 or 0.0" if value in (0.0, 1.0) else "probability"


def entry_word(verdicts):
    if not verdicts:
        return "nothing"
    return "label, probabilities" if "probabilities" in verdicts[0] else "label"


def why_word(explanations):
    return "nothing" if not explanations else explanations[0].get("error", "shares")


def told(ask):
    """What each place tells of a binary probe, in the words of the table."""
    chat = ask(CHATS, CHAT)
    checked = ask("/v1/moderations", {"input": TEXT})
    guarded = ask(GUARDRAIL, {"input_type": "request", "texts": [TEXT]})
    question = {"model": MODEL, "input": TEXT, "questions": QUESTIONS[:1], "explain": True}
    decided = ask("/v1/decisions", question)
    series = [name for name, _ in counted(ask("/metrics")) if 'probe="toxicity"' in name]
    has_scores = any(name.startswith("sidelight_probe_score") for name in series)
    # Of running scores, tests/test_playground_api.py.
    listed = ask("/v1/probes").json()["probes"]
    return {
        "header `x-sidelight-verdicts`": entry_word(
            json.loads(chat.headers["x-sidelight-verdicts"])
        ),
        "field `sidelight` of chats": entry_word(chat.json()["sidelight"]["verdicts"]),
        "field `explanations`": why_word(decided.json()["explanations"]),
        "scores while a text is written, `/v1/probes` thresholds and curves": (
            "yes" if listed and listed[0]["thresholds"] else "nothing"
        ),
        "headers `x-sidelight-flagged` and `x-sidelight-route`": (
            "yes" if "x-sidelight-flagged" in chat.headers else "nothing"
        ),
        "`moderation`, score of a category": word(
            chat, "moderation", "input", "results", 0, "category_scores", "toxic"
        ),
        "`/v1/moderations`, score of a category": word(
            checked, "results", 0, "category_scores", "toxic"
        ),
        "`/classify`, `probs`": word(
            ask("/classify", {"model": "toxicity", "input": TEXT}), "data", 0, "probs", 1
        ),
        "`/v1/decisions`, `probability`": (
            "refusal"
            if decided.json()["answers"][0]["type"] == "refusal"
            else word(decided, "answers", 0, "probability")
        ),
        "guardrail, `action`": "yes" if guarded.json()["action"] == "BLOCKED" else "nothing",
        "guardrail, field `sidelight`": entry_word(guarded.json()["sidelight"]["verdicts"]),
        "`/metrics`": "counts, scores" if has_scores else "counts" if series else "nothing",
    }


def test_each_place_tells_what_the_table_says(backbone):
    documented = rows()
    for setting in ("scores", "labels", "none"):
        policy = policy_of(Rule("flag", threshold=0.0, disclose=setting), "toxicity")
        engine = TransformersEngine(backbone, probes_of(backbone)[:1])
        with asking(engine, policy) as ask:
            found = told(ask)
        assert found == {place: cells[setting] for place, cells in documented.items()}, setting


@pytest.mark.parametrize(
    ("rule", "disclosure"),
    [
        (Rule(), "scores"),
        (Rule("flag"), "scores"),
        (Rule("route"), "scores"),
        (Rule("block"), "labels"),
        (Rule("block", disclose="scores"), "scores"),
        (Rule("flag", disclose="none"), "none"),
        (Rule("shadow", disclose="scores"), "none"),
    ],
)
def test_what_blocks_tells_labels_and_what_reports_tells_scores(backbone, rule, disclosure):
    probe = untrained_probe(backbone, "toxicity")
    assert BoundRule(probe, rule).disclosure == disclosure
