"""The latency table: every row does the same work, and its figures are what they say they are."""

import json
import re
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from commands import run, saved
from corpora import encoded
from sidelight.backbone import TransformersBackbone
from sidelight.data.examples import Example
from sidelight.errors import ContextLengthError, SidelightError
from sidelight.mechanisms.base import mechanism_names
from sidelight.prompts import Message
from sidelight_lab.bench import latency
from sidelight_lab.bench.latency import compare_latency, latency_record
from sidelight_lab.bench.measurement import conditions, interleaved, peak_bytes
from sidelight_lab.bench.subjects import (
    Answer,
    Load,
    Subject,
    default_subjects,
    encoder_first,
    random_loads,
    text_loads,
    untrained_probe,
)
from tiny import tiny_backbone

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
def subjects(tiny: TransformersBackbone) -> list[Subject]:
    return default_subjects(tiny)


def ragged_prompts(backbone: TransformersBackbone):
    return encoded(backbone, RAGGED)


def named(subjects: list[Subject], name: str) -> Subject:
    return next(subject for subject in subjects if subject.name == name)


def other(most_pairs: float) -> Subject:
    """What somebody else's engine would add: a row that needs nothing of ours."""

    def run(batch) -> Answer:
        return Answer((0,) * len(batch), ((),) * len(batch))

    return Subject("other", "one pass", weights_bytes=7, run=run, most_pairs=most_pairs)


@pytest.mark.slow
def test_every_row_writes_the_token_that_the_llm_alone_writes(tiny, subjects):
    prompts = ragged_prompts(tiny)
    expected = subjects[0].run(prompts).tokens
    assert len(set(expected)) > 1
    assert {subject.name: subject.run(prompts).tokens for subject in subjects} == {
        subject.name: expected for subject in subjects
    }


def test_every_mechanism_is_served_and_naive_and_what_probes_replace_is_there(subjects):
    kinds = {subject.name: subject.kind for subject in subjects}
    for name in mechanism_names():
        assert kinds[f"+ {name}"] == "one pass"
        assert kinds[f"+ {name}, naive"] == "naive"
    assert [subject.kind for subject in subjects].count("cascade") == 2
    assert len(kinds) == len(subjects)


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", mechanism_names())
def test_served_and_naive_give_the_same_verdicts(mechanism):
    backbone = tiny_backbone()
    # transformers gives the last hidden state after the final norm, a tap gives it before.
    backbone.model.base_model.norm = nn.Identity()
    _, served, _, naive = default_subjects(backbone, mechanisms=[mechanism], cascades=False)
    prompts = ragged_prompts(backbone)
    verdicts = [
        [verdict.probabilities["yes"] for (verdict,) in subject.run(prompts).verdicts]
        for subject in (served, naive)
    ]
    assert verdicts[0] == pytest.approx(verdicts[1], abs=ROUNDING)
    assert np.ptp(verdicts[0]) > 10 * ROUNDING


def test_the_bank_gives_ten_verdicts_on_each_prompt(tiny, subjects):
    answer = named(subjects, "+ 10 probes").run(ragged_prompts(tiny))
    assert [len({v.probe for v in verdicts}) for verdicts in answer.verdicts] == [10, 10, 10]


@pytest.mark.slow
def test_an_encoder_reads_all_of_a_text_longer_than_its_positions(tiny, subjects):
    encoder = encoder_first("encoder", other(10**9), device=CPU, dtype=torch.float32)
    batch = ragged_prompts(tiny)
    long = batch[0].__class__(batch[0].token_ids * 300, batch[0].parts * 300)
    assert len(long) > 1000
    assert encoder.run([long, batch[1]]).tokens == (0, 0)


