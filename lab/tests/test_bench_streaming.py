"""How soon a probe catches a response: the replay, the figures, and the command."""

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from commands import run, saved
from sidelight.artifact import load_probe
from sidelight.bank import Bank
from sidelight.data.loading import load_examples
from sidelight.policy.hold_back import StreamingRule
from sidelight.prompts import EncodedPrompt, Message, Reads
from sidelight.states.extraction import score
from sidelight_lab.bench.streaming import (
    Responses,
    describe,
    estimates,
    figures,
    firings,
    phrase_scores,
    running_scores,
    with_positives,
)
from tiny import untrained_probe

pytestmark = pytest.mark.slow
# A whole response in one run against the same tokens one by one: float32 rounding.
ROUNDING = 1e-4
NO, YES = "I cannot help with that.", "Of course: first take two eggs."


def rows(prompts=24):
    """Two answers to each of these prompts: a refusal and a helpful one, in various lengths."""
    return [
        {"prompt": f"question {n}", "response": f"{text} {'word ' * (n % 5)}", "kind": kind}
        for n in range(prompts)
        for text, kind in ((NO, "refused"), (YES, "helped"))
    ]


def responses(is_positive, tokens, prompts=None):
    """Responses of which only these things matter."""
    labels = tuple("refused" if p else "helped" for p in is_positive)
    prompts = np.array(prompts or range(len(tokens)))
    growth = ((),) * len(tokens)
    return Responses(np.array(is_positive), labels, np.array(tokens), prompts, growth)


@pytest.mark.parametrize("mechanism", ["readout", "gate", "attention", "fusion"])
def test_a_running_score_is_the_verdict_on_the_response_so_far(tiny, mechanism):
    options = {"reads": Reads("response"), "mechanism": mechanism}
    probes = [untrained_probe(tiny, name, **options) for name in ("one", "two")]
    prompts = [tiny.encoder.encode([Message("user", "q")], "word " * n + "end") for n in (1, 2, 3)]
    found = running_scores(tiny, probes, prompts)
    for probe, scores in zip(probes, found, strict=True):
        for prompt, own in zip(prompts, scores, strict=True):
            read = np.flatnonzero(prompt.mask(probe.reads))
            assert len(own) == len(read)
            cut = [
                EncodedPrompt(prompt.token_ids[: end + 1], prompt.parts[: end + 1]) for end in read
            ]
            logits = score(tiny, Bank([probe]), cut)[0]
            expected = probe.calibration.apply(logits)[:, 0]
            np.testing.assert_allclose(own, expected, atol=ROUNDING)


def test_a_response_is_described_token_by_token_and_phrases_count_from_their_last_one(tiny):
    whole = load_examples(rows(3), text="prompt", label="kind", response="response")
    whole = with_positives(whole, ("refused",), name="refusal")
    known = describe(tiny, whole, "kind")
    for item, growth, tokens in zip(whole.items, known.growth, known.tokens, strict=True):
        assert growth[-1] == item.response
        assert len(growth) == tokens
        assert all(a == b[: len(a)] for a, b in pairwise(growth))
    assert known.prompts.tolist() == [0, 0, 1, 1, 2, 2]
    assert known.is_positive.tolist() == [True, False] * 3
    refusal, answer, *_ = phrase_scores(known)
    # Bytes are tokens: "I cannot" has eight.
    assert refusal.tolist() == [0.0] * 7 + [1.0] * (len(refusal) - 7)
    assert not answer.any()


def test_the_figures_are_those_of_a_hand_made_example():
    known = responses([True, True, True, False, False], [10, 10, 10, 100, 60])
    scores = [
        np.repeat([0.0, 1.0], [2, 8]),  # caught at 3
        np.repeat([0.0, 1.0], [6, 4]),  # caught at 7
        np.zeros(10),
        np.repeat([0.0, 1.0], [39, 61]),  # a false alarm after 40 tokens
        np.zeros(60),
    ]
    fired_at = firings(StreamingRule(0.5, consecutive=1), scores)
    assert fired_at.tolist() == [3, 7, 0, 40, 0]
    assert figures(known, fired_at) == {
        "F1": pytest.approx(2 / 3),
        "precision": pytest.approx(2 / 3),
        "recall": pytest.approx(2 / 3),
        "delay, median": 5,
        "delay, 90 %": pytest.approx(6.6),
        "false alarms per 1,000 tokens": 10,
    }


def test_an_interval_draws_prompts_whole():
    # Each prompt's two responses are both caught or both missed, so only prompts vary.
    known = responses([True] * 8, [5] * 8, prompts=[0, 0, 1, 1, 2, 2, 3, 3])
    scores = [np.full(5, float(prompt < 2)) for prompt in known.prompts]
    fired_at = firings(StreamingRule(0.5, consecutive=1), scores)
    recall = estimates(known, [fired_at])["recall"]
    apart = estimates(replace(known, prompts=np.arange(8)), [fired_at])["recall"]
    assert recall.value == apart.value == 0.5
    assert recall.low < apart.low < 0.5 < apart.high < recall.high
    never = firings(StreamingRule(0.5), [np.zeros(5)] * 8)
    assert estimates(known, [never])["delay, median"].value is None


def test_the_command_writes_table_picture_and_probe(tiny, tmp_path, own_cache, capsys):
    data, out = tmp_path / "answers.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    model = saved(tiny, tmp_path / "model")
    code = run(
        "bench", "streaming", "--data", str(data), "--label", "kind", "--positive", "refused",
        "--seeds", "2", "--model", model, "--out", str(out), "--plots", str(out),
    )  # fmt: skip
    assert code == 0
    assert capsys.readouterr().out == (out / "streaming.md").read_text()
    made = json.loads((out / "streaming.json").read_text())
    assert made["conditions"]["test responses"] == 2 * made["conditions"]["test prompts"]
    by_title = {row["title"]: row for row in made["rows"]}
    # The first words give the class away.
    assert by_title["phrases at the start"]["figures"]["F1"]["value"] == 1
    assert by_title["TF-IDF, token by token"]["figures"]["F1"]["value"] > 0.9
    streamed, whole = (by_title[f"probe, {how}"] for how in ("token by token", "whole response"))
    assert len(streamed["rules"]) == len(whole["rules"]) == 2
    assert streamed["caught"] == sorted(streamed["caught"])
    assert load_probe(out / "probe").reads == Reads("response")
    assert (out / "streaming.png").stat().st_size > 0
