"""The latency table: every row does the same work, and its figures are what they say they are."""

import sys

import numpy as np
import pytest
import torch
from torch import nn

from corpora import encoded
from sidelight.data.examples import Example
from sidelight.errors import ContextLengthError
from sidelight.mechanisms.base import mechanism_names
from sidelight.prompts import Message
from sidelight_lab.bench import latency
from sidelight_lab.bench.latency import compare_latency
from sidelight_lab.bench.measurement import peak_bytes
from sidelight_lab.bench.subjects import (
    Answer,
    Load,
    Subject,
    default_subjects,
    random_loads,
    text_loads,
)
from tiny import tiny_backbone

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")
MB = 2**20
RAGGED = ["a", "some words", "a somewhat longer text"]
# Two float32 programs of the same sums: the order of additions differs.
ROUNDING = 1e-5


@pytest.fixture(autouse=True)
def single_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each timing is of one run: no test looks at how long one takes."""
    monkeypatch.setattr(latency, "SHORTEST_S", 0.0)


@pytest.fixture(scope="module")
def subjects(tiny):
    return default_subjects(tiny)


def named(subjects, name) -> Subject:
    return next(subject for subject in subjects if subject.name == name)


def other(most_pairs: float) -> Subject:
    """What somebody else's engine would add: a row that needs nothing of ours."""

    def run(batch) -> Answer:
        return Answer((0,) * len(batch), ((),) * len(batch))

    return Subject("other", "one pass", weights_bytes=7, run=run, most_pairs=most_pairs)


def test_every_row_writes_the_token_of_the_llm_alone_and_the_bank_gives_ten_verdicts(
    tiny, subjects
):
    prompts = encoded(tiny, RAGGED)
    expected = subjects[0].run(prompts).tokens
    assert len(set(expected)) > 1
    assert {subject.name: subject.run(prompts).tokens for subject in subjects} == {
        subject.name: expected for subject in subjects
    }
    answer = named(subjects, "+ 10 probes").run(prompts)
    assert [len({v.probe for v in verdicts}) for verdicts in answer.verdicts] == [10, 10, 10]


def test_every_mechanism_is_served_and_naive_and_what_probes_replace_is_there(tiny, subjects):
    kinds = {subject.name: subject.kind for subject in subjects}
    for name in mechanism_names():
        assert kinds[f"+ {name}"] == "one pass"
        assert kinds[f"+ {name}, naive"] == "naive"
    assert [subject.kind for subject in subjects].count("cascade") == 2
    assert len(kinds) == len(subjects)
    llm = subjects[0].weights_bytes
    assert llm == pytest.approx(4 * tiny.model.num_parameters(), rel=1e-3)
    # Kept states are not read at a size that fills the memory.
    naive = named(subjects, "+ attention, naive")
    prompt = encoded(tiny, RAGGED)[0]
    long = prompt.__class__((5,) * 2048, (prompt.parts[-1],) * 2048)
    assert naive.accepts(Load("one", 2, ((long,),)))
    assert not naive.accepts(Load("two", 2, ((long, prompt),)))


def test_served_and_naive_give_the_same_verdicts():
    # transformers gives the last hidden state after the final norm, a tap gives it before.
    without_norm = tiny_backbone()
    without_norm.model.base_model.norm = nn.Identity()
    subjects, prompts = default_subjects(without_norm), encoded(without_norm, RAGGED)
    for mechanism in mechanism_names():
        served, naive = (
            [own.probabilities["yes"] for (own,) in named(subjects, name).run(prompts).verdicts]
            for name in (f"+ {mechanism}", f"+ {mechanism}, naive")
        )
        assert served == pytest.approx(naive, abs=ROUNDING), mechanism
        # The largest logit of a text's tokens is beyond doubt in a probe that is untrained.
        assert mechanism == "spans" or np.ptp(served) > 10 * ROUNDING, mechanism


def test_ratios_are_paired_with_the_first_row_where_its_subject_accepts_the_load(tiny, subjects):
    loads = random_loads(tiny, [4, 8], batch_sizes=[2])
    rows = compare_latency([subjects[0], other(2 * 4**2)], loads, repeats=3, device=CPU)
    assert [(row.subject, row.load) for row in rows] == [
        ("LLM", "4 tokens"), ("other", "4 tokens"), ("LLM", "8 tokens"),
    ]  # fmt: skip
    base, second, _ = rows
    assert (base.ratio.low, base.ratio.median, base.ratio.high) == (1, 1, 1)
    assert (base.batch_size, base.mean_tokens, second.weights_bytes) == (2, 4, 7)
    assert second.ratio.low >= second.ms.low / base.ms.high
    assert second.ratio.high <= second.ms.high / base.ms.low
    for row in (base, second):
        assert 0 < row.ms.low <= row.ms.median <= row.ms.high


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process its own peak")
def test_peak_memory_is_what_the_work_held_whatever_was_freed_or_kept_before():
    for _ in range(2):
        peak = peak_bytes(lambda: torch.ones(64 * MB // 4).sum(), device=CPU)
        assert peak is not None
        # Pages that the allocator or another thread touches meanwhile.
        assert 64 * MB - MB <= peak <= 72 * MB
    kept = torch.ones(64 * MB // 4)
    peak = peak_bytes(lambda: kept.sum(), device=CPU)
    assert peak is not None
    assert peak < 8 * MB


def test_loads_have_prompts_of_the_length_or_the_texts_in_their_order(tiny):
    (first,), (again,) = (random_loads(tiny, [17], batch_sizes=[3]) for _ in range(2))
    assert first == again
    assert [len(prompt) for batch in first.batches for prompt in batch] == [17] * 3
    assert len({prompt.token_ids for batch in first.batches for prompt in batch}) == 3
    with pytest.raises(ContextLengthError, match=r"reads up to 256\. .*\[latency\]"):
        random_loads(tiny, [16, 257], batch_sizes=[1])
    texts = [Example((Message("user", text),)) for text in RAGGED]
    (load,) = text_loads(tiny, texts, batch_sizes=[2], max_tokens=512, title="texts")
    prompts = encoded(tiny, RAGGED)
    assert (load.title, [len(batch) for batch in load.batches]) == ("3 texts", [2, 1])
    assert [prompt for batch in load.batches for prompt in batch] == prompts
    assert load.mean_tokens == np.mean([len(prompt) for prompt in prompts])
