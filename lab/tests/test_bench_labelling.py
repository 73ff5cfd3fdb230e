"""Labels in the order of the queue beside random ones, from the command line."""

import json

from commands import run, saved
from corpora import rows


def test_both_orders_are_measured_at_each_number_of_labels(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SIDELIGHT_CACHE", str(tmp_path / "cache"))
    model = saved(tiny, tmp_path / "model")
    for name, seed in (("train", 0), ("test", 1)):
        lines = (json.dumps(row) for row in rows("binary", 80, seed=seed))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    given = [str(tmp_path / "train.jsonl"), "--test", str(tmp_path / "test.jsonl")]
    command = ["bench", "label", "--data", *given, "--model", model, "--seeds", "2"]
    assert run(*command, "--counts", "30,50", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [(one["seed"], one["order"], one["labels"]) for one in found] == [
        (seed, order, labels)
        for seed in (0, 1)
        for order in ("random", "queue")
        for labels in (30, 50)
    ]
    assert all(0 <= one["auprc"] <= 1 for one in found)
