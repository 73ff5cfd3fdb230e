"""Probes that train on compressed states, beside probes of whole states."""

import json

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from sidelight_lab.bench.states import weighted_auroc
from worlds.data import planted_rows, span_rows
from worlds.models import saved
from worlds.servers import cli

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("temporary_cache")]


@pytest.mark.parametrize("of_spans", [False, True])
def test_compression_shrinks_states_and_full_rank_preserves_auroc(tiny, tmp_path, of_spans):
    rows = span_rows(60) if of_spans else planted_rows("multiclass", 60)
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    command = ["bench", "states", f"--data={tmp_path}/train.jsonl", "--texts=60", "--draws=2"]
    command += [f"--model={saved(tiny, tmp_path / 'model')}", f"--out={tmp_path / 'out'}"]
    assert cli(*command, *(["--spans=spans"] if of_spans else [])) == 0
    record = json.loads((tmp_path / "out" / "states.json").read_text())
    forms = record["forms"]
    sizes = {title: form["token_bytes"] for title, form in forms.items()}
    assert record["token_bytes"] == sizes["1 of the directions, 16 bits"]
    assert sizes["0.5 of the directions, 8 bits"] * 4 <= record["token_bytes"]
    assert record["auroc"] > 0.7
    # The same states in other coordinates, rounded to float16.
    assert forms["1 of the directions, 16 bits"]["difference"] == pytest.approx(0, abs=0.01)
    for form in forms.values():
        low, high = form["ci"]
        assert low <= form["difference"] <= high


def test_weighted_auroc_matches_auroc_of_repeated_rows():
    random = np.random.default_rng(0)
    scores = random.integers(0, 5, size=(40, 2)).astype(float)
    labels = random.integers(0, 2, size=(40, 2))
    weights = random.multinomial(40, np.full(40, 1 / 40), size=3).astype(float)
    areas = weighted_auroc(scores, labels, weights)
    for area, counts in zip(areas, weights.astype(int), strict=True):
        rows = np.repeat(np.arange(40), counts)
        assert area == pytest.approx(roc_auc_score(labels[rows], scores[rows]))
