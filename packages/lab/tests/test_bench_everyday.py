"""Background traffic: what its rows hold, and what probes that know nothing get."""

import json
import re

import numpy as np
import pytest
from transformers import LlamaConfig

from sidelight.data.loading import load_examples
from sidelight.models.conversation import Message
from sidelight_lab.bench.everyday import (
    AGENTS,
    ANSWERS,
    ATTACK_PADDING_WORDS,
    PADDING_WORDS,
    QUESTIONS,
    attacks_among,
    auroc_of,
    first_words,
    halves,
    in_turns,
    long_texts,
    measure_everyday,
)
from sidelight_lab.redteam.targets import ProbeTarget, flagging_thresholds
from worlds.models import SIZES, TOXICITY, tiny_backbone, untrained_probe

PROMPTS = [f"Prompt {i} has\nseven words. Not more." for i in range(40)]
TEXTS = [
    (f"This is text {i}, which is {label}.", label) for i in range(4) for label in TOXICITY.labels
]
ATTACK = (Message("user", "one two three four five six seven eight nine"),)


def words(text):
    return len(text.split())


def test_padded_attacks_stay_intact_with_the_stated_word_counts():
    paddings = long_texts(PROMPTS, 3, words=max(PADDING_WORDS))
    for count in PADDING_WORDS:
        assert [words(first_words(text, count)) for text in paddings] == [count] * 3
    assert len({first_words(text, min(PADDING_WORDS)) for text in paddings}) == 3
    rows = attacks_among([ATTACK], paddings=paddings, questions=["\n".join(QUESTIONS)])
    padded = {re.sub(r" \w+$", "", name): [] for name in rows}
    for name, (conversations, _) in [*rows.items()][:-1]:
        ((message,),) = conversations
        before, after = message.content.split(ATTACK[0].content)
        place = name.split()[-1]
        assert (bool(before), bool(after)) == {"before": (1, 0), "after": (0, 1)}.get(place, (1, 1))
        padded[re.sub(r" \w+$", "", name)].append(words(before + " " + after))
    for count in ATTACK_PADDING_WORDS:
        assert padded[f"{count} words"] == [count] * 3


def test_halves_split_at_a_sentence_end():
    assert halves("One two. Three four. Five.") == ("One two.", "Three four. Five.")
    assert halves("one two three") in (("one", "two three"), ("one two", "three"))


def test_in_turns_alternates_four_word_turns_and_forty_word_answers():
    turns = in_turns(ATTACK, ANSWERS)
    assert [turn.role for turn in turns] == ["user", "assistant"] * 2 + ["user"]
    assert [words(turn.content) for turn in turns] == [4, 40, 4, 40, 1]
    assert " ".join(turn.content for turn in turns[::2]) == ATTACK[0].content


def test_auroc_ignores_attacks_without_scores():
    assert auroc_of(np.array([2, 3, np.nan]), np.array([1, 0, np.nan])) == 1
    assert auroc_of(np.array([1.0, 0]), np.array([0, 1.0])) == 0.5
    assert auroc_of(np.array([np.nan]), np.array([1.0])) is None


def test_agent_conversations_contain_a_tool_call_and_its_result():
    for turns in AGENTS:
        call = json.loads(turns[1].content)
        assert call["name"]
        assert call["arguments"]
        assert [turn.role for turn in turns][2:] in (["tool"], ["tool", "assistant", "user"])
        assert 20 <= words(turns[2].content) <= 250


@pytest.fixture(scope="module")
def backbone():
    """With room for short texts: each byte is a token."""
    backbone = tiny_backbone(LlamaConfig(**{**SIZES, "max_position_embeddings": 640}))
    backbone.encoder.max_tokens = 640
    return backbone


def metrics_of(backbone, threshold, prompts):
    probe = untrained_probe(backbone, "toxicity", threshold=threshold)
    record = measure_everyday(
        ProbeTarget(backbone=backbone, thresholds=flagging_thresholds(probe), probe=probe),
        load_examples(TEXTS, task=TOXICITY),
        prompts=prompts,
        user_texts={"mine": [ATTACK]},
        attacks=2,
    )
    assert f"{record.results['alone']['flagged']} of 2" in record.to_markdown()
    return json.loads(record.to_json())


@pytest.mark.slow
def test_degenerate_thresholds_yield_no_net_recall(
    backbone,
):
    everything = metrics_of(backbone, 0.0, PROMPTS)
    shares = {name: row["value"] for name, row in everything["harmless"].items()}
    assert {*shares.values()} <= {1.0, None}
    assert shares["small talk"] == shares["mine"] == 1
    assert everything["alone"]["flagged"] == 2
    nets = {name: row["net"] for name, row in everything["attacks"].items()}
    assert {*nets.values()} == {0.0, None}
    assert [name for name, net in nets.items() if net is None] == [
        name for name, row in everything["attacks"].items() if not row["recall"]["texts"]
    ]
    assert nets["50 words around"] == 0
    # No threshold takes part, so what both probes tell apart is the same.
    aurocs = {name: row["auroc"] for name, row in everything["attacks"].items()}
    assert aurocs["600 words after"] is None
    assert 0 <= aurocs["50 words around"] <= 1
    in_short_turns = next(name for name in aurocs if name.startswith("turns of"))
    # Too long for the model, so nothing is said.
    assert everything["attacks"]["600 words after"]["recall"]["left_out"] == 2
    nothing = metrics_of(backbone, 1.0, [])
    assert nothing["alone"]["flagged"] == 0
    assert {row["value"] for row in nothing["harmless"].values()} <= {0.0, None}
    assert {row["recall"]["texts"] for row in nothing["attacks"].values()} == {0}
    assert nothing["attacks"][in_short_turns]["auroc"] == aurocs[in_short_turns]
    assert not any("padding" in name or "prompts" in name for name in nothing["harmless"])
