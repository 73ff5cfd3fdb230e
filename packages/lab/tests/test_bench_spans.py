"""Probes of spans beside rivals, on texts in which numbers and shouts are labelled."""

import json

import pytest
from planted_data import tiny_bert

from sidelight.data.evaluation import evaluate_spans
from sidelight.data.loading import load_examples
from sidelight.data.spans import character_scores
from sidelight.models.conversation import Reads
from sidelight.probes.card import PROBE
from sidelight.statistics.thresholds import F1
from sidelight.training.dataset import make_split
from sidelight.training.preparing import ProbeDataset
from sidelight.training.settings import FitOptions
from sidelight.training.spans import calibrate_spans
from sidelight_lab.baselines import spans as baselines
from sidelight_lab.baselines.fine_tuning import FineTunedEncoder
from worlds.data import ALPHABETS, span_rows
from worlds.models import saved
from worlds.servers import cli

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("temporary_cache")]


def test_command_measures_every_rival_and_compares_it_with_ours(tiny, tmp_path, capsys):
    for name, seed in {"train": 0, "validation": 1, "test": 2}.items():
        lines = "\n".join(map(json.dumps, span_rows(60, seed)))
        (tmp_path / f"{name}.jsonl").write_text(lines, "utf-8")
    files = [f"--{name}={tmp_path / name}.jsonl" for name in ("validation", "test")]
    rivals = "last layer,mean of layers,lexicon,window"
    command = ["bench", "spans", f"--data={tmp_path}/train.jsonl", *files, "--seeds=2"]
    command += ["--set=epochs=2", f"--set=cache={tmp_path}", f"--out={tmp_path / 'out'}"]
    command += [f"--model={saved(tiny, tmp_path / 'model')}"]
    assert cli(*command, f"--rivals={rivals}") == 0
    record = json.loads((tmp_path / "out" / "spans.json").read_text())
    assert [*record["rows"]] == ["all layers", *rivals.split(",")]
    ours = record["rows"]["all layers"]
    assert len(ours["seeds"]) == len(ours["lookaheads"]) == 2
    assert ours["character_f1"]["value"] == pytest.approx(sum(ours["seeds"]) / 2)
    for row in record["rows"].values():
        for metric, gain in row["ours_minus_this"].items():
            assert gain["value"] == pytest.approx(ours[metric]["value"] - row[metric]["value"])
        assert row["character_f1"]["ci"][0] <= row["character_f1"]["value"]
        assert {*row["per_label"]} == {"NUMBER", "SHOUT"}
    # Letters tell what no lexicon holds.
    assert record["rows"]["window"]["f1"]["value"] > 0.9 > record["rows"]["lexicon"]["f1"]["value"]
    assert record["rows"]["window"]["per_label"]["SHOUT"]["f1"]["value"] > 0.9
    assert capsys.readouterr().out.count("| window") == 1
    # Hidden states of a run that keeps none are gone.
    names = {path.name for path in tmp_path.rglob("*.safetensors")}
    assert names == {PROBE, "model.safetensors"}
    assert cli(*command, "--rivals=lexikon") == 2
    assert "Did you mean 'lexicon'" in capsys.readouterr().err


def test_encoder_learns_to_label_spans(tiny, tmp_path):
    path = tiny_bert(tmp_path / "bert", sorted({*"".join(ALPHABETS.values())} | {*"andor,"}))
    options = FitOptions(reads=Reads("prompt", template=False), cache_root=tmp_path)
    texts = [load_examples(span_rows(80, seed), spans="spans") for seed in (0, 1)]
    splits = [make_split(tiny, split_texts, options) for split_texts in texts]
    tuning = FineTunedEncoder(path=path, epochs=8, batch_size=8, learning_rate=1e-2)
    (score,) = baselines.encoder(ProbeDataset.held_out(tiny, *splits), tuning)
    rule, _ = calibrate_spans(texts[1], *score(texts[1]), rule=F1, bootstrap=0)
    test = load_examples(span_rows(40, 2), spans="spans")
    places, logits = score(test)
    assert all(map(len, places))
    labels = test.task.output_labels
    found = [
        rule.read(character_scores(item.text, token_places, rule.calibration.apply(z)), labels)
        for item, token_places, z in zip(test.items, places, logits, strict=True)
    ]
    report = evaluate_spans(test, found, bootstrap=0)
    assert report.metrics["f1"].value > 0.9
