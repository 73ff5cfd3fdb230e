"""The command line, in process, on a tiny backbone saved to disk."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from importlib.metadata import EntryPoints
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from sidelight.cli import app
from sidelight.cli.evaluate import why
from sidelight.cli.options import INPUT_SETTINGS, TrainingInputs
from sidelight.cli.train import _kinds, train
from sidelight.data.examples import Example
from sidelight.data.loading import load_examples
from sidelight.engines.transformers.backbone import TransformersBackbone
from sidelight.errors import SidelightError
from sidelight.models.conversation import Message, Place, Reads
from sidelight.probes.artifact import load_probe, save_probe
from sidelight.probes.card import PROBE, README, TrainingRecord, read_card
from sidelight.probes.explanation import Explanation
from sidelight.probes.mechanisms.base import mechanism_names
from sidelight.storage import only_writer
from sidelight.training.measuring import describe_training
from sidelight.types import Verdict
from worlds.data import little_traffic, planted, with_curves, write
from worlds.models import INTENT, broken, spans_probe, untrained_probe
from worlds.servers import cli

ROOT = Path(__file__).parents[1]
Captured = pytest.CaptureFixture[str]
QUICKLY = ("--set", "epochs=4", "--set", "batch_size=16", "--set", "learning_rate=0.03")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch, little_traffic(folder, patch):
        patch.setenv("SIDELIGHT_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def untrained(tiny: TransformersBackbone, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("untrained")
    return str(save_probe(untrained_probe(tiny, "intent", task=INTENT), folder))


@pytest.fixture(scope="module")
def trained(model: str, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_probe(model, "readout", tmp_path_factory.mktemp("trained"))


def trained_probe(model: str, mechanism: str, folder: Path) -> Path:
    data, out = write_rows(folder / "train.jsonl", 100, seed=1), folder / "probe"
    arguments = ["train", "--model", model, "--data", data, "--label", "toxic", "--set", "seed=2"]
    assert cli(*arguments, *QUICKLY, "--mechanism", mechanism, "--out", str(out)) == 0
    return out


def write_rows(path: Path, count: int, *, seed: int, **last: Any) -> str:
    texts, labels = planted("binary", count, seed=seed)
    rows = [
        {"text": text, "toxic": int(label), "checked": float(index % 2)}
        for index, (text, label) in enumerate(zip(texts, labels, strict=True))
    ]
    return str(write(path, [*rows, *([last] if last else [])]))


def labelled_rows(path: Path, labels: Sequence[object]) -> str:
    rows = [{"text": f"text {i}", "label": label} for i, label in enumerate(labels)]
    return str(write(path, rows))


def thresholds_of(folder: Path) -> list[float]:
    return [*read_card(folder).thresholds]


# Training, and what its probe is used for.


@pytest.mark.slow
def test_training_leaves_probe_but_no_activations(trained, cache):
    assert {path.name for path in trained.iterdir()} == {PROBE, README}
    probe = load_probe(trained)
    assert (probe.card.mechanism.name, probe.card.training.seed) == ("readout", 2)
    assert not list((cache / "activations").rglob("*.safetensors"))


def test_concurrent_training_into_same_folder_is_refused(model, tmp_path, capsys):
    data, out = write_rows(tmp_path / "train.jsonl", 40, seed=1), tmp_path / "probe"
    arguments = ["train", "--model", model, "--data", data, "--label", "toxic", *QUICKLY]
    with only_writer(out):
        assert cli(*arguments, "--out", str(out)) == 2
    assert f"Another run is writing to {out}. Wait" in capsys.readouterr().err


@pytest.mark.slow
def test_eval_reports_metrics_with_confidence_intervals(trained, tmp_path, capsys):
    data = write_rows(tmp_path / "test.jsonl", 80, seed=2, text="unlabelled", toxic=None)
    arguments = ["eval", str(trained), "--data", data, "--label", "toxic"]
    arguments += ["--missing-label", "skip", "--plots", str(tmp_path / "plots")]
    written = tmp_path / "new" / "e.json"
    assert cli(*arguments, "--json", "--out", str(written)) == 0
    told = capsys.readouterr()
    report = json.loads(told.out)
    assert report == json.loads(written.read_text())
    metrics = {name: v for name, v in report.items() if isinstance(v, dict) and "ci" in v}
    assert metrics.keys() >= {"f1", "auprc", "auroc", "accuracy", "recall_at_1pct_fpr", "ece"}
    for figure in metrics.values():
        assert sorted((0, *figure["ci"], 1)) == [0, *figure["ci"], 1]
        assert 0 <= figure["value"] <= 1
    assert report["auprc"]["value"] > 0.9
    assert report["rows"] == 80
    assert "1 rows" in told.err
    assert len(list((tmp_path / "plots").rglob("*.png"))) == 3


@pytest.mark.slow
def test_predict_prints_one_line_per_text_and_explains_verdicts(trained, tmp_path, capsys):
    data = write_rows(tmp_path / "texts.jsonl", 30, seed=3)
    assert cli("predict", str(trained), "--data", data) == 0
    from_file = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    texts = [json.loads(line)["text"] for line in Path(data).read_text().splitlines()]
    assert len(from_file) == 30
    out = tmp_path / "v.jsonl"
    assert cli("predict", str(trained), "--explain", "--out", str(out), texts[7]) == 0
    single = json.loads(out.read_text())
    why = single["explanation"]
    shares = sum(token["share"] for token in why["tokens"])
    assert why["baseline"] + why["template"] + shares == pytest.approx(why["logit"], abs=1e-4)
    assert single["label"] == from_file[7]["label"]
    assert single["probabilities"] == pytest.approx(from_file[7]["probabilities"], abs=1e-4)


def test_explanation_shows_most_influential_tokens_and_layers():
    explanation = Explanation(
        Verdict("p", "toxic", ("toxic",), {"fine": 0.2, "toxic": 0.8}, True),
        label="toxic",
        logit=1.4,
        baseline=0.5,
        steps=0,
        shares=np.array([[0.5, 0.5], [-0.4, 0.0], [0.1, 0.0], [0.0, 0.2]]),
        places=(Place(0, 0, 3), Place(0, 4, 7), Place(0, 8, 9), None),
    )
    lines = why(Example((Message("user", "bad but x"),)), explanation)
    assert lines.startswith(
        "toxic 0.800\ntoxic, logit +1.40 = baseline +0.50, text +0.70, template"
    )
    assert "'bad' +1.00, 'but' -0.40, 'x' +0.10\nlayers: 1 +0.70, 0 +0.20\n" in lines


@pytest.mark.slow
def test_predict_uses_requested_dtype_and_device(trained, capfd):
    chances = {}
    for dtype in ("auto", "float32", "bfloat16"):
        assert cli("predict", str(trained), "--dtype", dtype, "--device", "cpu", "tabX cde") == 0
        chances[dtype] = json.loads(capfd.readouterr().out)["probabilities"]["1"]
    # The model is stored in float32; bfloat16 keeps 8 bits.
    assert chances["auto"] == chances["float32"] != chances["bfloat16"]
    assert chances["bfloat16"] == pytest.approx(chances["auto"], abs=0.1)
    assert cli("predict", str(trained), "--device", "nowhere", "tabX cde") == 2
    assert "nowhere" in capfd.readouterr().err


def test_error_messages_contain_no_control_characters(tmp_path, capsys):
    (tmp_path / "texts.jsonl").write_text(json.dumps({"\x1b[2J": "text"}))
    assert cli("train", "--data", str(tmp_path / "texts.jsonl"), "--out", str(tmp_path / "p")) == 2
    assert r"Known: \x1b[2J." in capsys.readouterr().err


def test_inspect_and_predict_report_what_probe_flags(tiny, model, tmp_path, untrained, capsys):
    binary = str(save_probe(untrained_probe(tiny, "toxicity"), tmp_path / "toxicity"))
    for folder, task, flags in (
        (binary, "binary: fine, toxic", "'toxic'"),
        (untrained, "multiclass: billing, refund, other", "nothing: with several classes"),
    ):
        assert cli("inspect", folder) == 0
        output = capsys.readouterr().out
        assert task in output
        assert re.search(rf"^flags\s+{flags}", output, re.MULTILINE)
    assert cli("inspect", binary, "--json") == 0
    assert json.loads(capsys.readouterr().out)["name"] == "toxicity"
    assert cli("predict", untrained, "--model", model, "a text") == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["flagged"] is False
    assert "'intent' flags nothing" in output.err


@pytest.mark.slow
def test_probe_is_recalibrated_on_labelled_texts_or_by_rule(model, tmp_path, capsys):
    # It tells the classes apart in part, so that rules differ in their thresholds.
    hesitant = trained_probe(model, "pooling", tmp_path)
    before = (hesitant / PROBE).read_bytes()
    on = ["recalibrate", str(hesitant), "--data", write_rows(tmp_path / "new.jsonl", 200, seed=5)]
    assert cli(*on, "--label", "toxic", "--out", str(tmp_path / "labelled")) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "on 200 labelled texts" in output
    assert re.search(r"Before: Finds \d+ of .* After: Finds \d+ of \d+ '1' texts", output)
    assert cli("predict", str(tmp_path / "labelled"), "tabX cde") == 0
    assert cli("recalibrate", str(hesitant), "--threshold", "fpr=0.01") == 0
    assert "too few to estimate a false-positive rate" in capsys.readouterr().err
    by_rule = ["recalibrate", str(hesitant), "--threshold", "recall=0.99", "--out", str(hesitant)]
    # No probe is replaced unless it is told to.
    assert cli(*by_rule) == 2
    assert "contains a probe" in capsys.readouterr().err
    assert (hesitant / PROBE).read_bytes() == before
    assert cli(*by_rule, "--name", "strict", "--force") == 0
    assert re.search(r"finds \d+ of \d+ '1' texts \(\d+ before\)", capsys.readouterr().out)
    assert thresholds_of(hesitant) != thresholds_of(hesitant.with_name("probe-recalibrated"))
    assert cli("inspect", str(hesitant)) == 0
    # The figures are of the threshold before.
    assert "before it was recalibrated" in " ".join(capsys.readouterr().out.split())
    # And it is measured as it is now.
    data = write_rows(tmp_path / "test.jsonl", 60, seed=2)
    assert cli("eval", str(hesitant), "--data", data, "--label", "toxic", "--json") == 0
    assert json.loads(capsys.readouterr().out)["thresholds"] == thresholds_of(hesitant)


@pytest.mark.slow
def test_force_overwrites_probe_and_suggested_eval_command_works(
    model, untrained, tmp_path, monkeypatch, capsys
):
    texts, labels = planted("binary", 60, seed=7)
    rows = [
        {"user's turn": f"{number}" + " long" * 30, "the answer": text, "is bad": int(label)}
        for number, (text, label) in enumerate(zip(texts, labels, strict=True))
    ]
    folder = tmp_path / "my-probe"
    shutil.copytree(untrained, folder)
    monkeypatch.chdir(folder)
    write(Path("TEST_FILE.jsonl"), rows)
    columns = ["--text", "user's turn", "--response", "the answer", "--label", "is bad"]
    arguments = ["--model", model, "--data", "TEST_FILE.jsonl", "--mechanism", "pooling", *columns]
    arguments = ["train", *arguments, *QUICKLY, "--set", "max_tokens=64", "--out", "."]
    assert cli(*arguments) == 2
    assert "--force" in capsys.readouterr().err
    assert Path(PROBE).read_bytes() == (Path(untrained) / PROBE).read_bytes()
    assert cli(*arguments, "--force") == 0
    assert load_probe(folder).card.mechanism.name == "pooling"
    told = capsys.readouterr()
    assert "were truncated to 64 tokens" in told.err
    *_, summary_line, saved_to, hint = told.out.splitlines()
    assert summary_line.startswith("Finds ")
    assert saved_to == "Saved to ."
    _, program, *command = shlex.split(hint.replace("TEST_FILE", "TEST_FILE.jsonl"))
    assert program == "sidelight"
    assert cli(*command, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["probe"], report["rows"]) == ("my-probe", 60)


@pytest.mark.slow
def test_warnings_are_printed_once_per_run_and_stored_in_json(model, tmp_path, capsys):
    data = labelled_rows(tmp_path / "train.jsonl", ["cat", "dog", "dog"] * 5)
    command = ["train", "--model", model, "--data", data, "--mechanism", "pooling", *QUICKLY]
    for run in ("first", "second"):
        assert cli(*command, "--json", "--out", str(tmp_path / run)) == 0
        told = capsys.readouterr()
        printed = [
            line.removeprefix("Warning: ")
            for line in told.err.splitlines()
            if line.startswith("Warning: ")
        ]
        assert json.loads(told.out)["warnings"] == printed
        assert len({*printed}) == len(printed)
        assert any("--positive dog" in sentence for sentence in printed)


def test_train_announces_flagged_label_before_loading_model(tmp_path, capsys):
    (tmp_path / "config.json").write_text("")
    data = labelled_rows(tmp_path / "train.jsonl", ["cat", "dog", "dog"] * 5)
    command = ["train", "--data", data, "--out", str(tmp_path / "o"), "--model", str(tmp_path)]
    assert cli(*command) == 2
    announced_file, doubt, announced, loading, error = capsys.readouterr().err.splitlines()
    assert (announced_file, loading) == (f"Reading {data} ...", "Loading the model ...")
    assert "--positive dog" in doubt
    assert "will flag 'cat'" in announced
    assert error.startswith("Error: Cannot load")
    missing = ["--background", str(tmp_path / "traffic.jsonl")]
    assert cli(*command, *missing) == 2
    *_, error = capsys.readouterr().err.splitlines()
    assert "No file" in error
    assert "traffic.jsonl" in error


# Runs commands without torch, whose import takes seconds.
WITHOUT_TORCH = """
import json, sys

