"""The command line, in process, on a tiny backbone saved to disk."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from importlib.metadata import EntryPoints
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from commands import run, saved
from corpora import planted
from sidelight.artifact import load_probe, save_probe
from sidelight.backbone import TransformersBackbone
from sidelight.cli.evaluate import marked
from sidelight.cli.options import TrainingInputs
from sidelight.cli.train import train
from sidelight.data.examples import Example
from sidelight.errors import SidelightError
from sidelight.explanation import Explanation
from sidelight.manifest import WEIGHTS
from sidelight.mechanisms.base import mechanism_names
from sidelight.prompts import Message, Place
from sidelight.types import Verdict
from tiny import INTENT, untrained_probe

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def model(tiny: TransformersBackbone, tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(tiny, tmp_path_factory.mktemp("model"))


QUICKLY = ("--epochs", "4", "--batch-size", "16", "--learning-rate", "0.03")


def write_rows(path: Path, count: int, *, seed: int) -> str:
    texts, labels = planted("binary", count, seed=seed)
    rows = [
        {"text": text, "toxic": int(label), "checked": float(index % 2)}
        for index, (text, label) in enumerate(zip(texts, labels, strict=True))
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture(scope="module")
def trained(
    model: str, tmp_path_factory: pytest.TempPathFactory, module_patch: pytest.MonkeyPatch
) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    data = write_rows(folder / "train.jsonl", 160, seed=1)
    module_patch.setenv("SIDELIGHT_CACHE", str(folder / "cache"))
    arguments = ["train", "--model", model, "--data", data, "--label", "toxic", "--seeds", "2"]
    code = run(
        *arguments, *QUICKLY, "--mechanism", "pooling,readout", "--out", str(folder / "probe")
    )
    assert code == 0
    return folder / "probe"


@pytest.fixture(scope="module")
def module_patch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.mark.slow
def test_training_keeps_every_run_and_the_best(trained: Path):
    runs = sorted(path.name for path in (trained / "runs").iterdir())
    assert runs == ["pooling-seed0", "pooling-seed1", "readout-seed0", "readout-seed1"]
    best = json.loads((trained / "training.json").read_text())["best"]
    run = trained / "runs" / f"{best['mechanism']}-seed{best['seed']}"
    name = "probe.safetensors"
    assert (trained / name).read_bytes() == (run / name).read_bytes()


def test_training_leaves_no_activations_behind(trained: Path):
    activations = trained.parent / "cache" / "activations"
    assert not list(activations.rglob("*.safetensors"))


@pytest.mark.slow
def test_eval_reports_every_metric_with_its_interval(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    data = write_rows(tmp_path / "test.jsonl", 80, seed=2)
    arguments = ["eval", str(trained), "--data", data, "--label", "toxic", "--json"]
    assert run(*arguments, "--subset", "checked", "--plots", str(tmp_path / "plots")) == 0
    report = json.loads(capsys.readouterr().out)
    for metric in (
        "f1", "precision", "recall", "auprc", "auroc", "accuracy", "macro_f1",
        "recall_at_1pct_fpr", "ece",
    ):  # fmt: skip
        low, high = report[metric]["ci"]
        assert 0 <= low <= high <= 1
        assert 0 <= report[metric]["value"] <= 1
    assert report["auprc"]["value"] > 0.9
    assert report["rows"] == 80
    assert report["subsets"]["checked"]["rows"] == 40
    assert set(report["runs"]) == {"pooling", "readout"}
    assert len(list((tmp_path / "plots").rglob("*.png"))) == 6


def test_predict_gives_one_line_per_text_in_order(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    data = write_rows(tmp_path / "texts.jsonl", 30, seed=3)
    assert run("predict", str(trained), "--data", data) == 0
    from_file = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    texts = [json.loads(line)["text"] for line in Path(data).read_text().splitlines()]
    assert len(from_file) == 30
    assert run("predict", str(trained), "--out", str(tmp_path / "v.jsonl"), texts[7]) == 0
    alone = json.loads((tmp_path / "v.jsonl").read_text())
    assert alone["label"] == from_file[7]["label"]
    assert alone["probabilities"] == pytest.approx(from_file[7]["probabilities"], abs=1e-4)


def test_predict_explains_by_offsets(trained: Path, capsys: pytest.CaptureFixture[str]):
    texts = ["tabX cde", "fghi"]
    assert run("predict", str(trained), "--explain", *texts) == 0
    explained = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert run("predict", str(trained), *texts) == 0
    plain = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for text, verdict, bare in zip(texts, explained, plain, strict=True):
        why = verdict.pop("explanation")
        assert verdict["label"] == bare["label"]
        assert {token["end"] for token in why["tokens"]} >= {1, len(text)}
        shares = sum(token["share"] for token in why["tokens"])
        assert why["baseline"] + why["template"] + shares == pytest.approx(why["logit"], abs=1e-4)
    assert run("predict", str(trained), "--explain", "--engine", "vllm", "x") == 2
    assert "vLLM's engine cannot explain" in capsys.readouterr().err


def test_a_terminal_shows_the_text_with_its_strongest_tokens_marked():
    explanation = Explanation(
        Verdict("p", "toxic", ("toxic",), {"fine": 0.2, "toxic": 0.8}, True),
        label="toxic",
        logit=1.4,
        baseline=0.5,
        steps=0,
        shares=np.array([[0.5, 0.5], [-0.4, 0.0], [0.1, 0.0], [0.0, 0.2]]),
        places=(Place(0, 0, 3), Place(0, 4, 7), Place(0, 8, 9), None),
    )
    shown = marked(Example((Message("user", "bad but x"),)), explanation)
    assert shown.plain == (
        "toxic 0.800\n"
        "toxic, logit +1.40 = baseline +0.50, text +0.70, template +0.20 (exact)\n"
        "tokens: 'bad' +1.00, 'but' -0.40, 'x' +0.10\n"
        "layers: 1 +0.70, 0 +0.20\n"
        "\n"
        "bad but x"
    )
    styled = {shown.plain[span.start : span.end]: str(span.style) for span in shown.spans}
    assert styled == {"bad": "bold reverse red", "but": "bold reverse blue"}


def test_predict_runs_the_backbone_in_the_dtype_and_on_the_device_that_it_is_given(
    trained: Path, capfd: pytest.CaptureFixture[str]
):
    judged = {}
    for dtype in ("auto", "float32", "bfloat16"):
        assert run("predict", str(trained), "--dtype", dtype, "--device", "cpu", "tabX cde") == 0
        judged[dtype] = json.loads(capfd.readouterr().out)["probabilities"]["1"]
    # The model is stored in float32; bfloat16 keeps 8 bits.
    assert judged["auto"] == judged["float32"] != judged["bfloat16"]
    assert judged["bfloat16"] == pytest.approx(judged["auto"], abs=0.1)
    assert run("predict", str(trained), "--device", "nowhere", "tabX cde") == 2
    assert "nowhere" in capfd.readouterr().err
    assert run("predict", str(trained), "--engine", "vllm", "--device", "cpu", "tabX cde") == 2
    assert "vLLM chooses its device itself" in capfd.readouterr().err


def test_an_empty_text_in_a_file_to_judge_is_named_by_its_line(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    data = tmp_path / "texts.jsonl"
    data.write_text("\n".join(json.dumps({"text": text}) for text in ("a", " ", "c", "")))
    assert run("predict", str(trained), "--data", str(data)) == 2
    assert (
        "2 texts or responses are empty, the first in texts.jsonl, line 2, "
        in capsys.readouterr().err
    )


def test_inspect_says_what_the_probe_is(trained: Path, capsys: pytest.CaptureFixture[str]):
    assert run("inspect", str(trained)) == 0
    shown = capsys.readouterr().out
    assert "binary: 0, 1" in shown
    assert re.search(r"flags\s+'1'", shown)
    assert "validation" in shown
    assert run("inspect", str(trained), "--json") == 0
    assert json.loads(capsys.readouterr().out)["name"] == "probe"


@pytest.fixture(scope="module")
def hesitant(trained: Path) -> Path:
    """A probe that tells the classes apart in part, so that rules differ in their thresholds."""
    return trained / "runs" / "pooling-seed0"


def thresholds_of(folder: Path) -> list[float]:
    return json.loads((folder / "manifest.json").read_text())["thresholds"]


def test_a_probe_is_recalibrated_on_labelled_and_on_unlabelled_texts_and_by_a_rule_alone(
    hesitant: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    data = write_rows(tmp_path / "new.jsonl", 120, seed=5)
    arguments = ["recalibrate", str(hesitant), "--data", data]
    labelled, unlabelled = tmp_path / "labelled", tmp_path / "unlabelled"
    assert run(*arguments, "--label", "toxic", "--out", str(labelled)) == 0
    shown = capsys.readouterr().out
    assert "before" in shown
    assert "Calibrated by platt on 120 labelled texts" in shown
    more = write_rows(tmp_path / "more.jsonl", 200, seed=6)
    arguments = ["recalibrate", str(hesitant), "--data", more, "--out", str(unlabelled)]
    assert run(*arguments, "--json") == 0
    assert json.loads(capsys.readouterr().out)["what"].startswith("shares of classes in 200 ")
    arguments = ["recalibrate", str(hesitant), "--threshold", "recall=0.99", "--name", "strict"]
    assert run(*arguments) == 0
    told = capsys.readouterr()
    assert re.search(r"It flags \d+ of \d+ texts that are '1', and \d+ of \d+ others", told.out)
    beside = hesitant.with_name("pooling-seed0-recalibrated")
    assert thresholds_of(beside) != thresholds_of(hesitant)
    assert json.loads((beside / "manifest.json").read_text())["name"] == "strict"
    assert run("inspect", str(beside)) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "thresholds for recall=0.99" in shown
    # The figures are of the threshold before.
    assert "before it was recalibrated" in shown
    for folder in (labelled, unlabelled, beside):
        assert run("predict", str(folder), "tabX cde") == 0
    # A column of the usual name is the label.
    rows = [json.loads(line) for line in Path(data).read_text().splitlines()]
    named = tmp_path / "named.jsonl"
    named.write_text("\n".join(json.dumps({"text": r["text"], "label": r["toxic"]}) for r in rows))
    arguments = ["recalibrate", str(hesitant), "--data", str(named), "--out", str(tmp_path / "d")]
    assert run(*arguments) == 0
    assert thresholds_of(tmp_path / "d") == thresholds_of(labelled)


def test_a_rule_alone_warns_of_what_it_rests_on(
    hesitant: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    arguments = ["recalibrate", str(hesitant), "--threshold", "fpr=0.01", "--out"]
    assert run(*arguments, str(tmp_path / "strict")) == 0
    assert "cannot be told from" in capsys.readouterr().err


def test_recalibrating_replaces_no_probe_unless_it_is_told_to(
    hesitant: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    own = tmp_path / "own"
    shutil.copytree(hesitant, own)
    before = (own / "manifest.json").read_bytes()
    arguments = ["recalibrate", str(own), "--threshold", "recall=0.99", "--out", str(own)]
    assert run(*arguments) == 2
    assert "holds a probe already" in capsys.readouterr().err
    assert (own / "manifest.json").read_bytes() == before
    assert run(*arguments, "--force") == 0
    assert thresholds_of(own) != thresholds_of(hesitant)
    # And it is measured as it is now, not as the run that it was.
    data = write_rows(tmp_path / "test.jsonl", 60, seed=2)
    capsys.readouterr()
    assert run("eval", str(own), "--data", data, "--label", "toxic", "--json") == 0
    assert json.loads(capsys.readouterr().out)["thresholds"] == thresholds_of(own)


def test_a_probe_that_was_pushed_is_pulled(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run("push", str(trained), str(tmp_path / "shared")) == 0
    assert str(tmp_path / "shared") in capsys.readouterr().out
    assert run("pull", str(tmp_path / "shared"), str(tmp_path / "mine")) == 0
    weights = "probe.safetensors"
    assert (tmp_path / "mine" / weights).read_bytes() == (trained / weights).read_bytes()


def test_env_names_the_versions(capsys: pytest.CaptureFixture[str]):
    assert run("env", "--json") == 0
    assert {"python", "torch", "transformers", "cache"} <= set(json.loads(capsys.readouterr().out))


@pytest.mark.parametrize("command", ["", "train", "eval", "recalibrate", "redteam", "predict",
                                     "serve", "demo", "inspect", "push", "pull", "env", "search",
                                     "reproduce", "anatomy", "bench", "bench extract",
                                     "bench train", "bench latency"])  # fmt: skip
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]):
    assert run(*command.split(), "--help") == 0
    assert "Usage:" in capsys.readouterr().out


def test_training_names_every_mechanism(capsys: pytest.CaptureFixture[str]):
    assert run("train", "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"a comma-separated list: {', '.join(mechanism_names())}." in text


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["train", "--data", "{data}", "--out", "o", "--label", "toxi"], "Did you mean 'toxic'"),
        (["train", "--data", "{data}", "--out", "o", "--text", "txt"], "Did you mean 'text'"),
        (["train", "--data", "nowhere.jsonl", "--out", "o"], "nowhere.jsonl"),
        (["train", "--data", "{data}", "--out", "o", "--label", "toxic", "--mechanism", "gat"],
         "Did you mean 'gate'"),
        (["train", "--data", "{data}", "--out", "o", "--label", "toxic", "--mechanism", ","],
         "Leave it out, or choose: attention"),
        (["search", "--data", "{data}", "--out", "o", "--label", "toxic", "--mechanism", ","],
         "Leave it out, or choose: attention"),
        (["search", "--data", "{data}", "--out", "o", "--label", "toxic", "--mechanism", "gat"],
         "Did you mean 'gate'"),
        (["train", "--data", "{data}", "--out", "o", "--label", "toxic", "--mechanism", "readout",
          "--set", "readout.x=1"], "Unknown option 'x'"),
        (["train", "--data", "{data}", "--out", "o", "--label", "toxic", "--set", "gate.x=1"],
         "--mechanism gate"),
        (["train", "--data", "{data}", "--out", "o", "--label", "toxic", "--set", "heads=1"],
         "MECHANISM.OPTION=VALUE"),
        (["train", "--data", "{data}", "--out", "o", "--label", "toxic", "--model", "{data}"],
         "Give 'smollm2'"),
        (["train", "--data", "{data}", "--out", "o", "--label", "toxic", "--model", "{model}",
          "--cache-budget", "0.0000001"], "--cache-budget"),
        (["train", "--data", "nowhere.jsonl", "--out", "o", "--threshold", "fpr=2"],
         "Cannot read the threshold 'fpr=2'. Write f1, fpr=0.01"),
        (["recalibrate", "nowhere"], "--threshold"),
        (["recalibrate", "nowhere", "--threshold", "0.5"], "recall=0.95"),
        (["recalibrate", "nowhere", "--data", "{data}"], "sidelight train --out"),
        (["train", "--dat", "x"], "--data"),
        (["eval", "nowhere", "--data", "{data}"], "sidelight train --out"),
        (["predict", "nowhere"], "--data"),
        (["serve", "--probe", "nowhere"], "sidelight train --out"),
        (["tarin"], "train"),
        # Before the probe, and so before the work.
        (["eval", "nowhere", "--data", "{data}", "--out", "{data}/x.json"], "--out"),
        (["eval", "nowhere", "--data", "{data}", "--out", "."], "--out"),
        (["parity", "nowhere", "--data", "{data}", "--out", "{data}/x.json"], "--out"),
        (["predict", "nowhere", "text", "--out", "{data}/x.jsonl"], "--out"),
        (["bench", "serve", "--engine", "vllm", "--out", "{data}/x.json"], "--out"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_with_its_remedy_and_exit_code_2(
    arguments: list[str], remedy: str, model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    data = write_rows(tmp_path / "data.jsonl", 60, seed=4)
    filled = [word.format(data=data, model=model) for word in arguments]
    assert run(*filled) == 2
    shown = capfd.readouterr()
    (line,) = [line for line in shown.err.splitlines() if line.startswith("Error:")]
    assert remedy in line
    assert "Traceback" not in shown.err
    assert not Path("o").exists()


LIGHT = """
import json, sys
from sidelight.cli import app
from sidelight.errors import SidelightError
for words in json.loads(sys.argv[1]):
    try:
        app(words, standalone_mode=False)
    except SidelightError as error:
        print(error)
