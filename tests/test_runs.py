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
from sidelight.mechanisms.base import Geometry, build_mechanism, mechanism_spec
from sidelight.probe import Probe
from sidelight.training.fit import Fit, FittedProbe
from sidelight.training.runs import RUNS, describe_fit, read_runs, write_fit
from sidelight.types import OptionValue
from tiny import TOXICITY, untrained_probe

LABELS = np.array([0, 1, 0, 1])
REPORT = evaluate(TOXICITY, np.array([[0.1], [0.9], [0.2], [0.7]]), LABELS, thresholds=(0.5,))


def probe_of(backbone: TransformersBackbone, **options: OptionValue) -> Probe:
    probe = untrained_probe(backbone, "toxicity")
    spec = mechanism_spec("readout", options)
    who = backbone.fingerprint
    mechanism = (
        build_mechanism(spec, Geometry(who.layers, who.width, 1)).eval().requires_grad_(False)
    )
    return replace(probe, spec=spec, mechanism=mechanism, record={"folds": 0})


def fit_of(*runs: tuple[Probe, int]) -> Fit:
    made = tuple(FittedProbe(probe, seed, 0.5, REPORT, np.zeros(4)) for probe, seed in runs)
    return Fit(made, made[0], REPORT, REPORT, ())


def test_a_later_training_replaces_its_own_runs_and_no_other_files(
    tiny: TransformersBackbone, tmp_path: Path
):
    others = [tmp_path / RUNS / "events" / "log", tmp_path / RUNS / "web" / MANIFEST]
    for path in others:
        path.parent.mkdir(parents=True)
        path.write_text("{}")
    write_fit(fit_of((probe_of(tiny), 0), (probe_of(tiny), 1)), tmp_path)
    assert len(read_runs(tmp_path)[0]) == 2
    write_fit(fit_of((probe_of(tiny), 5)), tmp_path)
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


def test_two_sets_of_options_of_a_mechanism_are_two_probes(
    tiny: TransformersBackbone, tmp_path: Path
):
    one, two = probe_of(tiny, heads=1), probe_of(tiny, heads=2)
    made = fit_of((one, 0), (one, 1), (two, 0), (two, 1))
    write_fit(made, tmp_path)
    folders = {path.name: load_probe(path).spec for path in (tmp_path / RUNS).iterdir()}
    assert folders == {
        f"readout-heads={heads}-seed{seed}": probe.spec
        for heads, probe in ((1, one), (2, two))
        for seed in (0, 1)
    }
    assert set(describe_fit(made)["validation"]) == {
        "readout heads=1",
        "readout heads=2",
        "TF-IDF baseline",
        "last-layer baseline",
    }
