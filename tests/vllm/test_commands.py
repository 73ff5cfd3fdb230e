"""The commands that use vLLM, as a user calls them."""

import json

import pytest

from commands import run
from sidelight_lab.bench.serving import MEASURES
from vllm_served import Model, tiny_model

TINY = (
    "enforce_eager=true", "block_size=32", "max_num_batched_tokens=64", "max_model_len=512",
    "num_gpu_blocks_override=64",
)  # fmt: skip
OPTIONS = [word for option in TINY for word in ("--engine-option", option)]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


def test_parity_finds_no_difference_but_rounding(model, tmp_path, capsys):
    out = tmp_path / "parity.json"
    data = tmp_path / "texts.jsonl"
    rows = [{"text": f"text number {i} " * (1 + i % 5)} for i in range(12)]
    data.write_text("\n".join(map(json.dumps, rows)))
    early = [
        folder
        for probe, folder in zip(model.probes, model.folders, strict=False)
        if not probe.reads.includes_response
    ]
    command = ["parity", *early, "--data", str(data), "--model", model.path]
    assert run(*command, "--dtype", "float32", "--out", str(out), *OPTIONS) == 0
    found = json.loads(out.read_text())
    assert "transformers - vllm" in capsys.readouterr().out
    names = [probe.name for probe in model.probes if not probe.reads.includes_response]
    between = {row["between"] for row in found}
    assert between == {
        "transformers - vllm",
        "transformers, batch 4 - 1",
        "transformers, batch 16 - 1",
        "vllm, batch 4 - 1",
        "vllm, batch 16 - 1",
    }
    assert [row["probe"] for row in found] == names * len(between)
    assert all(row["texts"] == 12 and row["flips"] == 0 for row in found)
    assert 0 < max(row["largest"] for row in found) < 1e-4


def test_bench_serve_measures_every_set_of_probes(model, tmp_path):
    out = tmp_path / "serve.json"
    command = ["bench", "serve", "--engine", "vllm", "--model", model.path, "--dtype", "float32"]
    sizes = ["--rounds", "2", "--tokens", "64", "--requests", "2", "--written", "4"]
    assert run(*command, *sizes, "--out", str(out), *OPTIONS) == 0
    record = json.loads(out.read_text())
    assert len(record["costs"]) == 5 * len(MEASURES)
    assert {row["measure"] for row in record["costs"]} == MEASURES.keys()
    prompts = [row for row in record["costs"] if row["measure"] == "CPU time per prompt"]
    assert all(row["without"] > 0 for row in prompts)
    assert all(row["low"] <= row["added"] <= row["high"] for row in record["costs"])
    memory = record["memory"]
    assert memory["no probe"] == 0 < memory["1 readout"]
    # A hundred probes have a hundred times the columns.
    assert memory["100 readouts"] == pytest.approx(100 * memory["1 readout"], rel=0.01)


def test_an_unknown_option_of_the_engine_is_one_line(model, capsys):
    command = ["parity", model.folders[0], "--data", "x.jsonl", "--engines", "neither"]
    assert run(*command) == 2
    assert "Choose from transformers, vllm" in capsys.readouterr().err
