"""Long inputs out of a batch: what is in them, and what a probe learns from them."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch.nn.functional import binary_cross_entropy_with_logits

import sidelight
from commands import run, saved
from corpora import planted, training_set
from sidelight.data.loading import load_examples
from sidelight.errors import SidelightError
from sidelight.manifest import model_card, read_manifest
from sidelight.mechanisms.base import mechanism_spec
from sidelight.ragged import Ragged
from sidelight.training.fit import fit
from sidelight.training.loop import train_mechanisms
from sidelight.training.optimisation import among_others
from sidelight.training.settings import FitOptions, Job, automatic_mechanisms, suggested_settings


def batch(labels, *, seed=0):
    """Texts of 1 to 4 tokens, each token the number of its text, and a draw of long inputs."""
    torch.manual_seed(seed)
    lengths = torch.randint(1, 5, (len(labels),))
    values = torch.arange(len(labels)).repeat_interleave(lengths)[:, None].float()
    tokens = Ragged(values, lengths)
    return tokens, among_others(tokens, torch.tensor(labels))


def texts_of(part):
    """The numbers of the texts in one input, in order, each as often as it is there."""
    return part.values[:, 0].long().tolist()


@pytest.mark.parametrize("columns", [1, 3])
def test_each_input_is_a_text_among_others_without_a_label(columns):
    labels = np.zeros((12, columns), dtype=int)
    labels[[1, 4, 9], columns - 1] = 1
    labelled = {1, 4, 9}
    alone, made = batch((labels[:, 0] if columns == 1 else labels).tolist())
    assert len(made.lengths) == 12
    for number, part in enumerate(made.split()):
        texts = texts_of(part)
        assert set(texts) & labelled == {number} & labelled
        # Whole: the tokens of a text are neighbours, and there is another text.
        assert texts.count(number) % int(alone.lengths[number]) == 0
        assert len(texts) > int(alone.lengths[number])


def test_places_and_numbers_differ():
    first, last, sizes = 0, 0, []
    for seed in range(20):
        alone, made = batch([1, 0, 0, 0], seed=seed)
        texts = texts_of(made.split()[0])
        first, last = first + (texts[0] == 0), last + (texts[-1] == 0)
        sizes.append(len(texts) - int(alone.lengths[0]))
    assert 0 < first < 20
    assert 0 < last < 20
    assert min(sizes) < 10
    assert max(sizes) > 40


def test_texts_that_all_have_a_label_stay_alone():
    alone, made = batch([1, 1, 1])
    assert made is alone


def joined_loss(trained, held_out):
    """The cross-entropy of long inputs that are made of held-out texts."""
    torch.manual_seed(0)
    shard, labels = held_out.states.read(0), torch.from_numpy(held_out.labels)
    folded = trained.standardisation.fold(trained.mechanism.columns())
    projected = folded.layers(shard.hidden.float())
    tokens = among_others(Ragged(projected.transpose(0, 1), shard.lengths), labels[shard.rows])
    logits = trained.mechanism.finish(trained.mechanism.summarise(tokens))[:, 0]
    return float(binary_cross_entropy_with_logits(logits, labels[shard.rows].float()))


@pytest.mark.slow
def test_a_probe_that_learned_from_long_inputs_is_surer_of_them(tiny, tmp_path):
    training = training_set(tiny, tmp_path, "binary", 160, seed=1)
    held_out = training_set(tiny, tmp_path, "binary", 200, seed=2, shard_bytes=10**9)
    spec, usual = mechanism_spec("readout"), suggested_settings("readout")
    jobs = [
        Job(spec, seed, replace(usual.changed(epochs=15, learning_rate=4e-3), long_inputs=wanted))
        for wanted in (False, True)
        for seed in range(3)
    ]
    made = train_mechanisms(jobs, training=training, validation=None, to_score=held_out)
    losses = np.array([joined_loss(one, held_out) for one in made]).reshape(2, 3).mean(1)
    alone = [roc_auc_score(held_out.labels, one.logits[:, 0]) for one in made]
    assert losses[1] < losses[0] / 2
    assert min(alone) > 0.98


def test_several_classes_are_refused_before_the_backbone_runs(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(type(tiny), "run", None)
    texts, labels = planted("multiclass", 60, seed=0)
    rows = load_examples(list(zip(texts, map(str, labels), strict=True)))
    with pytest.raises(SidelightError, match="With 3 classes"):
        fit(tiny, rows, None, name="p", options=FitOptions(long_inputs=True, cache_root=tmp_path))


def test_the_command_line_has_the_option(tiny, tmp_path, capsys):
    texts, labels = planted("multiclass", 60, seed=0)
    data = tmp_path / "three.jsonl"
    rows = zip(texts, labels, strict=True)
    data.write_text("\n".join(json.dumps({"text": a, "label": f"is {b}"}) for a, b in rows))
    arguments = ["--data", str(data), "--model", str(saved(tiny, tmp_path / "model"))]
    assert run("train", *arguments, "--long-inputs", "--out", str(tmp_path / "probe"))
    assert "With 3 classes" in capsys.readouterr().err


def test_several_classes_are_refused_by_training_itself(tiny, tmp_path):
    training = training_set(tiny, tmp_path, "multiclass", 30, seed=1)
    job = Job(
        mechanism_spec("readout"), 0, replace(suggested_settings("readout"), long_inputs=True)
    )
    with pytest.raises(SidelightError, match="With 3 classes"):
        train_mechanisms([job], training=training, validation=None)


@pytest.mark.slow
def test_python_has_the_option_and_the_card_tells(tiny, own_cache, tmp_path):
    texts, labels = planted("binary", 60, seed=0)
    rows = list(zip([f"{text} {place}" for place, text in enumerate(texts)], labels, strict=True))
    trained = sidelight.train(tiny, [(text, int(label)) for text, label in rows], long_inputs=True)
    assert trained.probe.record["settings"]["long_inputs"]
    assert "among others in long inputs" in model_card(read_manifest(trained.save(tmp_path)))


def test_extremes_are_left_out_of_what_long_inputs_train():
    assert automatic_mechanisms(2000)[2].options["extremes"] == "pair"
    (readout,) = automatic_mechanisms(2000, long_inputs=True)
    assert readout.options["extremes"] == "none"
