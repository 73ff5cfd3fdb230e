"""The rules of a policy: read from a file, and checked against the probes that they name."""

from dataclasses import replace
from pathlib import Path

import pytest

import wordings
from sidelight.errors import SidelightError
from sidelight.judges.settings import JudgeSettings
from sidelight.models.conversation import Reads
from sidelight.policy.rules import (
    Defer,
    Policy,
    Rule,
    bound_rules,
    read_policy,
    require_policy_applies,
)
from sidelight.types import Verdict
from worlds.models import INTENT, three_probes, untrained_probe

JUDGES = {"g": JudgeSettings(url="http://localhost:9", model="m", criterion="x")}


@pytest.fixture(scope="module")
def probes(tiny):
    return [*three_probes(tiny), untrained_probe(tiny, "late", reads=Reads("response"))]


@pytest.fixture
def read(tmp_path):
    def read(text):
        (tmp_path / "policy.toml").write_text(text)
        return read_policy(tmp_path / "policy.toml")

    return read


def test_policy_file_can_set_every_rule_field(read):
    policy = read(
        """
        system_turns = "refuse"
        [input.toxicity]
        mode = "block"
        threshold = 1
        on_failure = "pass"
        max_tokens = 100
        turns = "tool"
        [input.intent]
        mode = "route"
        routes = { billing = "desk-2" }
        [output.late]
        mode = "block"
        consecutive = 3
        warm_up = 4
        hold_back = 5
        """
    )
    assert policy == Policy(
        input={
            "toxicity": Rule(
                "block", threshold=1.0, on_failure="pass", max_tokens=100, turns="tool"
            ),
            "intent": Rule("route", routes={"billing": "desk-2"}),
        },
        output={"late": Rule("block", consecutive=3, warm_up=4, hold_back=5)},
        system_turns="refuse",
    )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[input.toxicity]\nmod = 'block'", r"input.toxicity.mod\. .* 'mode'\? .* routes"),
        ("[inputs.toxicity]\nmode = 'block'", r"inputs\. Did you mean 'input'\? .* system_turns"),
        ("[input.toxicity]\nmode = 'forbid'", "input.toxicity.mode"),
        ("[input.toxicity]\nthreshold = 1.1", "input.toxicity.threshold"),
        ("[input.toxicity]\nthreshold = nan", "input.toxicity.threshold"),
        # Of one side only.
        ("[input.toxicity]\nconsecutive = 2", "input.toxicity.consecutive"),
        ("[output.late]\nroutes = {}", "output.late.routes"),
        ("[output.late]\nturns = 'tool'", "output.late.turns"),
        ("[input.pii]\nmode = 'redact'\nturns = 'tool'", "input.pii.turns"),
        # A client that is refused in one role would write in another.
        ("[input.toxicity]\nturns = 'user'", "'all' or 'tool', got 'user'"),
        ("[input.toxicity]\nturns = []", r"'all' or 'tool', got \[\]"),
        ("[output.late]\nconsecutive = 0", "output.late.consecutive"),
        # In the words of TOML, not of Python.
        ("[input.toxicity]\nlabels = 'toxic'", r'input\.toxicity\.labels .* list .*\["toxic"\]'),
        ("[input]\ntoxicity = 'block'", r"should be a table, \[input\.toxicity\]"),
        ("input = 'block'", r"should be a table, \[input\]"),
        ("[input.toxicity]\ndisclose = 'none'", r"'scores' or 'labels', got 'none'"),
        ("[input.toxicity]\nroutes = ['a']", r"should be a table, \[input\.toxicity\.routes\]"),
        ("[input.toxicity]\nmode = block", "Write texts in quotes"),
        ("[input.a]\nmode = 'block'\ndefer = {}", "input.a.defer.judge"),
        ("[input.a]\nmode = 'block'\ndefer = { judge = 'g' }", "there is no judge 'g'"),
        ("[input.a]\nmode = 'block'\ndefer = { judge = 'g', share = 1.0 }", "input.a.defer.share"),
        ("[input.a]\nmode = 'block'\ndefer = { judge = 'g', shares = 0.1 }", "'share'"),
        ("[input.a]\nmode = 'block'\ndefer = { judge = 'g', judge_every = 3 }", "hold there"),
        ("[input.a]\nmode = 'redact'\ndefer = { judge = 'g' }", "input.a.defer"),
        ("[input.a]\ndefer = { judge = 'g' }", "nothing to defer"),
        ("[input.a]\nmode = 'block'\non_failure = 'probe'", "rules that defer"),
        ("[judges.g]\nurl = 'http://judge.example'\nmodel = 'm'", "judges.g .* https"),
        ("[judges]\ng = 1", "judges.g"),
        ("[input", "is not TOML"),
        ("input = " + "[" * 9999, "is not TOML"),
    ],
)
def test_invalid_policy_key_or_value_error_names_it(read, text, told):
    with pytest.raises(SidelightError, match=told):
        read(text)
    with pytest.raises(SidelightError, match=r"nowhere\.toml"):
        read_policy(Path("nowhere.toml"))


