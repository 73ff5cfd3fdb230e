"""An artifact gives back the probe that was saved, or one clear error; never half of either."""

import hashlib
import json
import os
import re
import shutil
from copy import deepcopy
from dataclasses import asdict, replace
from functools import reduce
from operator import getitem
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sidelight
import wordings
from sidelight import storage
from sidelight.classifier import load
from sidelight.data.evaluation import Report, evaluate
from sidelight.errors import FingerprintMismatchError, SidelightError
from sidelight.models.conversation import Message, Reads
from sidelight.models.fingerprint import ACCEPTED, hash_of
from sidelight.probes.artifact import load_probe, save_probe
from sidelight.probes.bank import Bank
from sidelight.probes.card import (
    PROBE,
    README,
    CalibrationTexts,
    Recalibration,
    TrainingRecord,
    TrainingTexts,
    model_card,
    read_card,
    summary,
)
from sidelight.probes.mechanisms.base import mechanism_names
from sidelight.probes.standardisation import Standardisation
from sidelight.statistics.calibration import Calibration
from sidelight.statistics.metrics import decide
from sidelight.statistics.thresholds import OperatingCurve
from worlds.models import (
    INTENT,
    NAMES_AND_PLACES,
    TOPICS,
    TOXICITY,
    score,
    spans_probe,
    untrained_probe,
)

TASKS = [TOXICITY, INTENT, TOPICS]


def probe_of(backbone, *, mechanism="readout", task=TOXICITY, reads=None, name="toxicity"):
    probe = untrained_probe(backbone, name, task=task, mechanism=mechanism, reads=reads)
    shape = (probe.card.backbone.layers, probe.card.backbone.width)
    scaling = Standardisation(torch.randn(shape), 0.5 + torch.rand(shape))
    return replace(probe.changed(training=TrainingRecord(seed=3)), standardisation=scaling)


@pytest.fixture
def saved(tiny, tmp_path):
    return save_probe(probe_of(tiny), tmp_path / "probe")


def test_overwriting_artifact_does_not_change_loaded_probe(saved):
    """As a copy in progress does; mapped into memory, it would weaken or kill what serves."""
    probe, path = load_probe(saved), saved / PROBE
    before = deepcopy(_tensors(probe))
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
        file.flush()
        assert all(map(torch.equal, _tensors(probe), before))
        file.truncate(100)
    assert all(map(torch.equal, _tensors(probe), before))


def _tensors(probe):
    standardisation = probe.standardisation
    return [standardisation.mean, standardisation.scale, *probe.mechanism.parameters()]


@pytest.mark.parametrize("mechanism", mechanism_names())
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.kind)
def test_round_trip_preserves_logits_and_freezes_probe(tiny, tmp_path, mechanism, task):
    probe = probe_of(tiny, mechanism=mechanism, task=task)
    loaded = load_probe(save_probe(probe, tmp_path / "a" / "b"))
    assert not loaded.mechanism.training
    assert not any(parameter.requires_grad for parameter in loaded.mechanism.parameters())
    prompts = [tiny.encoder.encode([Message("user", text)]) for text in ("hi", "a longer text")]
    before, after = (score(tiny, Bank([one]), prompts)[0] for one in (probe, loaded))
    np.testing.assert_array_equal(before, after)
    for row in before:
        assert loaded.verdict(row) == probe.verdict(row)


def test_round_trip_preserves_card(tiny, tmp_path):
    probe = probe_of(tiny, reads=Reads("both", template=False), name="A.9_-").changed(
        calibration=Calibration("platt", "binary", (1.1,), (0.1,)),
        thresholds=(0.123456789012345,),
        task=replace(TOXICITY, labels=("gut", "böse 你好")),
        prompt_format="both",
    )
    probe = replace(probe, standardisation=replace(probe.standardisation, is_normalised=True))
    loaded = load_probe(save_probe(probe, tmp_path))
    of_numbers = {"is_normalised", "weights_sha256"}
    assert loaded.card.model_dump(exclude=of_numbers) == probe.card.model_dump(exclude=of_numbers)
    assert loaded.standardisation.is_normalised


def test_documented_card_edit_works(tiny, tmp_path, monkeypatch):
    record = TrainingRecord(seed=3, training=TrainingTexts(rows=2, texts="ABEiM0Q="))
    save_probe(probe_of(tiny).changed(training=record), tmp_path / "probes" / "toxicity")
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).parents[1].joinpath("docs", "card.md").read_text("utf-8")
    exec(page.split("```python\n")[1].split("```")[0], {})
    changed = load_probe("probes/toxicity-2")
    assert changed.name == "toxicity-2"
    assert changed.card.training == TrainingRecord(seed=3, training=TrainingTexts(rows=2))


