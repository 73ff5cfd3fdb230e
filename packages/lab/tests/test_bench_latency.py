"""Latency: every row does the same work, and its figures are what they say they are."""

import json

import numpy as np
import pytest
from torch import nn

import wordings
from sidelight.errors import ContextLengthError, SidelightError
from sidelight.models.conversation import Message
from sidelight.probes.artifact import save_probe
from sidelight.probes.mechanisms.base import mechanism_names
from sidelight_lab.bench import latency
from sidelight_lab.bench.checks import text_of, words_for
from sidelight_lab.bench.latency import (
    Answer,
    Subject,
    all_subjects,
    compare_latency,
    random_batches,
)
from worlds.data import encoded
from worlds.models import saved, tiny_backbone, untrained_probe
from worlds.servers import cli

pytestmark = pytest.mark.slow
RAGGED = ["a", "some words", "a somewhat longer text"]
# Two float32 programs of the same sums: the order of additions differs.
ROUNDING = 1e-5


@pytest.fixture(autouse=True)
def single_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each timing is of one run: no test looks at how long one takes."""
    monkeypatch.setattr(latency, "SHORTEST_S", 0.0)


@pytest.fixture(scope="module")
def subjects(tiny):
    return all_subjects(tiny)


def named(subjects, name) -> Subject:
    return next(subject for subject in subjects if subject.name == name)


def test_all_subjects_generate_same_token_and_bank_returns_ten_verdicts(tiny, subjects):
    prompts = encoded(tiny, RAGGED)
    expected = subjects[0].run(prompts).tokens
    assert len(set(expected)) > 1
    assert {subject.name: subject.run(prompts).tokens for subject in subjects} == {
        subject.name: expected for subject in subjects
    }
    answer = named(subjects, "+ 10 probes").run(prompts)
    assert [len({v.probe for v in verdicts}) for verdicts in answer.verdicts] == [10, 10, 10]


def test_every_mechanism_has_a_served_and_a_naive_subject(tiny, subjects):
    names = {subject.name for subject in subjects}
    assert len(names) == len(subjects)
    for name in mechanism_names():
        assert {f"+ {name}", f"+ {name}, naive"} <= names
    # Kept states are not read at a size that fills the memory.
    naive = named(subjects, "+ attention, naive")
    prompt = encoded(tiny, RAGGED)[0]
    long = prompt.__class__((5,) * 2048, (prompt.token_roles[-1],) * 2048)
    assert naive.accepts([long])
    assert not naive.accepts([long, prompt])


def test_served_and_naive_verdicts_agree():
    # transformers gives the last hidden state after the final norm, a tap gives it before.
    without_norm = tiny_backbone()
    without_norm.model.base_model.norm = nn.Identity()
    subjects, prompts = all_subjects(without_norm), encoded(without_norm, RAGGED)
    for mechanism in mechanism_names():
        served, naive = (
            [
                verdict.probabilities["yes"]
                for (verdict,) in named(subjects, name).run(prompts).verdicts
            ]
            for name in (f"+ {mechanism}", f"+ {mechanism}, naive")
        )
        assert served == pytest.approx(naive, abs=ROUNDING), mechanism
        # The largest logit of a text's tokens is beyond doubt in a probe that is untrained.
        assert mechanism == "spans" or np.ptp(served) > 10 * ROUNDING, mechanism


def test_ratios_are_paired_with_first_subject_and_skip_rejected_batches(tiny, subjects):
    batches = random_batches(tiny, [4, 8], batch_sizes=[2])
    another = Subject("other", lambda batch: Answer((0,) * len(batch), ()), most_pairs=2 * 4**2)
    rows = compare_latency([subjects[0], another], batches, rounds=3)
    assert [(row.subject, row.tokens) for row in rows] == [("LLM", 4), ("other", 4), ("LLM", 8)]
    base, second, _ = rows
    assert (base.ratio.low, base.ratio.median, base.ratio.high) == (1, 1, 1)
    assert base.batch_size == 2
    assert second.ratio.low >= second.ms.low / base.ms.high
    assert second.ratio.high <= second.ms.high / base.ms.low
    for row in (base, second):
        assert 0 < row.ms.low <= row.ms.median <= row.ms.high


def test_random_batches_have_prompts_of_the_requested_length(tiny):
    (first,), (again,) = (random_batches(tiny, [17], batch_sizes=[3]) for _ in range(2))
    assert first == again
    assert [len(prompt) for prompt in first] == [17] * 3
    assert len({prompt.token_ids for prompt in first}) == 3
    with pytest.raises(ContextLengthError, match=wordings.MODEL_READS.format(tokens=256)):
        random_batches(tiny, [16, 257], batch_sizes=[1])


def test_command_writes_a_row_per_subject_size_and_length(tiny, subjects, tmp_path, capsys):
    options = ["--tokens", "4,8", "--batch-sizes", "1,2", "--rounds", "1"]
    model = saved(tiny, tmp_path / "model")
    assert cli("bench", "latency", "--model", model, *options, "--out", str(tmp_path)) == 0
    output = capsys.readouterr().out
    assert output == (tmp_path / "latency.md").read_text()
    assert output.count("| guard of its size, then LLM ") == 4
    rows = json.loads((tmp_path / "latency.json").read_text())["rows"]
    assert len(rows) == 4 * len(subjects)


@pytest.mark.parametrize("tokens", [65, 125])
def test_text_to_check_has_the_requested_token_count(tiny, tokens):
    words = words_for(tiny.encoder, tokens)
    for number in (0, 123_456):
        assert len(tiny.encoder.encode([Message("user", text_of(words, number))])) == tokens


def test_unattainable_text_lengths_are_rejected(tiny):
    with pytest.raises(ContextLengthError, match=wordings.MODEL_READS.format(tokens=256)):
        words_for(tiny.encoder, 257)
    for tokens in (3, 66):
        with pytest.raises(SidelightError, match=wordings.PROMPT_OF_TOKENS.format(tokens=tokens)):
            words_for(tiny.encoder, tokens)


def test_command_times_checks_at_full_and_reduced_depth(tiny, tmp_path, capsys):
    model = saved(tiny, tmp_path / "model")
    probe = str(save_probe(untrained_probe(tiny, "a"), tmp_path / "a"))
    options = ["--tokens", "65,125", "--rounds", "4", "--out", str(tmp_path), "--layers"]
    assert cli("bench", "latency", "--model", model, "--probe", probe, *options, "99") == 2
    assert wordings.FEWER_LAYERS.format(most=4) in capsys.readouterr().err
    assert cli("bench", "latency", "--model", model, "--probe", probe, *options, "2") == 0
    probes = [probe, f"{probe}, 2 layers"]
    output = capsys.readouterr().out
    assert output == (tmp_path / "checks.md").read_text()
    record = json.loads((tmp_path / "checks.json").read_text())
    # Of the servers, not of the model that counts tokens.
    assert record["conditions"]["dtype"] == "auto"
    rows = record["rows"]
    asked = [(probe, length) for probe in probes for length in (65, 125)]
    assert [(row["probes"], row["tokens"]) for row in rows] == asked
    for row in rows:
        assert 0 < row["ms"]["low"] <= row["ms"]["median"] <= row["ms"]["high"]
