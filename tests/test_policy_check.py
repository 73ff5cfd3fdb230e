"""``sidelight policy check``: each documented setting is warned of, and a sound policy is not."""

from dataclasses import replace

import pytest

from sidelight.models.conversation import Reads
from sidelight.policy.rules import Defer, Policy, Rule
from sidelight.policy.weaknesses import weaknesses
from sidelight.probes.artifact import save_probe
from sidelight.probes.card import TrainingRecord
from worlds.data import documented_table
from worlds.models import INTENT, spans_probe, untrained_probe
from worlds.servers import cli

BLOCK = Rule("block")
PASSING = Rule("block", on_failure="pass")
SOUND = Policy(
    input={"toxicity": BLOCK},
    output={"late": BLOCK},
    system_turns="refuse",
    invisible_characters="strip",
)


@pytest.fixture(scope="module")
def probes(tiny):
    prompts = untrained_probe(tiny, "toxicity", reads=Reads(scope="each_turn"))
    answers = untrained_probe(tiny, "late", reads=Reads("response"))
    bounded = replace(prompts.standardisation, is_normalised=True)
    learned = prompts.changed(training=TrainingRecord(contexts={"inside": 40}))
    return [replace(learned, standardisation=bounded), answers]


# What each row of the table has in place of the sound policy and its probes.
POLICIES = {
    "no rule on the input blocks": {"input": {"toxicity": Rule("flag")}},
    '`system_turns = "trust"`': {"system_turns": "trust"},
    "`system_turns` left out beside a rule that blocks prompts": {"system_turns": None},
    "`invisible_characters` off": {"invisible_characters": "off"},
    '`on_failure = "pass"`': {"output": {"late": PASSING}},
    "`defer`": {"output": {"late": Rule("block", defer=Defer("guardian"))}},
    '`max_tokens` with `on_failure = "pass"`': {
        "output": {"late": replace(PASSING, max_tokens=100)}
    },
    "`threshold = 1.0`": {"input": {"toxicity": Rule("block", threshold=1.0)}},
    "`threshold = 0`": {"output": {"late": BLOCK, "shadow": Rule("shadow", threshold=0.0)}},
    '`disclose = "scores"`': {"input": {"toxicity": Rule("block", disclose="scores")}},
    '`turns = "tool"`': {"input": {"toxicity": Rule("block", turns="tool")}},
    "`hold_back` below `consecutive - 1`": {
        "output": {"late": Rule("block", consecutive=4, hold_back=2)}
    },
}
POLICIES = {setting: replace(SOUND, **changes) for setting, changes in POLICIES.items()}
PROBES = {
    "a probe with the same labels that discloses its scores": lambda prompts, answers: (
        [prompts, answers, prompts.changed(name="double")]
    ),
    "a probe that reads a conversation as one text": lambda prompts, answers: (
        [prompts.changed(reads=Reads()), answers]
    ),
    "a probe that reads only the last turn, such as a multi-class probe": lambda prompts, answers: (
        [prompts.changed(reads=Reads(scope="last_turn")), answers]
    ),
    "an older probe, or a multi-class probe": lambda prompts, answers: (
        [replace(prompts, standardisation=answers.standardisation), answers]
    ),
    "a probe trained without background traffic, and no `max_tokens`": lambda prompts, answers: (
        [prompts.changed(training=TrainingRecord()), answers]
    ),
}
# What the warnings of a row say, in their order; one that is not here has a single warning.
WORDS = {
    "no rule on the input blocks": ["No rule blocks prompts"],
    "`system_turns` left out beside a rule that blocks prompts": ["Behind LiteLLM"],
    '`max_tokens` with `on_failure = "pass"`': ["[output.late] on_failure", "max_tokens = 100"],
    "`defer`": ["can clear a text that the probe flags"],
    "`threshold = 1.0`": ["[input.toxicity] threshold = 1.0"],
    "`threshold = 0`": ["[output.shadow] threshold = 0 flags every text"],
    '`disclose = "scores"`': ["[input.toxicity] disclose"],
    '`turns = "tool"`': ["[input.toxicity] turns"],
    "`hold_back` below `consecutive - 1`": ["Set it to 3 or more"],
    "a probe with the same labels that discloses its scores": ["'double' discloses its scores"],
    "a probe that reads only the last turn, such as a multi-class probe": [
        "only the user's last turn"
    ],
}


SETTINGS = [row["setting"] for row in documented_table("policies.md", "setting", "what passes")]