CURVE = OperatingCurve.of(np.array([0.1, 0.2, 0.8, 0.9]), np.array([False, True] * 2))
CURVES = {"toxic": asdict(CURVE)}
REPORT = evaluate(decide(TOXICITY, np.array([[0.2], [0.9]]), np.array([0, 1]), thresholds=(0.5,)))


@pytest.mark.parametrize("states", ["divided by their root", "of any norm"])
def test_summary_reports_flagged_counts_and_state_normalisation(tiny, tmp_path, states):
    measured = CalibrationTexts(curves={"toxic": CURVE})
    record = TrainingRecord(validation=measured, threshold_rule="recall=0.9")
    probe = probe_of(tiny).changed(training=record, thresholds=(0.5,))
    scaling = replace(probe.standardisation, is_normalised=states != "of any norm")
    told = summary(read_card(save_probe(replace(probe, standardisation=scaling), tmp_path)))
    assert told["states"].startswith(states)
    flagging = (
        "1 of 2 'toxic' and 1 of 2 others, in the texts used to choose the threshold "
        "(--threshold recall=0.9)"
    )
    assert told["flagging"] == flagging


def test_concurrent_saves_leave_one_intact_artifact(tiny, tmp_path, monkeypatch):
    replaced, replace_file = [], os.replace

    def save_another_first(source, target):
        if not replaced:
            replaced.append(target)
            save_probe(untrained_probe(tiny, "other", mechanism="gate"), tmp_path)
            assert load_probe(tmp_path).name == "other"
        replace_file(source, target)

    monkeypatch.setattr(storage.os, "replace", save_another_first)
    save_probe(untrained_probe(tiny, "probe"), tmp_path)
    assert load_probe(tmp_path).name == "probe"
    assert replaced == [tmp_path / PROBE]
    assert {path.name for path in tmp_path.iterdir()} == {PROBE, README}
    assert load_probe(tmp_path).version in (tmp_path / README).read_text()


def test_saved_probe_includes_hub_compatible_model_card(saved, tiny):
    card, probe = ModelCard.load(saved / README), load_probe(saved)
    assert card.data.library_name == "sidelight"
    for fact in ("toxicity", "fine, toxic", "readout", probe.card.backbone.name, probe.version):
        assert fact in card.text
    save_probe(probe_of(tiny, name="other"), saved)
    assert load_probe(saved).version in (saved / README).read_text()
    assert probe.version not in (saved / README).read_text()


# What stands for a fact in the pattern of the file.
FACTS = {
    "text": ".+",
    "number": "[0-9,]+",
    "digest": "[0-9a-f]{12}",
    "recalibrations": r"(?:- \*\*recalibrated \d+\*\*: [\d-]+: .+\n)*",
}


def test_readme_matches_model_card_pattern(tiny, tmp_path):
    texts = {"rows": 20, "sha256": "0" * 64, "classes": {"fine": 10, "toxic": 10}}
    record = TrainingRecord(
        training=TrainingTexts(**texts),
        validation=CalibrationTexts(**texts, report=REPORT, curves={"toxic": CURVE}),
        contexts={"inside": 3, "background": 4},
        recalibrations=[Recalibration(date="2026-12-02", what="thresholds for fpr=0.01")],
    )
    folder = save_probe(probe_of(tiny).changed(training=record, thresholds=(0.5,)), tmp_path)
    pattern = re.escape(Path(__file__).with_name("worlds").joinpath("model_card.md").read_text())
    for name, fact in FACTS.items():
        pattern = pattern.replace(re.escape(f"{{{name}}}"), fact)
    assert re.fullmatch(pattern, (folder / README).read_text())


def test_saving_does_not_overwrite_unrelated_readme(tiny, tmp_path):
    (tmp_path / README).write_text("My project.")
    load_probe(save_probe(probe_of(tiny), tmp_path))
    assert (tmp_path / README).read_text() == "My project."


def test_invalid_span_rules_are_refused(tiny, tmp_path):
    """Such a probe would find none in any text, and a rule that redacts would let all pass."""
    labelling = spans_probe(tiny, "pii")
    rule = labelling.spans
    of_classes = replace(rule.calibration, task="multiclass")
    for probe in (
        untrained_probe(tiny, "pii", task=NAMES_AND_PLACES).changed(spans=rule),
        labelling.changed(spans=replace(rule, margins=(-1.0, None))),
        labelling.changed(spans=replace(rule, calibration=of_classes)),
    ):
        with pytest.raises(SidelightError, match=wordings.NO_SPAN_RULE):
            load_probe(save_probe(probe, tmp_path / "pii"))