class Absent:
    def find_spec(name, path=None, target=None):
        if name == "torch":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent)
from sidelight.cli import app
for command in json.loads(sys.argv[1]):
    try:
        app(command.split(), standalone_mode=False)
    except ModuleNotFoundError as error:
        print(error, file=sys.stderr)
"""


@pytest.mark.slow
def test_first_progress_lines_precede_torch_import(untrained, tmp_path):
    data = labelled_rows(tmp_path / "data.jsonl", [*INTENT.labels] * 20)
    commands = [f"train --data {data} --out {tmp_path}/o"]
    commands += [f"{name} {untrained} --data {data}" for name in ("eval", "predict", "recalibrate")]
    program = [sys.executable, "-c", WITHOUT_TORCH, json.dumps(commands)]
    output = subprocess.run(program, capture_output=True, text=True, check=True)
    lines = output.stderr.splitlines()
    # Training also says what it has read.
    read = lines.pop(1)
    assert read.startswith("Read 60 texts")
    assert lines == [f"Reading {data} ...", "Loading the model ...", "torch"] * 4
    assert output.stdout == ""


def _use_nothing() -> None:
    """For a process that only starts."""


def test_spawned_processes_run_no_code_from_working_directory(trap):
    assert cli("--version") == 0
    # vLLM starts its processes in this way.
    process = get_context("spawn").Process(target=_use_nothing)
    process.start()
    process.join()
    assert process.exitcode == 0
    assert not trap.exists()


def test_module_runs_no_code_from_working_directory(trap):
    command = [sys.executable, "-m", "sidelight", "--version"]
    assert "version" in subprocess.check_output(command, text=True)
    assert not trap.exists()


def test_python_subprocesses_exclude_working_directory_from_path():
    sources = [
        path for folder in ("src", "packages/*/src") for path in ROOT.glob(f"{folder}/**/*.py")
    ]
    assert len(sources) > 150
    started = [
        first
        for path in sources
        for first in re.findall(r"sys.executable, (\S+),", path.read_text())
    ]
    assert set(started) == {'"-P"'}


def test_training_data_options_apply_to_validation_data(tmp_path):
    data = labelled_rows(tmp_path / "train.jsonl", ["yes", "no", "no", None])
    validation_file = labelled_rows(tmp_path / "held.jsonl", ["no", None, "yes"])
    options = ["--data", data, "--out", "o", "--missing-label", "skip"]
    parsed = train.make_context("train", options).params
    names = [field.name for field in fields(TrainingInputs) if field.name in parsed]
    inputs = TrainingInputs(**{name: parsed[name] for name in names})
    training, validation = replace(inputs, validation=validation_file).load()
    assert (len(training), len(validation)) == (3, 2)
    # A file has no splits, which shows that the option arrives.
    with pytest.raises(SidelightError, match="split='held'"):
        replace(inputs, validation=validation_file, validation_split="held").load()
    limited, _ = replace(inputs, limit=2).load()
    assert len(limited) == 2


@pytest.mark.parametrize("command", ["train", "eval", "recalibrate"])
def test_missing_label_error_names_valid_option(command, untrained, tmp_path, capsys):
    labels = [*["billing", "refund"] * 4, float("nan")]
    data = labelled_rows(tmp_path / "rows.jsonl", labels)
    arguments = [command, "--data", data, *([untrained] if command != "train" else [])]
    arguments += ["--out", str(tmp_path / "out")] if command != "eval" else []
    assert cli(*arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "1 of 9 rows have no label in 'label', the first at rows.jsonl, line 9." in error
    (option, value) = re.search(r"leave them out with (--\S+) (\S+)", error).groups()
    app.get_command(None, command).make_context(command, [*arguments[1:], option, value])


@pytest.mark.parametrize("arguments", [["--data", "guard:refusal"], ["--response", "answer"]])
def test_background_is_refused_for_response_probes(arguments, tmp_path, capsys):
    rows = labelled_rows(tmp_path / "rows.jsonl", ["yes", "no"] * 4)
    ours = ["train", "--data", rows, *arguments, "--background", rows, "--out", tmp_path / "out"]
    assert cli(*ours) == 2
    assert "--background contains only prompts" in capsys.readouterr().err


def test_groups_are_refused_without_folds(tmp_path, capsys):
    rows = labelled_rows(tmp_path / "rows.jsonl", ["yes", "no"] * 4)
    data = ("--data", rows, "--validation", rows, "--out", tmp_path / "out")
    assert cli("train", *data, "--set", "groups=label") == 2
    assert "there are no folds" in capsys.readouterr().err


def test_help_names_every_setting():
    (option,) = (option for option in train.params if option.name == "assigned")
    for name in (*INPUT_SETTINGS, *_kinds()):
        assert re.search(rf"\b{name}\b", option.help), name


# Mistakes.

TRAIN = "train --data {data} --out o --label toxic "


@pytest.mark.parametrize(
    ("command", "remedy"),
    [
        ("train --data nowhere --out o --label toxic --name a/b", "1 to 64 of the characters A-Z"),
        (TRAIN + "--set gate.x=1", "--mechanism gate"),
        (TRAIN + "--set epochs", "NAME=VALUE"),
        ("train --data nowhere --out o --set epoch=3", "Did you mean 'epochs'"),
        (TRAIN + "--set epochs=few", "--set epochs=few"),
        (TRAIN + "--set calibration=isotonic", "'none', 'temperature' or 'platt'"),
        (TRAIN + "--set limits=9", "Did you mean 'limit'"),
        (TRAIN + "--set memory=0", "greater than or equal to 0.01"),
        ("train --data nowhere.jsonl --out o --threshold fpr=2", "fpr=0.01"),
        ("recalibrate nowhere", "--threshold"),
        ("eval nowhere --data {data}", "sidelight train --out"),
        ("predict {probe} --data {empty}", "empty.jsonl, line 2"),
        ("predict {probe}", "Pass texts after the probe, or name a file with --data"),
        ("predict {probe} x --data {empty}", "Pass only one of the two"),
        ("predict {probe} x --engine vllm", "The vLLM engine can only serve"),
        (TRAIN + "--engine vllm --device cpu", "vLLM chooses its own device"),
        # Which is not installed here.
        (TRAIN + "--model {model} --engine vllm", "docs/vllm.md"),
        ("tarin", "train"),
        (TRAIN + "--model smolm2", "Did you mean 'smollm2'"),
        # Before the probe, and so before the work.
        ("eval nowhere --data {data} --out {data}/x.json", "Name another folder"),
    ],
)
def test_user_errors_print_one_line_with_remedy_and_exit_2(
    command, remedy, model, untrained, tmp_path, capfd
):
    data = write_rows(tmp_path / "data.jsonl", 60, seed=4)
    empty = write(tmp_path / "empty.jsonl", [{"text": text} for text in ("a", " ", "c", "")])
    filled = command.format(data=data, empty=empty, model=model, probe=untrained)
    assert cli(*filled.split()) == 2
    output = capfd.readouterr()
    (line,) = [line for line in output.err.splitlines() if line.startswith("Error:")]
    assert remedy in line
    assert "Traceback" not in output.err
    assert not Path("o").exists()


def test_missing_command_prints_help(capfd):
    assert cli() == 2
    output = capfd.readouterr().err
    assert "Error:" not in output
    assert any(line.split()[:1] == ["train"] for line in output.splitlines())


@pytest.mark.parametrize(
    "command",
    [
        "inspect {probe}",
        "predict {probe} x --model {model}",
        "recalibrate {probe} --threshold f1 --out {out}",
        "serve --port 0 --probe {probe} --model nowhere",
    ],
)
def test_every_command_refuses_probe_without_verdicts(command, tiny, model, tmp_path, capsys):
    probe = save_probe(with_curves(broken(untrained_probe(tiny, "toxicity"))), tmp_path / "probe")
    out = tmp_path / "out"
    assert cli(*command.format(probe=probe, model=model, out=out).split()) == 2
    assert f"{probe} is damaged (it gives no verdict" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("more", "remedy"),
    [
        ("--mechanism gat", "Did you mean 'gate'"),
        ("--mechanism gate,pooling", "Unknown mechanism 'gate,pooling'"),
        ("--mechanism gate --set gate.x=1", "Known: activation"),
        ("--mechanism attention --set attention.factor=0", "1 or more"),
        ("--set epochs=0", "epochs=0: Input should be greater than 0"),
        ("--set seed=-1", "seed=-1: Input should be greater than or equal to 0"),
        ("--set reads=response", "--response COLUMN"),
        ("--set validation_split=test", "needs --validation"),
        ("--set cache={folder}/few.jsonl", "Name another folder"),
        ("--background {folder}/nowhere.jsonl", "No file"),
        ("--background {folder}/empty.jsonl", "has no rows"),
        ("--data {folder}/few.jsonl", "Give at least 5 of each label"),
        ("--data {folder}/six.jsonl", "got 6 (3 of 'no', 3 of 'yes')"),
        ("--data {folder}/named_none.jsonl", "none=false"),
        ("--data {folder}/classes.jsonl --threshold recall=0.9", "Leave --threshold out"),
    ],
)
def test_invalid_options_and_texts_are_reported_before_model_loads(more, remedy, tmp_path, capfd):
    data = labelled_rows(tmp_path / "data.jsonl", ["yes", "no"] * 10)
    (tmp_path / "empty.jsonl").write_text("")
    labelled_rows(tmp_path / "few.jsonl", ["yes", "no"])
    labelled_rows(tmp_path / "six.jsonl", ["yes", "no"] * 3)
    labelled_rows(tmp_path / "named_none.jsonl", ["a", "b", "none"] * 8)
    labelled_rows(tmp_path / "classes.jsonl", ["a", "b", "c"] * 8)
    out = str(tmp_path / "out")
    assert cli("train", "--data", data, "--out", out, *more.format(folder=tmp_path).split()) == 2
    error = capfd.readouterr().err
    assert remedy in error.splitlines()[-1]
    assert "Loading the model" not in error


@pytest.mark.parametrize(
    ("command", "remedy"),
    [
        ("eval {answers} --data {data}", "column of responses with --response"),
        ("predict {answers} x", "column of responses with --response"),
        ("recalibrate {answers} --data {data}", "column of responses with --response"),
        ("parity {answers} --data {data} --engines transformers", "Name it with --response"),
        ("predict {finder} --data {data} --response label", "Leave --response out"),
        # Of spans, before the file is read.
        ("recalibrate {finder} --data nowhere.jsonl", "labels spans"),
        ("recalibrate {finder} --threshold f1", "labels spans"),
        ("recalibrate {known} --threshold f1", "no stored operating curve"),
        ("recalibrate {known} --data {data}", "texts from the new traffic"),
        ("recalibrate {known} --data {few}", "Label more texts"),
        ("recalibrate {known} --data {data} --name a/b", "1 to 64 of the characters A-Z"),
    ],
)
def test_unusable_texts_are_reported_before_model_loads(command, remedy, tiny, tmp_path, capfd):
    few = labelled_rows(tmp_path / "few.jsonl", ["fine", "toxic"] * 8)
    data = labelled_rows(tmp_path / "data.jsonl", ["fine", "toxic"] * 20)
    known = untrained_probe(tiny, "known")
    texts = load_examples(data, task=known.task)
    probes = {
        "answers": untrained_probe(tiny, "answers", reads=Reads("response")),
        "finder": spans_probe(tiny, "finder"),
        "known": known.changed(training=TrainingRecord(training=describe_training(texts))),
    }
    folders = {name: save_probe(probe, tmp_path / name) for name, probe in probes.items()}
    assert cli(*command.format(data=data, few=few, **folders).split()) == 2
    error = capfd.readouterr().err
    assert remedy in error.splitlines()[-1]
    assert "Loading" not in error


LIGHT = """
import click, json, sys
from sidelight.cli import app
from sidelight.errors import SidelightError
for words in json.loads(sys.argv[1]):
    try:
        app(words, standalone_mode=False)
    except SidelightError as error:
        print(error)
