"""What is trained where the user names no mechanism, and what is kept of it."""

import numpy as np
import pytest

from corpora import rows, training_set
from sidelight.data.loading import load_examples
from sidelight.mechanisms.base import mechanism_spec
from sidelight.prompts import Reads
from sidelight.ragged import Ragged
from sidelight.training.choice import best_of, better_rivals, mixtures
from sidelight.training.fit import fit
from sidelight.training.loop import train_mechanisms
from sidelight.training.settings import (
    FitOptions,
    Job,
    TrainingSettings,
    automatic_mechanisms,
    suggested_settings,
)

# Sums of the same numbers in float32, in another order.
ROUNDING = {"rtol": 1e-3, "atol": 1e-3}
BRIEF = {"readout": TrainingSettings(epochs=2, batch_size=16, least_steps=0)}


def test_a_rival_that_is_clearly_better_is_told():
    taken = np.random.default_rng(0).normal(1.0, 0.2, 100)
    warned = better_rivals(taken, {"TF-IDF": taken - 0.3, "last layer": taken + 0.1})
    assert len(warned) == 1
    assert warned[0].startswith("TF-IDF predicts left-out texts better than any probe")
    noise = np.random.default_rng(1).normal(0.05, 1.0, 100)
    assert better_rivals(taken, {"TF-IDF": taken - noise}) == []


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (20, ["linear", "readout"]),
        (1000, ["linear", "readout", "readout"]),
        (5000, ["linear", "readout", "readout", "blend"]),
    ],
)
def test_more_texts_pay_for_more_candidates(texts, expected):
    assert [spec.name for spec in automatic_mechanisms(texts)] == expected


def test_a_linear_mechanism_is_no_candidate_where_parts_of_texts_are_learned():
    (readout,) = automatic_mechanisms(5000, long_inputs=True)
    assert readout == mechanism_spec("readout")
    names = [spec.name for spec in automatic_mechanisms(5000, beginnings=True)]
    assert "linear" not in names
    responses = FitOptions(reads=Reads("response"))
    assert "linear" not in [job.spec.name for job in responses.jobs(5000)]


def test_a_costlier_candidate_is_taken_only_for_a_gain_that_stands_out():
    noise = np.random.default_rng(0).normal(size=400)
    cheap = 1 + noise
    assert best_of([cheap, cheap]) == 0
    assert best_of([cheap, cheap - 0.01]) == 1
    # A quarter of a standard error better.
    other = np.random.default_rng(1).normal(size=400)
    other = (other - other.mean()) / other.std()
    assert best_of([cheap, cheap - 0.25 / 20 + other]) == 0
    assert best_of([cheap, cheap - 0.75 / 20 + other]) == 1
    assert best_of([cheap, cheap - 0.5, cheap - 0.4]) == 1


@pytest.mark.parametrize("extremes", ["none", "pair"])
@pytest.mark.parametrize("kind", ["binary", "multiclass"])
def test_a_mixture_gives_the_logits_between_those_of_its_parts(tiny, tmp_path, kind, extremes):
    training = training_set(tiny, tmp_path, kind, 60, seed=0)
    spec = mechanism_spec("readout", {"extremes": extremes})
    weighted = TrainingSettings(epochs=2, layer_weights="predictive")
    linear, readout = train_mechanisms(
        [Job(mechanism_spec("linear"), 0, suggested_settings("linear")), Job(spec, 0, weighted)],
        training=training,
        validation=training,
    )
    shard = training.states.read(0)
    made = mixtures(linear, readout)
    assert [one.job.spec.options["heads"] for one in made] == [3, 3, 3]
    for one in made:
        projection = one.standardisation.fold(one.mechanism.columns())
        columns = projection.layers(shard.hidden.float()).transpose(0, 1)
        tokens = Ragged(columns, shard.lengths)
        logits = one.mechanism.finish(one.mechanism.summarise(tokens))
        np.testing.assert_allclose(logits, one.logits[shard.rows], **ROUNDING)


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    options = FitOptions(cache_root=tmp_path_factory.mktemp("states"), settings=BRIEF)
    return fit(tiny, load_examples(rows("multiclass", 60)), None, name="auto", options=options)


def test_the_probe_is_the_candidate_with_the_least_loss_or_a_cheaper_equal(made):
    titles = [run.probe.spec for run in made.runs]
    assert titles == [
        mechanism_spec("linear"),
        mechanism_spec("readout"),
        mechanism_spec("readout", {"heads": 3}),
    ]
    losses = [run.losses for run in made.runs]
    assert made.best is made.runs[best_of([losses[0], losses[1], losses[2]])]
    assert made.choice.losses[made.choice.taken] == pytest.approx(made.best.losses.mean())


def test_the_choice_is_told_in_one_line_with_all_figures(made):
    line = str(made.choice)
    assert "\n" not in line
    assert line.startswith(f"Took {made.choice.taken} by the log loss")
    for title, loss in {**made.choice.losses, **made.choice.rivals}.items():
        assert f"{title} {loss:.3f}" in line
    assert list(made.choice.losses) == ["linear", "readout", "readout and linear"]
    assert list(made.choice.rivals) == ["TF-IDF", "last layer"]


def test_a_linear_mechanism_that_does_not_fit_into_memory_is_no_candidate(tiny, tmp_path):
    texts = load_examples(rows("binary", 40))
    options = FitOptions(cache_root=tmp_path, settings=BRIEF, memory_bytes=1000)
    made = fit(tiny, texts, None, name="a", options=options)
    assert [run.probe.spec.name for run in made.runs] == ["readout"]
    assert any("it is no candidate" in warning for warning in made.warnings)


def test_a_named_mechanism_is_trained_alone(tiny, tmp_path):
    options = FitOptions(mechanisms=(mechanism_spec("linear"),), cache_root=tmp_path)
    made = fit(tiny, load_examples(rows("binary", 40)), None, name="one", options=options)
    assert [run.probe.spec.name for run in made.runs] == ["linear"]
    assert made.choice is None
    assert made.best.report.metrics["accuracy"].value > 0.7