def test_summary_and_model_card_escape_control_characters(tiny, tmp_path):
    forged = Recalibration(date="today", what="\x1b[2J\n- **thresholds**: 0.100")
    record = TrainingRecord(validation=CalibrationTexts(report=REPORT), recalibrations=(forged,))
    card = read_card(save_probe(probe_of(tiny).changed(training=record), tmp_path))
    told = summary(card)
    assert told["recalibrated 1"] == r"today: \x1b[2J\n- **thresholds**: 0.100"
    assert told["validation"].startswith("auprc 1.000, f1 1.000, accuracy 1.000 on")
    assert "\x1b" not in model_card(card)


@pytest.mark.parametrize("different", [["weights"], ["config"], ["config", "weights"]])
def test_backbone_mismatch_error_names_both_models_and_differing_fields(tiny, tmp_path, different):
    # Weights of the right shape for what the card says, so only the fingerprint is wrong.
    hashes = dict.fromkeys(different, "0" * 16)
    another_model = replace(tiny.fingerprint, name="Llama-3.2-3B", **hashes)
    folder = save_probe(probe_of(tiny).changed(backbone=another_model), tmp_path)
    why = f"they differ in {', '.join(different)}, and {ACCEPTED} is not set"
    with pytest.raises(FingerprintMismatchError, match=why) as caught:
        load(folder, model=tiny)
    for named in (
        "'toxicity'",
        another_model.name,
        another_model.digest,
        tiny.name,
        tiny.fingerprint.digest,
    ):
        assert named in str(caught.value)


def test_probe_runs_only_on_accepted_model_copy(tiny, tmp_path, monkeypatch):
    original = replace(tiny.fingerprint, name="Llama-3.2-3B", weights="0" * 16)
    folder = save_probe(probe_of(tiny).changed(backbone=original), tmp_path)
    monkeypatch.setenv(ACCEPTED, hash_of(original.digest, tiny.fingerprint.digest))
    assert load(folder, model=tiny).predict(["a text"])
    monkeypatch.setenv(ACCEPTED, hash_of(tiny.fingerprint.digest, original.digest))
    with pytest.raises(FingerprintMismatchError, match=wordings.ACCEPTS_COPY.format(name=ACCEPTED)):
        load(folder, model=tiny)


def text_of(folder):
    """The card as it stands in the file."""
    with safe_open(folder / PROBE, framework="pt") as file:
        return file.metadata()["sidelight"]


def with_text(folder, text, tensors=None):
    save_file(tensors or load_file(folder / PROBE), folder / PROBE, {"sidelight": text})


def rewritten(folder, **fields):
    with_text(folder, json.dumps({**json.loads(text_of(folder)), **fields}))


def truncated(folder):
    (folder / PROBE).write_bytes((folder / PROBE).read_bytes()[:-100])


def flipped(place):
    """With one bit of the file changed."""

    def damage(folder):
        content = bytearray((folder / PROBE).read_bytes())
        content[place] ^= 1
        (folder / PROBE).write_bytes(content)

    return damage


def with_tensor(name, *shape):
    """Another tensor of that name, or none."""

    def damage(folder):
        tensors = load_file(folder / PROBE)
        tensors.pop(name, None)
        tensors |= {name: torch.zeros(shape)} if shape else {}
        with_text(folder, text_of(folder), tensors)

    return damage


def _with_record(**fields):
    return lambda folder: rewritten(folder, training=fields)


def _with_calibration(calibration):
    return lambda folder: rewritten(folder, calibration=calibration)


