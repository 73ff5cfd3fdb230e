"""Engines side by side: each model in a process of its own, and figures paired by round."""

import json

import numpy as np
import pytest

import wordings
from sidelight.errors import SidelightError
from sidelight_lab.bench.engines import PROBES, Subject
from worlds.gguf import gguf_model, needs_llama
from worlds.models import saved
from worlds.servers import cli

pytestmark = [pytest.mark.slow, needs_llama]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The same weights for both engines."""
    folder = tmp_path_factory.mktemp("models")
    model = gguf_model(folder, "llama")
    return saved(model.reference, folder / "model"), str(model.backbone.path)


def test_command_compares_gguf_file_with_same_model_in_transformers(models, tmp_path, capsys):
    # Two processes begin, which takes seconds.
    options = ("--tokens", "4,8", "--written", "4", "--rounds", "2", "--out", str(tmp_path))
    assert cli("bench", "engines", *models, *options) == 0
    output = capsys.readouterr().out
    assert output == (tmp_path / "engines.md").read_text()
    assert output.startswith(f"model {models[0]} and {models[1]}, ")
    assert ", engine transformers and llama.cpp " in output
    results = json.loads((tmp_path / "engines.json").read_text())
    works = ["reading 4", "reading 8", "writing, 1 at once", "writing, 8 at once"]
    assert results["works"] == works
    pairs = {(one["model"], one["probes"]): np.array(one["cpu"]) for one in results["seconds"]}
    assert [*pairs] == [(model, probes) for model in models for probes in (0, PROBES)]
    assert all(seconds.shape == (len(works), 2) for seconds in pairs.values())
    assert all(results["memory_mb"][model] > 1 for model in models)
    cost = (pairs[models[1], PROBES] / pairs[models[1], 0])[0]
    assert f" {np.median(cost):.3f} ({cost.min():.3f} to {cost.max():.3f}) |" in output
    ratio = (pairs[models[0], 0] / pairs[models[1], 0])[-1]
    assert f" {np.median(ratio):.2f} ({ratio.min():.2f} to {ratio.max():.2f}) |" in output


def test_bench_reuses_rounds_measured_before_a_kill(models, tmp_path):
    options = ("--tokens", "4", "--written", "2", "--out", str(tmp_path))
    spent = []
    for rounds in ("1", "2"):
        assert cli("bench", "engines", models[1], *options, "--rounds", rounds) == 0
        seconds = json.loads((tmp_path / "engines.json").read_text())["seconds"]
        spent.append(np.array([[one["cpu"], one["wall"]] for one in seconds]))
    assert spent[1].shape == (2, 2, 3, 2)
    np.testing.assert_array_equal(spent[0][..., 0], spent[1][..., 0])
    assert (spent[1][..., 0] != spent[1][..., 1]).any()


@pytest.mark.parametrize("kind", [0, 1], ids=["transformers", "llama"])
def test_subject_adds_prompt_and_response_probes_and_removes_them(models, kind):
    subject = Subject(models[kind], "auto", 1)
    for probes in (PROBES, 0):
        seconds = subject.measure(probes, [4], 2)
        assert np.array(seconds).shape == (3, 2)
        sides = [probe.reads.side for probe in subject._engine.probes]
        assert sides == ["prompt", "prompt", "response"][:probes]
    subject._engine._batch._decoder.end_tokens = frozenset(range(300))
    with pytest.raises(SidelightError, match=wordings.ANSWERS_END_AT_ONCE):
        subject.measure(0, [4], 2)
    assert subject.conditions()["engine"].startswith(("transformers", "llama.cpp")[kind])
    assert subject.close() > 1