print(sorted({"sklearn", "torch", "transformers"} & sys.modules.keys()))
"""


def said_without_torch(*commands: list[str]) -> str:
    """What these commands print in a process of their own, which ends without torch."""
    program = [sys.executable, "-c", LIGHT, json.dumps(commands)]
    shown = subprocess.run(program, capture_output=True, text=True, check=True).stdout
    assert shown.endswith("\n[]\n")
    return shown


@pytest.fixture(scope="module")
def untrained(tiny: TransformersBackbone, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("untrained")
    return str(save_probe(untrained_probe(tiny, "intent", task=INTENT), folder))


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", ["train", "search", "eval", "redteam", "predict", "recalibrate", "parity"]
)
def test_a_wrong_file_or_column_is_told_before_the_imports_that_take_seconds(
    command: str, untrained: str, tmp_path: Path
):
    data = write_rows(tmp_path / "data.jsonl", 20, seed=9)
    (tmp_path / "torn.jsonl").write_text('{"text": ')
    begun = [command, *(["--out", "o"] if command in ("train", "search") else [untrained])]
    said = said_without_torch(
        [*begun, "--data", "nowhere.jsonl"],
        [*begun, "--data", data, "--text", "txt"],
        [*begun, "--data", str(tmp_path / "torn.jsonl")],
    )
    assert [*map(said.count, ("nowhere.jsonl", "--text", "torn.jsonl, line 1"))] == [1, 1, 1]


@pytest.mark.slow
def test_a_wrong_probe_or_rule_is_told_before_the_imports_that_take_seconds(
    untrained: str, tmp_path: Path
):
    data = write_rows(tmp_path / "data.jsonl", 20, seed=9)
    said = said_without_torch(
        ["predict", "nowhere", "hi"],
        ["recalibrate", untrained],
        ["recalibrate", "nowhere", "--data", data],
        ["recalibrate", untrained, "--threshold", "fpr=0.01"],
        ["recalibrate", untrained, "--data", data, "--label", "lable"],
    )
    wanted = ("holds no probe", "Name texts of", "Got the threshold", "no column 'lable'")
    assert [*map(said.count, wanted)] == [2, 1, 1, 1]


@pytest.mark.slow
def test_inspect_reads_the_manifest_alone(untrained: str):
    assert "multiclass: billing, refund, other" in said_without_torch(["inspect", untrained])


@pytest.mark.slow
def test_a_probe_is_replaced_by_force_alone(
    model: str, untrained: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "probe"
    shutil.copytree(untrained, out)
    data = write_rows(tmp_path / "data.jsonl", 40, seed=10)
    arguments = ["train", "--model", model, "--data", data, "--label", "toxic", *QUICKLY]
    arguments += ["--mechanism", "pooling", "--out", str(out)]
    assert run(*arguments) == 2
    assert capsys.readouterr().err == (
        f"Error: {out} holds a probe. Name another folder with --out, or replace it with --force.\n"
    )
    assert (out / WEIGHTS).read_bytes() == (Path(untrained) / WEIGHTS).read_bytes()
    assert run(*arguments, "--force") == 0
    assert load_probe(out).spec.name == "pooling"


def test_what_the_probe_will_flag_is_said_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    data = labelled_rows(tmp_path / "train.jsonl", ["cat", "dog", "dog"] * 4)
    assert run("train", "--data", data, "--out", str(tmp_path / "o"), "--model", data) == 2
    doubt, announced, error = capsys.readouterr().err.splitlines()
    assert "--positive dog" in doubt
    assert announced == "Read 12 texts. The probe will flag 'cat'."
    assert error.startswith(f"Error: Cannot load '{data}'")


def test_a_probe_of_several_classes_says_that_it_flags_nothing(
    model: str, untrained: str, capsys: pytest.CaptureFixture[str]
):
    assert run("predict", untrained, "--model", model, "a text") == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["flagged"] is False
    assert "'intent' flags nothing: with several classes," in shown.err
    assert run("inspect", untrained) == 0
    assert "flags        nothing: with several classes" in capsys.readouterr().out


def test_what_the_system_refuses_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def refuse(_directory: Path) -> None:
        raise OSError(28, "No space left on device", "/full/disk")

    monkeypatch.setattr("sidelight.manifest.read_manifest", refuse)
    assert run("inspect", "probe") == 2
    line = "Error: No space left on device (/full/disk). Check the path, its permissions, and"
    assert capsys.readouterr().err.startswith(line)


@pytest.mark.parametrize(("command", "is_resumed"), [("train", True), ("predict", False)])
def test_only_a_command_that_goes_on_says_so_when_it_is_stopped(
    command: str,
    is_resumed: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    def stop(*_arguments: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sidelight.cli.app", stop)
    assert run(command) == 130
    assert ("Run the same command again" in capsys.readouterr().err) == is_resumed


WITHOUT_EXTRAS = """
import sys