TORN = {"thresholds": [0.2, 0.4]}
JSON_REPORT = TypeAdapter(Report).dump_python(REPORT, mode="json")
# What `inspect` and model cards read.
VALIDATIONS = (
    *({"curves": value} for value in (7, {"toxic": 7}, {"fine": CURVES["toxic"]}, {"toxic": TORN})),
    *({"report": value} for value in (0.5, {"rows": 2}, {**JSON_REPORT, "rows": "many"}, [1])),
    {"report": {**JSON_REPORT, "confusion_matrix": {"a": 1}}},
)
RECORDS = (
    {"validation": {"rows": -1}},
    {"recalibrations": ["x"]},
    {"parameters": "many"},
    {"contexts": [1]},
    {"threshold_rule": 5},
    *(
        {"traffic": {"background": {"logits": logits, "parts": [0]}, "flagged": 0}}
        for logits in ([["many"]], [[float("nan")]], [[1.0, 2.0]], [[1.0], [2.0]], 5, {"a": 1})
    ),
    {"a field of another version": 1},
)
FITTED = {"kind": "platt", "task": "binary", "scale": [1.1], "shift": [0.1]}
CALIBRATIONS = (
    {**FITTED, "kind": "plat"},
    {**FITTED, "task": "multiclass"},
    {**FITTED, "scale": [1.0, 2.0]},
    {**FITTED, "scale": [1.0, 2.0], "shift": [0.0, 0.0]},
    {**FITTED, "scale": [-1.0]},
    {**FITTED, "scale": [float("nan")]},
    {**FITTED, "shift": None},
    {**FITTED, "surprise": 1},
    {name: value for name, value in FITTED.items() if name != "shift"},
)


@pytest.mark.parametrize(
    ("field", "claimed"),
    [("mechanism", {"options": {"heads": 10**12}}), ("backbone", {"width": 10**12})],
)
def test_claimed_sizes_are_checked_before_allocation(tiny, tmp_path, field, claimed):
    save_probe(untrained_probe(tiny, "toxicity", mechanism="readout"), tmp_path)
    rewritten(tmp_path, **{field: {**json.loads(text_of(tmp_path))[field], **claimed}})
    with pytest.raises(SidelightError, match=wordings.TENSORS_DIFFER.format(mechanism="readout")):
        load_probe(tmp_path)


@pytest.mark.parametrize("name", ["", "..", "a\nb", "\x1b[31mred", "a b", "a/b", "ü", "x" * 65])
def test_unsafe_names_are_neither_saved_nor_loaded(tiny, saved, name):
    with pytest.raises(SidelightError, match=wordings.NAME_OF_PROBE):
        save_probe(probe_of(tiny, name=name), saved)
    for wrong in ({"name": name}, {"task": {"kind": "binary", "labels": ["fine", f"{name}\n"]}}):
        rewritten(saved, name="toxicity")
        rewritten(saved, **wrong)
        with pytest.raises(SidelightError) as caught:
            load_probe(saved)
        assert str(caught.value).isprintable()


def digest_of(tensors):
    """Of names, types, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def hashed(damage):
    """Damaged by someone who also corrects the hash."""

    def damaged(folder):
        damage(folder)
        rewritten(folder, weights_sha256=digest_of(load_file(folder / PROBE)))

    return damaged


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (truncated, "is damaged"),
        (flipped(-1), "is damaged.*weights do not match its card"),
        (with_tensor("mean", 4, 32), "is damaged.*weights do not match its card"),
        (hashed(with_tensor("mean")), "is damaged.*mean"),
        (hashed(with_tensor("mechanism.bias", 7)), "is damaged.*bias"),
        (hashed(with_tensor("mechanism.extra", 1)), "is damaged.*extra"),
        (hashed(with_tensor("mean", 2, 5)), "is damaged"),
        (flipped(9), "Cannot read .*probe.safetensors"),
        (flipped(7), "Cannot read .*probe.safetensors"),
        (lambda folder: (folder / PROBE).write_bytes(b""), "Cannot read .*probe.safetensors"),
        (lambda folder: (folder / PROBE).unlink(), "holds no probe .probe.safetensors is missing"),
        (lambda folder: save_file(load_file(folder / PROBE), folder / PROBE), "another program"),
        (lambda folder: with_text(folder, "{not"), "is damaged .its card cannot be read"),
        (lambda folder: with_text(folder, "[]"), "is damaged .its card cannot be read"),
        (lambda folder: with_text(folder, "{}"), "is damaged .its card cannot be read"),
        (lambda folder: shutil.rmtree(folder), "holds no probe .it is not a folder"),
        (lambda folder: rewritten(folder, format=2), "has format 2, but this .* reads format 4"),
        (lambda folder: rewritten(folder, mechanism={"name": "gat", "options": {}}), "'gate'"),
        *((_with_record(**value), rf"is damaged .*{next(iter(value))}") for value in RECORDS),
        *(
            (_with_record(validation=value), f"is damaged .*{next(iter(value))}")
            for value in VALIDATIONS
        ),
        *((_with_calibration(value), r"is damaged .*calibration") for value in CALIBRATIONS),
    ],
)
def test_damaged_artifact_raises_one_line_error(saved, damage, says):
    damage(saved)
    with pytest.raises(SidelightError, match=says) as caught:
        load_probe(saved)
    assert "\n" not in str(caught.value)
    assert str(saved) in str(caught.value) or "gate" in says


def leaves(tree, path=()):
    """The path of every value in a card, and of every object that holds values."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield (*path, key)
            yield from leaves(value, (*path, key))


