"""Long inputs: what is hidden among other texts, and what two ways of reading say of it."""

import json

import numpy as np
import pytest

from commands import run, saved
from corpora import planted
from sidelight.artifact import save_probe
from sidelight.data.loading import load_examples
from sidelight.errors import SidelightError
from sidelight.mechanisms.base import mechanism_names, mechanism_spec
from sidelight_lab.bench.long_inputs import compare_lengths
from sidelight_lab.bench.subjects import untrained_probe


@pytest.fixture(scope="module")
def labelled():
    texts, labels = planted("binary", 40, seed=0)
    return [{"text": text, "label": int(label)} for text, label in zip(texts, labels, strict=True)]


def figures(backbone, rows, lengths, count, window, names=("readout",)):
    probes = [untrained_probe(backbone, name, spec=mechanism_spec(name)) for name in names]
    return compare_lengths(
        backbone, probes, load_examples(rows), lengths=lengths, count=count, window=window, seed=0
    )


@pytest.mark.slow
def test_one_window_over_the_whole_says_the_same_and_small_ones_other_things(tiny, labelled):
    rows = figures(tiny, labelled, (0, 30), 4, 10_000, mechanism_names())
    assert len(rows) == 2 * 2 * len(mechanism_names())
    for whole, windows in zip(rows[::2], rows[1::2], strict=True):
        assert (whole["read"], windows["read"]) == ("whole", "windows")
        assert {**whole, "read": ""} == {**windows, "read": ""}
    small = figures(tiny, labelled, (60,), 8, 8, ("pooling", "readout"))
    assert any(a["AUROC"] != b["AUROC"] for a, b in zip(small[::2], small[1::2], strict=True))


def test_the_length_is_that_of_the_text_around(tiny, labelled, monkeypatch):
    lengths = []
    run_prompts = type(tiny).run

    def count(self, prompts, **options):
        lengths.extend(map(len, prompts))
        return run_prompts(self, prompts, **options)

    monkeypatch.setattr(type(tiny), "run", count)
    figures(tiny, labelled, (0, 100), 5, 16)
    alone, around = np.array(lengths[:10]), np.array(lengths[10:])
    # Blank lines between the pieces add tokens; no piece is left out.
    assert ((around - alone) >= 100).all()
    assert ((around - alone) <= 200).all()
    with pytest.raises(SidelightError, match="--texts"):
        figures(tiny, labelled, (0,), 30, 16)


@pytest.mark.slow
def test_the_command_prints_every_length(tiny, labelled, tmp_path, capsys):
    model = saved(tiny, tmp_path / "model")
    from sidelight.backbone import load_backbone

    probe = untrained_probe(load_backbone(model), "a")
    # Two seeds of one training, say: they have one name.
    folders = [str(save_probe(probe, tmp_path / name)) for name in ("first", "second")]
    texts = tmp_path / "named.jsonl"
    names = {0: "no", 1: "yes"}
    texts.write_text("\n".join(json.dumps({**r, "label": names[r["label"]]}) for r in labelled))
    arguments = ["--data", str(texts), "--lengths", "20,40", "--texts", "3", "--json"]
    assert run("bench", "long", *folders, *arguments) == 0
    shown = capsys.readouterr()
    rows = json.loads(shown.out)
    assert [row["tokens around"] for row in rows] == [0] * 4 + [20] * 4 + [40] * 4
    assert [row["probe"] for row in rows[:4:2]] == folders
    # Inputs of each length: three texts of either label. A count of inputs would say 18.
    assert f"{6 * (20 + 40)} of {6 * (20 + 40)} tokens" in shown.err
