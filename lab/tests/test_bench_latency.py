"""The latency table: every row does the same work, and its figures are what they say they are."""

import json
import re
import sys
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from commands import run, saved
from corpora import encoded
from sidelight.data.examples import Example
from sidelight.errors import ContextLengthError
from sidelight.mechanisms.base import mechanism_names
from sidelight.prompts import Message
from sidelight_lab.bench import latency
from sidelight_lab.bench.latency import compare_latency, latency_record
from sidelight_lab.bench.measurement import interleaved, peak_bytes
from sidelight_lab.bench.subjects import (
    Answer,
    Load,
    Subject,
    default_subjects,
    encoder_first,
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


def ragged_prompts(backbone):
    return encoded(backbone, RAGGED)


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
    prompts = ragged_prompts(tiny)
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
    # The encoder has the parameters of MiniLM, and the guard those of the LLM.
    llm = subjects[0].weights_bytes
    assert llm == pytest.approx(4 * tiny.model.num_parameters(), rel=1e-3)
    minilm = named(subjects, "MiniLM, then LLM").weights_bytes - llm
    # 22,713,216 parameters (all-MiniLM-L6-v2), a head of two classes, a few buffers.
    assert minilm == pytest.approx(4 * 22_713_216, rel=1e-3)
    assert named(subjects, "guard of its size, then LLM").weights_bytes == 2 * llm
    # Kept states are not read at a size that fills the memory.
    naive = named(subjects, "+ attention, naive")
    prompt = ragged_prompts(tiny)[0]
    long = prompt.__class__((5,) * 2048, (prompt.parts[-1],) * 2048)
    assert naive.accepts(Load("one", 2, ((long,),)))
    assert not naive.accepts(Load("two", 2, ((long, prompt),)))


@pytest.fixture(scope="module")
def without_norm():
    """transformers gives the last hidden state after the final norm, a tap gives it before."""
    backbone = tiny_backbone()
    backbone.model.base_model.norm = nn.Identity()
    return backbone


@pytest.mark.parametrize("mechanism", mechanism_names())
def test_served_and_naive_give_the_same_verdicts(without_norm, mechanism):
    _, served, _, naive = default_subjects(without_norm, mechanisms=[mechanism], cascades=False)
    prompts = ragged_prompts(without_norm)
    verdicts = [
        [verdict.probabilities["yes"] for (verdict,) in subject.run(prompts).verdicts]
        for subject in (served, naive)
    ]
    assert verdicts[0] == pytest.approx(verdicts[1], abs=ROUNDING)
    assert np.ptp(verdicts[0]) > 10 * ROUNDING


def test_an_encoder_reads_all_of_a_text_longer_than_its_positions(tiny):
    encoder = encoder_first("encoder", other(10**9), device=CPU, dtype=torch.float32)
    batch = ragged_prompts(tiny)
    long = batch[0].__class__(batch[0].token_ids * 300, batch[0].parts * 300)
    assert len(long) > 1000
    assert encoder.run([long, batch[1]]).tokens == (0, 0)


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
    tables = latency_record(rows, {}).sections
    assert len(tables) == 3
    for table in tables:
        lines = [[cell.strip() for cell in line.split("|")] for line in table.splitlines()[4:]]
        assert [(line[1], line[3] == "-") for line in lines] == [("LLM", False), ("other", True)]


def test_each_round_begins_with_another_action():
    order: list[str] = []
    actions = {name: partial(order.append, name) for name in "abc"}
    seconds = interleaved(actions, repeats=4)
    assert "".join(order) == "abcbcacababc"
    assert {name: len(own) for name, own in seconds.items()} == {"a": 4, "b": 4, "c": 4}


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
    with pytest.raises(ContextLengthError, match=r"reads up to 256\. .*--lengths"):
        random_loads(tiny, [16, 257], batch_sizes=[1])
    texts = [Example((Message("user", text),)) for text in RAGGED]
    (load,) = text_loads(tiny, texts, batch_sizes=[2], max_tokens=512, title="texts")
    prompts = ragged_prompts(tiny)
    assert (load.title, [len(batch) for batch in load.batches]) == ("3 texts", [2, 1])
    assert [prompt for batch in load.batches for prompt in batch] == prompts
    assert load.mean_tokens == np.mean([len(prompt) for prompt in prompts])


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory):
    return saved(tiny, tmp_path_factory.mktemp("model"))


def test_the_command_prints_the_table_draws_a_picture_of_each_batch_size_and_keeps_the_record(
    model, tmp_path, capsys
):
    options = ["--model", model, "--no-cascades", "--mechanisms", "gate"]
    options += ["--batch-sizes", "1,2", "--lengths", "4", "--repeats", "2"]
    assert run("bench", "latency", *options, "--plots", str(tmp_path), "--out", str(tmp_path)) == 0
    assert "+ gate, naive" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "latency-batch-1.png", "latency-batch-2.png", "latency.json", "latency.md",
    ]  # fmt: skip
    record = json.loads((tmp_path / "latency.json").read_text())
    names = {row["subject"] for row in record["rows"]}
    assert len(record["rows"]) == 2 * len(names)
    assert record["conditions"]["model"] == model
    assert record["conditions"].keys() >= {
        "fingerprint", "dtype", "rounds", "device", "cores", "threads", "load before",
        "torch", "transformers", "sidelight",
    }  # fmt: skip
    text = (tmp_path / "latency.md").read_text()
    assert len(re.findall(r"\| \+ gate, naive +\|", text)) == 2 * 3


def test_the_command_takes_prompts_of_a_file_without_labels(model, tmp_path, capsys):
    data = tmp_path / "prompts.jsonl"
    data.write_text("\n".join(json.dumps({"text": "word " * n}) for n in (1, 40, 3)))
    options = ["--model", model, "--no-cascades", "--mechanisms", "gate", "--data", str(data)]
    options += ["--rows", "2", "--max-tokens", "64", "--quick", "--repeats", "1", "--json"]
    assert run("bench", "latency", *options) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["load"] for row in rows} == {"2 prompts of prompts.jsonl"}
    assert 32 < rows[0]["mean_tokens"] < 64


def test_a_mistake_is_one_line_with_its_remedy(model, capfd):
    for arguments, remedy in (
        (["--lengths", "16,many"], "like 16,64,256"),
        (["--batch-sizes", "0"], "of 1 or more"),
        (["--mechanisms", "gat"], "Did you mean 'gate'"),
    ):
        assert run("bench", "latency", "--model", model, *arguments) == 2
        lines = capfd.readouterr().err.splitlines()
        (line,) = [line for line in lines if line.startswith("Error:")]
        assert remedy in line