context = click.Context(app)
for name in app.list_commands(context):
    command = app.get_command(context, name)
    for more in getattr(command, "commands", {"": None}):
        app([name, *more.split(), "--help"], standalone_mode=False)
print(sorted({"fastapi", "matplotlib", "sklearn", "torch", "transformers"} & sys.modules.keys()))
"""


@pytest.mark.slow
def test_errors_and_help_avoid_slow_imports(untrained, tmp_path):
    data = write_rows(tmp_path / "data.jsonl", 20, seed=9)
    (tmp_path / "torn.jsonl").write_text('{"text": ')
    readers = [
        *("train --out o --set epochs=2", "search --out o", "bench defaults"),
        *(
            f"{command} {untrained}"
            for command in (
                *("eval", "redteam", "predict", "recalibrate", "parity"),
                *("bench everyday", "bench tools"),
            )
        ),
    ]
    asked: list[list[str]] = []
    for command in readers:
        for more in (["nowhere.jsonl"], [data, "--text", "txt"], [str(tmp_path / "torn.jsonl")]):
            asked.append([*command.split(), "--data", *more])
    asked += [
        ["predict", "nowhere", "hi"],
        ["recalibrate", untrained],
        ["recalibrate", "nowhere", "--data", data],
        ["recalibrate", untrained, "--threshold", "fpr=0.01"],
        ["recalibrate", untrained, "--data", data, "--label", "lable"],
        ["inspect", "nowhere"],
        ["serve", "--probe", untrained, "--probe", "nowhere"],
        ["policy", "check", "nowhere.toml"],
    ]
    program = [sys.executable, "-c", LIGHT, json.dumps(asked)]
    output = subprocess.run(program, capture_output=True, text=True, check=True).stdout
    errors, *helps = output.split("Usage: ")
    for words in ("nowhere.jsonl", "--text", "torn.jsonl, line 1"):
        assert errors.count(words) == len(readers), words
    assert errors.count("holds no probe") == 4
    for words in (
        "Name labelled texts",
        "Got the threshold",
        "'lable'",
        "Name a TOML file",
    ):
        assert errors.count(words) == 1, words
    assert len(helps) > 20
    assert output.endswith("\n[]\n")


def test_os_errors_are_printed_in_one_line(monkeypatch, capsys):
    refuse = Mock(side_effect=OSError(28, "No space left on device", "/full/disk"))
    monkeypatch.setattr("sidelight.probes.card.read_card", refuse)
    assert cli("inspect", "probe") == 2
    assert capsys.readouterr().err.startswith("Error: No space left on device (/full/disk). ")


@pytest.mark.parametrize(
    ("command", "is_resumed"), [("train", True), ("demo", True), ("predict", False)]
)
def test_only_resumable_commands_suggest_rerun_when_interrupted(
    command, is_resumed, monkeypatch, capsys
):
    monkeypatch.setattr("sidelight.cli.app", Mock(side_effect=KeyboardInterrupt))
    assert cli(command) == 130
    assert ("Run the same command again" in capsys.readouterr().err) == is_resumed


# Ctrl-C while click is imported, which every command needs first.
INTERRUPTED = """
import pkgutil, signal, sys