def test_documented_table_lists_every_checked_setting():
    assert [*POLICIES, *PROBES] == SETTINGS


def test_sound_policy_has_no_weaknesses(probes):
    assert weaknesses(SOUND, probes) == weaknesses(SOUND) == []


@pytest.mark.parametrize("setting", SETTINGS)
def test_each_documented_setting_triggers_only_its_warnings(probes, setting):
    served = PROBES[setting](*probes) if setting in PROBES else probes
    found = weaknesses(POLICIES.get(setting, SOUND), served)
    words = WORDS.get(setting, [""])
    assert [word in told for word, told in zip(words, found, strict=True)] == [True] * len(words)
    # What the file alone says is warned of without the probes too.
    assert (weaknesses(POLICIES.get(setting, SOUND)) == found) == (setting in POLICIES)


def test_policy_check_gives_no_unnecessary_warnings(probes, tiny):
    prompts, answers = probes
    limited = replace(SOUND, input={"toxicity": Rule("block", max_tokens=100)})
    assert weaknesses(limited, [prompts.changed(training=TrainingRecord()), answers]) == []
    holding = replace(SOUND, output={"late": Rule("block", consecutive=4, hold_back=3)})
    assert weaknesses(holding, probes) == []
    # Probes of raw texts read system turns, and conversations as one text.
    raw = [
        prompts.changed(prompt_format="raw", reads=Reads()),
        answers.changed(prompt_format="raw"),
    ]
    assert weaknesses(replace(SOUND, system_turns="trust"), raw) == []
    # Those of both read chats as those of chats do.
    both = [prompts.changed(prompt_format="both", reads=Reads()), answers]
    told = weaknesses(replace(SOUND, system_turns="trust"), both)
    assert ["system_turns" in told[0], "an earlier one" in told[1], len(told)] == [True, True, 2]
    # A probe of spans has the largest logit of a token, which no other token outweighs.
    spans = replace(spans_probe(tiny, "spans"), standardisation=prompts.standardisation)
    marking = replace(SOUND, input={"toxicity": BLOCK, "spans": BLOCK})
    assert weaknesses(marking, [*probes, spans]) == []
    # A double that tells no more than the one that blocks.
    rules = {"toxicity": BLOCK, "double": Rule(disclose="labels")}
    assert weaknesses(replace(SOUND, input=rules), [*probes, prompts.changed(name="double")]) == []


def test_behind_litellm_reports_rules_that_block_only_there(probes, tiny):
    prompts, answers = probes
    safe_rules = {"toxicity": BLOCK, "counted": Rule("shadow"), "pii": Rule("redact")}
    marking = replace(SOUND, input={**safe_rules, "urgent": Rule("flag")})
    told = weaknesses(marking, behind_litellm=True)
    assert ["[input.urgent]" in told[0], 'mode = "flag"' in told[0], len(told)] == [True, True, 1]
    assert weaknesses(marking) == []
    # A probe without a rule is scored; one of several classes flags nothing.
    classes = untrained_probe(tiny, "intent", task=INTENT)
    served = [prompts, answers, prompts.changed(name="unruled", reads=answers.reads), classes]
    told = weaknesses(SOUND, served, behind_litellm=True)
    assert [word for word in told if "LiteLLM" in word] == [
        word for word in told if word.startswith("[output.unruled]")
    ]
    assert told


def test_policy_check_exit_code_reflects_warnings_and_errors(probes, tmp_path, capsys):
    folders = [str(save_probe(probe, tmp_path / probe.name)) for probe in probes]
    options = [word for folder in folders for word in ("--probe", folder)]
    rules = "[input.toxicity]\nmode = 'block'\n[output.late]\nmode = 'block'\n"
    rules = f"invisible_characters = 'strip'\n{rules}"
    text = f"system_turns = 'refuse'\n{rules}"
    path = tmp_path / "policy.toml"

    def check(written, *more):
        path.write_text(written)
        code = cli("policy", "check", str(path), *more)
        return code, capsys.readouterr()

    code, told = check(text, *options)
    assert (code, told.err) == (0, "")
    assert told.out.startswith("No warnings.")
    code, told = check(f"system_turns = 'trust'\n{rules}", *options)
    assert code == 1
    assert [line.startswith("Warning: system_turns") for line in told.out.splitlines()] == [True]
    for wrong, more in (("mod = 'block'", []), (text.replace("late", "lat"), options)):
        code, told = check(wrong, *more)
        assert (code, told.out, told.err[:6]) == (2, "", "Error:")