def test_the_encoder_has_the_parameters_of_minilm_and_the_guard_those_of_the_llm(tiny, subjects):
    llm = subjects[0].weights_bytes
    assert llm == pytest.approx(4 * tiny.model.num_parameters(), rel=1e-3)
    minilm = named(subjects, "MiniLM, then LLM").weights_bytes - llm
    # 22,713,216 parameters (all-MiniLM-L6-v2), a head of two classes, a few buffers.
    assert minilm == pytest.approx(4 * 22_713_216, rel=1e-3)
    assert named(subjects, "guard of its size, then LLM").weights_bytes == 2 * llm


@pytest.mark.slow
def test_ratios_are_paired_with_the_first_row(tiny, subjects):
    loads = random_loads(tiny, [8], batch_sizes=[2])
    base, second = compare_latency([subjects[0], other(2 * 8**2)], loads, repeats=3, device=CPU)
    assert (base.ratio.low, base.ratio.median, base.ratio.high) == (1, 1, 1)
    assert (base.batch_size, base.mean_tokens, second.weights_bytes) == (2, 8, 7)
    assert second.ratio.low >= second.ms.low / base.ms.high
    assert second.ratio.high <= second.ms.high / base.ms.low
    for row in (base, second):
        assert 0 < row.ms.low <= row.ms.median <= row.ms.high


def test_each_round_begins_with_another_action():
    order: list[str] = []
    actions = {name: partial(order.append, name) for name in "abc"}
    seconds = interleaved(actions, repeats=4)
    assert "".join(order) == "abcbcacababc"
    assert {name: len(own) for name, own in seconds.items()} == {"a": 4, "b": 4, "c": 4}


@pytest.mark.slow
def test_a_row_is_left_out_where_its_subject_does_not_accept_the_load(tiny, subjects):
    loads = random_loads(tiny, [4, 8], batch_sizes=[1])
    rows = compare_latency([subjects[0], other(4**2)], loads, repeats=1, device=CPU)
    assert [(row.subject, row.load) for row in rows] == [
        ("LLM", "4 tokens"),
        ("other", "4 tokens"),
        ("LLM", "8 tokens"),
    ]
    tables = latency_record(rows, {}).sections
    assert len(tables) == 3
    for table in tables:
        lines = [[cell.strip() for cell in line.split("|")] for line in table.splitlines()[4:]]
        assert [(line[1], line[3] == "-") for line in lines] == [("LLM", False), ("other", True)]


def test_kept_states_are_not_read_at_a_size_that_fills_the_memory(tiny, subjects):
    naive = named(subjects, "+ attention, naive")
    prompt = ragged_prompts(tiny)[0]
    long = prompt.__class__((5,) * 2048, (prompt.parts[-1],) * 2048)
    assert naive.accepts(Load("one", 2, ((long,),)))
    assert not naive.accepts(Load("two", 2, ((long, prompt),)))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process its own peak")