GARBAGE = [None, 5, -1, 0, 1.5, "nonsense", "", [], ["a"], {}, {"a": 1}, True]
MEANINGFUL = ("training", "weights_sha256", "format", "name")
FUNCTION_SCOPED = HealthCheck.function_scoped_fixture


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[FUNCTION_SCOPED])
@given(data=st.data())
def test_garbled_card_fields_are_refused_or_harmless(tiny, saved, data):
    original = text_of(saved)
    card = json.loads(original)
    choices = [path for path in leaves(card) if path[0] not in MEANINGFUL]
    *parents, last = data.draw(st.sampled_from(choices))
    place = reduce(getitem, parents, card)
    place[last] = data.draw(st.sampled_from(GARBAGE))
    with_text(saved, json.dumps(card))
    try:
        probe = load_probe(saved)
    except SidelightError:
        return
    finally:
        with_text(saved, original)
    try:
        # As every use does, before the first verdict.
        probe.card.backbone.require(tiny.fingerprint, probe=probe.name)
    except FingerprintMismatchError:
        return
    assert probe.reads.token_roles
    assert probe.card.prompt_format in ("chat", "raw", "both")
    assert probe.task.kind in ("binary", "multiclass", "multilabel")
    assert probe.verdict(np.zeros(probe.task.outputs)).probe == probe.name


@pytest.mark.parametrize("place", ["nowhere", "empty", "a-file", "a-file/below"])
def test_errors_name_invalid_artifact_paths(tiny, tmp_path, place):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a-file").write_text("text")
    for read in (load_probe, read_card):
        with pytest.raises(SidelightError, match=place):
            read(str(tmp_path / place))
    if "a-file" in place:
        with pytest.raises(SidelightError, match="a-file"):
            save_probe(probe_of(tiny), tmp_path / place)


def test_source_contains_no_unpickling():
    unpickles = re.compile(
        r"import pickle|torch\.load\(|joblib.*load|allow_pickle=True|marshal|shelve"
    )
    sources = Path(sidelight.__file__).parent.rglob("*.py")
    assert not [path.name for path in sources if unpickles.search(path.read_text("utf-8"))]


@pytest.mark.parametrize("mechanism", mechanism_names())
def test_non_finite_weights_are_refused(tiny, tmp_path, mechanism):
    probe = probe_of(tiny, mechanism=mechanism)
    load_probe(save_probe(probe, tmp_path))
    scaling = probe.standardisation
    for tensor in filter(torch.numel, _tensors(probe)):
        middle = tensor.view(-1)[tensor.numel() // 2 :][:1]
        before = middle.clone()
        # The scale of a layer of weight 0 is infinite.
        for number in (torch.nan, *([torch.inf] if tensor is not scaling.scale else [])):
            middle.fill_(number)
            with pytest.raises(SidelightError, match=wordings.GIVES_NO_VERDICT):
                load_probe(save_probe(probe, tmp_path))
        middle.copy_(before)


@pytest.mark.parametrize("mechanism", mechanism_names())
def test_overflowing_weights_are_refused(tiny, tmp_path, mechanism):
    probe = probe_of(tiny, mechanism=mechanism)
    for parameter in probe.mechanism.parameters():
        parameter.fill_(3e38)
    with pytest.raises(SidelightError, match=wordings.OVERFLOW):
        load_probe(save_probe(probe, tmp_path))


@pytest.mark.parametrize("mechanism", mechanism_names())
def test_overflowing_standardisation_scale_is_refused(tiny, tmp_path, mechanism):
    probe = probe_of(tiny, mechanism=mechanism)
    probe.standardisation.scale[0, 0] = 1e-38
    with pytest.raises(SidelightError, match=wordings.OVERFLOW):
        load_probe(save_probe(probe, tmp_path))


def test_probe_with_zero_layer_weight_loads(tiny, tmp_path):
    probe = probe_of(tiny)
    weights = torch.tensor([0.0, *[1.0] * (probe.card.backbone.layers - 1)])
    scaling = probe.standardisation.weighted(weights)
    assert not scaling.scale.isfinite().all()
    assert load_probe(save_probe(replace(probe, standardisation=scaling), tmp_path))