packages = sys.argv.pop(1).split(",")

class Missing:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in packages:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)

sys.meta_path.insert(0, Missing)
from sidelight.cli import main
main()
"""


SERVING = "fastapi,openai,uvicorn,prometheus_client,pydantic_settings"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("missing", "arguments", "code"),
    [
        (SERVING, ["--help"], 0),
        (SERVING, ["serve", "--probe", "p"], 2),
        (SERVING, ["demo"], 2),
        ("openai", ["serve"], 2),
    ],
)
def test_without_the_packages_of_a_server_its_commands_say_what_to_install(
    missing: str, arguments: list[str], code: int
):
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS, missing, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == code
    assert "pip install 'sidelight[serve]'" in (ended.stderr if code else ended.stdout)
    assert len(ended.stderr.splitlines()) == (1 if code else 0)


def test_without_the_laboratory_its_commands_say_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("sidelight.cli.entry_points", lambda **_: EntryPoints())
    assert run("reproduce", "toxicchat") == 2
    assert capsys.readouterr().err.endswith("Run `pip install sidelight-lab`.\n")
    assert run("--help") == 0
    assert "reproduce" not in capsys.readouterr().out


def labelled_rows(path: Path, labels: list[str | None]) -> str:
    rows = [{"text": f"text {i}", "label": label} for i, label in enumerate(labels)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_rows_without_a_label_are_left_out_of_validation_data_too(tmp_path: Path):
    given = _given(
        data=labelled_rows(tmp_path / "train.jsonl", ["yes", "no", "no", None]),
        validation=labelled_rows(tmp_path / "held.jsonl", ["no", None, "yes"]),
        missing_label="skip",
    )
    training, validation = given.load()
    assert validation is not None
    assert (len(training), len(validation)) == (3, 2)


def test_a_split_of_validation_data_is_not_that_of_training_data(tmp_path: Path):
    data = labelled_rows(tmp_path / "train.jsonl", ["yes", "no", "no"])
    # A file has no splits, which shows that the option arrives.
    with pytest.raises(SidelightError, match="split='held'"):
        _given(data=data, validation=data, validation_split="held").load()


def test_a_limit_keeps_what_is_doubtful_about_the_data(tmp_path: Path):
    data = labelled_rows(tmp_path / "train.jsonl", ["cat", "dog"] * 4)
    whole, _ = _given(data=data).load()
    assert whole.warnings
    limited, _ = _given(data=data, limit=4).load()
    assert limited.warnings == whole.warnings
    assert len(limited) == 4


def _given(**chosen: Any) -> TrainingInputs:
    parsed = train.make_context("train", ["--data", "d", "--out", "o"]).params
    names = [field.name for field in fields(TrainingInputs)]
    return TrainingInputs(**{**{name: parsed[name] for name in names}, **chosen})


def test_eval_leaves_out_rows_without_a_label(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rows = Path(write_rows(tmp_path / "test.jsonl", 40, seed=6)).read_text().splitlines()
    data = tmp_path / "gaps.jsonl"
    data.write_text("\n".join([*rows, json.dumps({"text": "unlabelled", "toxic": None})]))
    arguments = ["eval", str(trained), "--data", str(data), "--label", "toxic", "--json"]
    assert (
        run(*arguments, "--missing-label", "skip", "--out", str(tmp_path / "new" / "e.json")) == 0
    )
    told = capsys.readouterr()
    assert json.loads(told.out)["rows"] == 40
    assert "1 rows" in told.err
    assert json.loads((tmp_path / "new" / "e.json").read_text())["rows"] == 40


@pytest.mark.slow
def test_a_response_probe_learns_from_answers_to_long_prompts(
    model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    texts, labels = planted("binary", 60, seed=7)
    rows = [
        {"text": f"{number} long" + " long" * 30, "answer": text, "label": int(label)}
        for number, (text, label) in enumerate(zip(texts, labels, strict=True))
    ]
    data = tmp_path / "answers.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    arguments = ["train", "--model", model, "--data", str(data), "--response", "answer"]
    out = str(tmp_path / "probe")
    assert (
        run(*arguments, *QUICKLY, "--mechanism", "pooling", "--max-tokens", "64", "--out", out) == 0
    )
    assert "were cut to 64 tokens" in capfd.readouterr().err


@pytest.mark.slow
def test_the_command_that_training_names_next_judges_the_probe(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    texts, labels = planted("binary", 60, seed=7)
    rows = [
        {"user's turn": f"question {number}", "the answer": text, "is bad": int(label)}
        for number, (text, label) in enumerate(zip(texts, labels, strict=True))
    ]
    folder = tmp_path / "my probe"
    folder.mkdir()
    monkeypatch.chdir(folder)
    Path("TEST_FILE.jsonl").write_text("\n".join(map(json.dumps, rows)))
    columns = ["--text", "user's turn", "--response", "the answer", "--label", "is bad"]
    arguments = ["--model", model, "--data", "TEST_FILE.jsonl", "--mechanism", "pooling", *columns]
    assert run("train", *arguments, *QUICKLY, "--out", ".") == 0
    (hint,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Next: ")]
    _, program, *command = shlex.split(hint.replace("TEST_FILE", "TEST_FILE.jsonl"))
    assert program == "sidelight"
    assert run(*command, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["probe"], report["rows"]) == ("my probe", 60)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["serve", "predict", "train"])
def test_options_of_vllm_are_refused_elsewhere(
    command: str, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    data = write_rows(tmp_path / "train.jsonl", 40, seed=8)
    arguments = {
        "serve": ["--probe", str(trained)],
        "predict": [str(trained), "a text"],
        "train": ["--data", data, "--label", "toxic", "--out", str(tmp_path / "probe")],
    }[command]
    assert run(command, *arguments, "--engine-option", "max_num_seqs=3") != 0
    assert "give --engine vllm" in capfd.readouterr().err
