"""What training makes of a file, and of labels in the queue's order, beside rivals."""

import json

import pytest

from commands import run, saved
from corpora import rows
from sidelight.data.loading import load_examples
from sidelight.prompts import Message
from sidelight.training.background import Background
from sidelight_lab.bench.defaults import ALONE, DEFAULT, LINEAR, compare_defaults, defaults_table


@pytest.mark.slow
def test_the_default_and_every_rival_have_figures(tiny, tmp_path):
    judged = compare_defaults(
        tiny,
        load_examples(rows("binary", 70)),
        sizes=(5,),
        texts=(16,),
        draws=1,
        held_out=40,
        rivals=("tfidf", "last_layer", "attention_probe"),
        background=Background(tuple((Message("user", f"Ordinary {i}."),) for i in range(10))),
        cache_root=tmp_path,
    )
    rows_of = {(one.size, one.draw, one.row): one for one in judged}
    assert len(rows_of) == len(judged)
    for size in ("5 a class", "16 texts"):
        regressions = ("last_layer", "last_layer in contexts")
        for row in (DEFAULT, ALONE, LINEAR, "tfidf", *regressions, "attention_probe"):
            one = rows_of[size, 0, row]
            assert one.right.shape == one.losses.shape == (40,)
            assert one.figures["accuracy"] == one.right.mean()
            assert 0 <= one.figures["auprc in contexts"] <= 1
    assert defaults_table(judged).count("attention_probe") == 2
    # No hidden states are left behind.
    assert all("shared-" in str(path) for path in tmp_path.rglob("*.safetensors"))


@pytest.mark.slow
def test_the_queues_order_and_a_random_one_are_measured_at_each_number_of_labels(
    tiny, tmp_path, capsys, own_cache
):
    files = [tmp_path / "train.jsonl", tmp_path / "test.jsonl"]
    for seed, path in enumerate(files):
        path.write_text("\n".join(json.dumps(row) for row in rows("binary", 80, seed=seed)))
    given = ["--data", str(files[0]), "--test", str(files[1]), "--counts", "30,50"]
    model = saved(tiny, tmp_path / "model")
    assert run("bench", "label", *given, "--model", model, "--seeds", "2", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [(one["seed"], one["order"], one["labels"]) for one in found] == [
        (seed, order, labels)
        for seed in (0, 1)
        for order in ("random", "queue")
        for labels in (30, 50)
    ]
    assert all(0 <= one["auprc"] <= 1 for one in found)