def test_peak_memory_is_what_the_work_held_even_if_as_much_was_freed_before():
    def work() -> None:
        torch.ones(64 * MB // 4).sum()

    for _ in range(2):
        peak = peak_bytes(work, device=CPU)
        assert peak is not None
        # Pages that the allocator or another thread touches meanwhile.
        assert 64 * MB - MB <= peak <= 72 * MB


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process its own peak")
def test_memory_that_stays_held_is_not_counted_again():
    kept = torch.ones(64 * MB // 4)
    peak = peak_bytes(lambda: kept.sum(), device=CPU)
    assert peak is not None
    assert peak < 8 * MB


def test_synthetic_prompts_have_the_length_and_the_same_ids_each_time(tiny):
    (first,), (again,) = (random_loads(tiny, [17], batch_sizes=[3]) for _ in range(2))
    assert first == again
    assert [len(prompt) for batch in first.batches for prompt in batch] == [17] * 3
    assert len({prompt.token_ids for batch in first.batches for prompt in batch}) == 3


def test_a_length_that_the_backbone_cannot_read_is_refused(tiny):
    with pytest.raises(ContextLengthError, match=r"reads up to 256\. .*--lengths"):
        random_loads(tiny, [16, 257], batch_sizes=[1])


def test_prompts_keep_their_order_in_batches(tiny):
    texts = [Example((Message("user", text),)) for text in RAGGED]
    (load,) = text_loads(tiny, texts, batch_sizes=[2], max_tokens=512, title="texts")
    prompts = ragged_prompts(tiny)
    assert (load.title, [len(batch) for batch in load.batches]) == ("3 texts", [2, 1])
    assert [prompt for batch in load.batches for prompt in batch] == prompts
    assert load.mean_tokens == np.mean([len(prompt) for prompt in prompts])


def test_an_untrained_probe_is_the_same_each_time_and_leaves_the_seed_alone(tiny):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    probes = [untrained_probe(tiny, "probe", seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.rand(1), expected)
    one, same, other = (probe.projection().weight for probe in probes)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_an_unknown_mechanism_is_named(tiny):
    with pytest.raises(SidelightError, match="Did you mean 'gate'"):
        default_subjects(tiny, mechanisms=["gat"])


@pytest.mark.slow
def test_the_record_holds_every_figure_and_what_it_was_measured_on(tiny, subjects, tmp_path):
    loads = random_loads(tiny, [4], batch_sizes=[1, 2])
    rows = compare_latency([subjects[0], other(64)], loads, repeats=2, device=CPU)
    latency_record(rows, conditions(tiny, {"rounds": 2})).save(tmp_path / "new")
    saved = json.loads((tmp_path / "new" / "latency.json").read_text())
    assert len(saved["rows"]) == 4
    assert saved["conditions"]["model"] == "tiny/llama"
    assert saved["conditions"].keys() >= {
        "fingerprint", "dtype", "rounds", "device", "cores", "threads", "load before",
        "torch", "transformers", "sidelight",
    }  # fmt: skip
    assert saved["rows"][1]["ratio"]["median"] == rows[1].ratio.median
    text = (tmp_path / "new" / "latency.md").read_text()
    assert len(re.findall(r"\| other +\|", text)) == 6


@pytest.fixture(scope="module")
def model(tiny: TransformersBackbone, tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(tiny, tmp_path_factory.mktemp("model"))


@pytest.mark.slow
def test_the_command_prints_the_table_and_draws_a_picture_of_each_batch_size(
    model, tmp_path: Path, monkeypatch, capsys
):
    options = ["--model", model, "--no-cascades", "--mechanisms", "gate"]
    sizes = ["--batch-sizes", "1,2", "--lengths", "4", "--repeats", "1"]
    assert (
        run("bench", "latency", *options, *sizes, "--plots", str(tmp_path), "--out", str(tmp_path))
        == 0
    )
    assert "+ gate, naive" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "latency-batch-1.png",
        "latency-batch-2.png",
        "latency.json",
        "latency.md",
    ]


@pytest.mark.slow
def test_the_command_takes_prompts_of_a_file_without_labels(
    model, tmp_path: Path, monkeypatch, capsys
):
    data = tmp_path / "prompts.jsonl"
    data.write_text("\n".join(json.dumps({"text": "word " * n}) for n in (1, 40, 3)))
    options = ["--model", model, "--no-cascades", "--mechanisms", "gate", "--data", str(data)]
    assert (
        run(
            "bench",
            "latency",
            *options,
            "--rows",
            "2",
            "--max-tokens",
            "64",
            "--quick",
            "--repeats",
            "1",
            "--json",
        )
        == 0
    )
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["load"] for row in rows} == {"2 prompts of prompts.jsonl"}
    assert 32 < rows[0]["mean_tokens"] < 64


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["--lengths", "16,many"], "like 16,64,256"),
        (["--batch-sizes", "0"], "of 1 or more"),
        (["--lengths", "9999"], "up to 256"),
        (["--mechanisms", "gat"], "Did you mean 'gate'"),
    ],
)
def test_a_mistake_is_one_line_with_its_remedy(arguments, remedy, model, monkeypatch, capfd):
    assert run("bench", "latency", "--model", model, *arguments) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("Error:")]
    assert remedy in line
