"""Probes trained together lie side by side; what else lies there stays."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sidelight.artifact import load_probe, save_probe
from sidelight.backbone import TransformersBackbone
from sidelight.errors import SidelightError
from sidelight.evaluation import evaluate
from sidelight.manifest import MANIFEST, holds_probe
from sidelight.probe import Probe
from sidelight.training.fit import Fit, FittedProbe
from sidelight.training.runs import RUNS, read_runs, write_fit
from tiny import TOXICITY, untrained_probe

LABELS = np.array([0, 1, 0, 1])
REPORT = evaluate(TOXICITY, np.array([[0.1], [0.9], [0.2], [0.7]]), LABELS, thresholds=(0.5,))


def fit_of(probe: Probe, *seeds: int) -> Fit:
    made = tuple(FittedProbe(probe, seed, 0.5, REPORT, np.zeros(4)) for seed in seeds)
    return Fit(made, made[0], REPORT, REPORT, ())


def test_a_later_training_replaces_its_own_runs_and_no_other_files(
    tiny: TransformersBackbone, tmp_path: Path
):
    probe = replace(untrained_probe(tiny, "toxicity"), record={"folds": 0})
    others = [tmp_path / RUNS / "events" / "log", tmp_path / RUNS / "web" / MANIFEST]
    for path in others:
        path.parent.mkdir(parents=True)
        path.write_text("{}")
    write_fit(fit_of(probe, 0, 1), tmp_path)
    assert len(read_runs(tmp_path)[0]) == 2
    write_fit(fit_of(probe, 5), tmp_path)
    names = {path.name for path in (tmp_path / RUNS).iterdir()}
    assert names == {"events", "web", "readout-seed5"}
    assert all(path.read_text() == "{}" for path in others)
    assert len(read_runs(tmp_path)[0]) == 1
    # A manifest of another program is no probe's, and is not replaced.
    assert holds_probe(tmp_path)
    assert not holds_probe(tmp_path / RUNS)
    with pytest.raises(SidelightError, match=r"belongs to no probe.*--out"):
        holds_probe(tmp_path / RUNS / "web")
    # A probe that decides otherwise than its run is measured itself.
    save_probe(replace(load_probe(tmp_path), thresholds=(0.9,)), tmp_path)
    (alone,), index = read_runs(tmp_path)
    assert (alone.thresholds, index) == ((0.9,), 0)