@pytest.mark.parametrize(
    ("policy", "told"),
    [
        (Policy(input={"toxic": Rule()}), "Did you mean 'toxicity'"),
        (
            Policy(input={"late": Rule("block")}),
            r"no probe 'late' classifies it. It reads the other side: write \[output.late\]",
        ),
        (Policy(output={"toxicity": Rule("block")}), "no probe 'toxicity' classifies it"),
        (Policy(input={"intent": Rule("block")}), "flags no label by default"),
        (Policy(input={"toxicity": Rule("flag", labels=("fine",))}), "flags only toxic"),
        (Policy(input={"topics": Rule("block", labels=("violent",))}), "Did you mean 'violence'"),
        (Policy(input={"intent": Rule("route", routes={"bill": "x"})}), "names label 'bill'"),
        (Policy(output={"late": Rule("route")}), "too late for a route"),
        (Policy(input={"toxicity": Rule("block", defer=Defer("g", 0.0))}), "judge 'g'"),
        (
            Policy(input={"toxicity": Rule("block", defer=Defer("g"))}, judges=JUDGES),
            "no record of background traffic",
        ),
        (
            Policy(input={"topics": Rule("block", defer=Defer("g", 0.0))}, judges=JUDGES),
            "one label holds, and the rule counts violence, sexual",
        ),
        (Policy(input={"topics": Rule("shadow", shadow_of="late")}), "cannot be the shadow"),
        (Policy(input={"topics": Rule("block", shadow_of="toxicity")}), "cannot be the shadow"),
    ],
)
def test_inapplicable_rule_is_rejected(probes, policy, told):
    with pytest.raises(SidelightError, match=told):
        require_policy_applies(policy, probes)


@pytest.mark.parametrize(
    ("changes", "got"),
    [
        ({"reads": Reads()}, "task binary, side prompt, format chat, scope conversation"),
        ({"reads": Reads("response", scope="each_turn")}, "side response"),
        ({"reads": Reads("both", scope="each_turn")}, "side both"),
        ({"prompt_format": "raw"}, "format raw, .* or train one on a model with a chat template"),
        ({"task": INTENT}, "task multiclass, .* or train one on one label"),
        ({"task": INTENT, "reads": Reads(scope="last_turn")}, "scope last_turn"),
    ],
)
def test_tool_turns_require_probe_that_classifies_each_prompt_turn(tiny, changes, got):
    probe = untrained_probe(tiny, "p", reads=Reads(scope="each_turn"))
    rules = {"p": Rule("flag", threshold=0.5, labels=("billing",), turns="tool")}
    for fitting in (probe, probe.changed(prompt_format="both")):
        plain = {"p": replace(rules["p"], labels=())}
        require_policy_applies(Policy(input=plain), [fitting])
    changed = probe.changed(**changes)
    rule = rules["p"] if "task" in changes else replace(rules["p"], labels=())
    side = {"output" if changed.reads.includes_response else "input": {"p": rule}}
    with pytest.raises(SidelightError, match=wordings.NO_TURNS.format(probe="p", got=got)):
        require_policy_applies(Policy(**side), [changed])


def test_policy_that_blocks_prompts_refuses_system_turns_by_default(read):
    for text, refuses in (
        ("", False),
        ("[input.toxicity]\nmode = 'flag'", False),
        ("[output.late]\nmode = 'block'", False),
        ("[input.toxicity]\nmode = 'block'", True),
        # With a byte order mark, as Notepad writes.
        ("\ufeff[input.toxicity]\nmode = 'block'", True),
        ("system_turns = 'trust'\n[input.toxicity]\nmode = 'block'", False),
    ):
        assert read(text).refuses_system_turns == refuses, text


def test_verdict_is_routed_only_if_its_label_has_route(probes):
    rule = Rule("route", routes={"billing": "desk-2"})
    (intent,) = (probe for probe in probes if probe.task == INTENT)
    (bound,) = bound_rules(Policy(input={intent.name: rule}), [intent])
    actions = {
        label: bound.action(Verdict(intent.name, label, (label,), {}, flagged=False))
        for label in INTENT.labels
    }
    assert actions == {"billing": "route", "refund": "none", "other": "none"}