signal.signal(signal.SIGINT, signal.default_int_handler)

class Stop:
    def find_spec(name, path=None, target=None):
        if name == "click":
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Stop)
pkgutil.resolve_name(sys.argv[1])()
"""


def test_interrupt_during_first_imports_prints_no_traceback():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    program = [sys.executable, "-c", INTERRUPTED, project["scripts"]["sidelight"]]
    ran = subprocess.run(program, capture_output=True, text=True, check=False)
    # By the signal, which shells show as 130.
    assert (ran.returncode, ran.stderr) == (-signal.SIGINT, "")


def test_help_names_every_mechanism(capsys):
    assert cli("train", "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    *names, last = mechanism_names()
    assert f"--spans), {', '.join(names)}, or {last}." in text


def test_commands_of_missing_packages_print_install_hint(monkeypatch, capsys):
    """In a bare environment `tests/matrix/packages` asks for what the server needs."""
    monkeypatch.setattr("sidelight.extensions.entry_points", lambda **_: EntryPoints())
    for command, package in (("reproduce", "lab"), ("redteam", "lab"), ("label", "label")):
        assert cli(command) == 2
        assert (
            f"In a clone of Sidelight, run `pip install './packages/{package}'`."
            in capsys.readouterr().err
        )
    assert cli("--help") == 0
    told = capsys.readouterr().out
    assert ("policy" in told, "reproduce" in told) == (True, False)


# Threads.

# Prints what the environment says at the moment when torch is first imported.
AT_TORCHS_IMPORT = """
import os, sys

class Watch:
    def find_spec(name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"), os.environ.get("OMP_NUM_THREADS"))
            raise KeyboardInterrupt

sys.meta_path.insert(0, Watch)
from sidelight.cli import main
main()
"""


@pytest.mark.slow
def test_openmp_settings_are_applied_before_torch_import():
    usual = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    chosen = {"OMP_WAIT_POLICY": "ACTIVE", "OMP_NUM_THREADS": "2"}
    for variables, expected in (({}, "PASSIVE 1"), (chosen, "ACTIVE 2")):
        # As a quota of one CPU.
        variables = {**usual, **variables, "LOKY_MAX_CPU_COUNT": "1"}
        command = [sys.executable, "-c", AT_TORCHS_IMPORT, "demo"]
        ran = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
        assert ran.stdout.splitlines()[0] == expected
