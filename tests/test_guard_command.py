"""``sidelight guard``: ready guards trained, measured and served as a set."""

import json
import re
import shutil
import tomllib
from pathlib import Path

import pytest
import torch

from sidelight import scoring
from sidelight.classifier import Classifier
from sidelight.cli.guard import guard
from sidelight.cli.runtime import Runtime
from sidelight.data.guards import draw_texts
from sidelight.policy.rules import (
    bound_rules,
    read_policy,
    require_rule_applies,
)
from sidelight.probes.artifact import load_probe
from sidelight.storage import only_writer
from sidelight.training import ready
from sidelight.training.tfidf import fit_tfidf
from worlds.data import brief_trainings, guard_texts, install_guards, write
from worlds.gguf import CONFIGS, needs_llama, write_gguf
from worlds.models import tiny_backbone, untrained_probe
from worlds.servers import cli, in_process

NAMES = ("letters", "replies", "shouts")


def results_of(folder: Path):
    return json.loads((folder / "figures.json").read_text())


@pytest.fixture(scope="module", autouse=True)
def quick(tmp_path_factory):
    """A package of guards, a cache of its own, little background traffic, and brief trainings."""
    folder = tmp_path_factory.mktemp("guards")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIDELIGHT_CACHE", str(folder / "cache"))
        install_guards(folder, patch, "command_guards")
        with brief_trainings(folder, patch):
            yield


@pytest.fixture(scope="module")
def words(model, tmp_path_factory) -> tuple[str, ...]:
    """The command that has trained all guards."""
    out = tmp_path_factory.mktemp("trained") / "guards"
    only = ("--only", ",".join(NAMES), "--rows", "40")
    words = ("guard", "--model", model, *only, "--out", str(out))
    assert cli(*words) == 0
    return words


def test_each_guard_has_probe_and_test_results(words):
    out = Path(words[-1])
    for name in NAMES:
        probe, results = load_probe(out / name), results_of(out / name)
        assert [*results] == ["unseen"]
        assert (probe.name, probe.version) == (name, results["unseen"]["probe"])
        assert probe.card.training.training.rows <= 40
        assert results["unseen"]["rows"] == 24
    assert load_probe(out / "replies").reads.side == "response"
    assert load_probe(out / "letters").spans is not None


def test_guards_do_not_read_last_layer(words):
    """llama.cpp does not compute it for every token."""
    for name in NAMES:
        assert not load_probe(Path(words[-1]) / name).projection().weight[-1].any()


def test_metrics_use_probe_threshold_and_include_tfidf_baseline(words, tiny):
    out = Path(words[-1])
    told = results_of(out / "shouts")["unseen"]
    probe, examples = load_probe(out / "shouts"), ready.load_guard("shouts", ":unseen")
    logits = Classifier(tiny, probe).logits(examples.items)
    flags = probe.calibration.apply(logits)[:, 0] >= probe.thresholds[0]
    positive = examples.labels == 1
    assert told["positives"] == positive.sum()
    assert (told["found"], told["false_positives"]) == (
        flags[positive].sum(),
        flags[~positive].sum(),
    )
    training = draw_texts(ready.load_guard("shouts"), 40)
    scores = fit_tfidf(training.full_texts, training.labels, training.task).logits(
        examples.full_texts
    )[:, 0]
    pairs = scores[positive][:, None] > scores[~positive]
    assert told["tfidf_auroc"] == pytest.approx(pairs.mean())
    low, high = told["auroc"]["ci"]
    assert low <= told["auroc"]["value"] <= high


def test_generated_policy_shadows_and_blocks_at_trained_thresholds_once_edited(words, tmp_path):
    out = Path(words[-1])
    probes = [load_probe(out / name) for name in NAMES]
    policy = read_policy(out / "policy.toml")
    rules = {**policy.input, **policy.output}
    assert {name: rule.mode for name, rule in rules.items()} == dict.fromkeys(NAMES, "shadow")
    assert [*policy.output] == ["replies"]
    text = (out / "policy.toml").read_text().replace('"shadow"', '"block"')
    (tmp_path / "blocking.toml").write_text(text.replace("# system_turns =", "system_turns ="))
    blocking = read_policy(tmp_path / "blocking.toml")
    for bound in bound_rules(blocking, probes):
        require_rule_applies(bound, probes)
        assert bound.is_blocking
        assert bound.thresholds == bound.probe.card.label_thresholds
    assert not blocking.refuses_system_turns


def test_locally_trained_guard_is_found_by_name(model, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("SIDELIGHT_CACHE", str(tmp_path / "cache"))
    named = ("--model", model, "guard:shouts")
    assert cli("predict", *named, "AN X") == 2
    error = capsys.readouterr().err
    assert f"has not been trained for {model}" in error
    assert re.search(r"about \d+ minutes on this CPU, [\d.]+ GB of disk", error)
    train = re.search(r"sidelight (guard --only shouts --model \S+)", error)[1]
    assert cli(*train.split()) == 0
    printed = capsys.readouterr().out.split("Next: ")[1].strip()
    policy = next((tmp_path / "cache/guards").glob("*/policy.toml"))
    serve = f"sidelight serve --model {model} --probe guard:shouts --policy {policy}"
    assert printed == serve
    assert cli("predict", *named, "AN X") == 0
    assert json.loads(capsys.readouterr().out)["probe"] == "shouts"


@needs_llama
@pytest.mark.slow
def test_guard_command_trains_and_serves_gguf_model(tmp_path, capsys):
    tiny = tiny_backbone(CONFIGS["llama"])
    file = str(write_gguf(tiny.model, tmp_path / "tiny.gguf", "llama", tiny.tokenizer))
    out = tmp_path / "guards"
    arguments = ("guard", "--model", file, "--only", "shouts", "--rows", "40")
    assert cli(*arguments, "--out", str(out), "--engine-option", "threads=1") == 0
    probe = load_probe(out / "shouts")
    assert probe.card.backbone.name == file
    assert [*results_of(out / "shouts")] == ["unseen"]
    told = capsys.readouterr().out
    assert [line for line in told.splitlines() if line.startswith("Finds ")]
    assert f"Next: sidelight serve --model {file} --probe" in told
    served = Runtime(model=None, dtype="auto", device="auto", engine="auto").load_engine([probe])
    with in_process(served, policy=read_policy(out / "policy.toml")) as http:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "an X"}], "max_tokens": 2}
        assert http.post("/v1/chat/completions", json=body).status_code == 200


def test_complete_guards_are_skipped_and_interrupted_tests_resume(words, ran, capsys):
    out = Path(words[-1])
    before = {name: results_of(out / name) for name in NAMES}
    versions = [load_probe(out / name).version for name in NAMES]
    policy = out / "policy.toml"
    policy.write_text(policy.read_text().replace("shadow", "flag"))
    # Killed between the probe and its figures; damaged; of an earlier form of the test.
    (out / "shouts/figures.json").unlink()
    (out / "letters/figures.json").write_bytes(b"[" * 9_999)
    changed = {"unseen": {**before["replies"]["unseen"], "texts_sha256": "another"}}
    (out / "replies/figures.json").write_text(json.dumps(changed))
    assert cli(*words) == 0
    told = capsys.readouterr().out
    assert told.count("is complete for these texts, options and model.") == 3
    assert "policy.toml exists and was left unchanged." in told
    assert "flag" in policy.read_text()
    # Only the missing tests were read.
    assert len(ran) == 24 * 3
    assert {name: results_of(out / name) for name in NAMES} == before
    assert [load_probe(out / name).version for name in NAMES] == versions


def test_finished_test_is_not_repeated_after_interrupt(model, tmp_path, monkeypatch, ran):
    home, again = (
        install_guards(tmp_path, monkeypatch, "two_guards", prefix="two_"),
        "[tests.again]",
    )
    card, measured = home / "two_shouts.toml", list[int]()
    card.write_text(f"{card.read_text()}\n{again}{card.read_text().partition('[tests.unseen]')[2]}")
    write(home / "two_shouts/test_again.jsonl.gz", guard_texts(20, 2))
    assess = scoring.assess

    def stop_at_second(backbone, probe, examples):
        if measured:
            raise KeyboardInterrupt
        measured.append(len(examples))
        return assess(backbone, probe, examples)

    out = tmp_path / "out"
    words = ("guard", "--model", model, "--only", "two_shouts", "--rows", "40", "--out", str(out))
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "assess", stop_at_second)
        assert cli(*words) == 130
    before = results_of(out / "two_shouts")
    assert [*before] == ["unseen"]
    ran.clear()
    assert cli(*words) == 0
    assert len(ran) == 20
    after = results_of(out / "two_shouts")
    assert [*after] == ["unseen", "again"]
    assert after["unseen"] == before["unseen"]


def test_changed_texts_or_options_replace_guard_only_with_force(words, tmp_path, capsys):
    user_file = str(write(tmp_path / "mine.jsonl", guard_texts(6, seed=3)))
    out = tmp_path / "guards"
    shutil.copytree(words[-1], out)
    before = load_probe(out / "shouts").version
    only = (*words[:3], "--only", "shouts", "--rows", "40", "--out", str(out))
    for changed in (("--data", user_file), ("--dtype", "bfloat16"), ("--threshold", "fpr=0.1")):
        assert cli(*only, *changed) == 2
        assert "shouts already contains a probe. Name another folder, or replace" in (
            capsys.readouterr().err
        )
    assert load_probe(out / "shouts").version == before
    assert cli(*only, "--data", user_file, "--force") == 0
    assert load_probe(out / "shouts").version != before
    assert results_of(out / "shouts")["unseen"]["probe"] == load_probe(out / "shouts").version


def test_cpu_training_draws_affordable_sample_of_texts(model, tiny, tmp_path, monkeypatch, capsys):
    texts = ready.load_guard("shouts")
    sizes = {item: len(tiny.encoder.encode(item.messages)) for item in texts.items}
    most = sum(sizes.values()) // 2
    monkeypatch.setattr(ready, "TOKENS_ON_CPU", most)
    drawn = ready.affordable(texts, tiny.encoder)
    assert most - max(sizes.values()) <= sum(sizes[item] for item in drawn.items) <= most
    assert drawn.items == draw_texts(texts, len(drawn)).items
    assert drawn.items != ready.affordable(texts, tiny.encoder, seed=1).items
    assert ready.affordable(texts, tiny.encoder, torch.device("cuda")) is texts
    assert cli("guard", "--model", model, "--only", "shouts", "--out", str(tmp_path / "out")) == 0
    told = f"{len(drawn)} texts of 60 (--rows 60 takes all)"
    assert told in capsys.readouterr().out
    assert load_probe(tmp_path / "out/shouts").card.training.training.rows == len(drawn)


def test_existing_policy_is_unchanged_and_missing_rules_are_named(words, tmp_path, capsys):
    out = tmp_path / "guards"
    shutil.copytree(words[-1], out)
    policy = out / "policy.toml"
    policy.write_text('[input.shouts]\nmode = "block"\n')
    assert cli(*words[:-1], str(out)) == 0
    captured = capsys.readouterr()
    assert "policy.toml exists and was left unchanged." in captured.out
    assert "no rule for letters, replies, so clients see the verdicts." in captured.err
    assert policy.read_text() == '[input.shouts]\nmode = "block"\n'


def test_invalid_policy_is_refused_before_training(model, tmp_path, capsys, ran):
    (tmp_path / "policy.toml").write_text("input =")
    assert cli("guard", "--model", model, "--only", "shouts", "--out", str(tmp_path)) == 2
    assert "is not TOML" in capsys.readouterr().err
    assert not ran


def test_concurrent_run_into_same_folder_is_refused(words, capsys):
    with only_writer(Path(words[-1])):
        assert cli(*words) == 2
    assert f"Another run is writing to {words[-1]}. Wait" in capsys.readouterr().err
    assert cli(*words) == 0


def test_results_count_test_texts_used_in_training(model, tmp_path, capsys):
    user_file, out = write(tmp_path / "mine.jsonl", guard_texts(24, 1)[:6]), tmp_path / "guards"
    only = ("--only", "shouts", "--rows", "40", "--data", str(user_file), "--out", str(out))
    assert cli("guard", "--model", model, *only) == 0
    assert "Other letters, 24 texts (6 of them were used in training" in capsys.readouterr().out
    assert results_of(out / "shouts")["unseen"]["trained"] == 6


def test_unreadable_test_is_refused_before_training(model, tmp_path, monkeypatch, capsys, ran):
    home = install_guards(tmp_path, monkeypatch, "torn_guards", prefix="torn_")
    (home / "torn_shouts/test_unseen.jsonl.gz").unlink()
    only = ("--only", "torn_letters,torn_shouts", "--out", str(tmp_path / "out"))
    assert cli("guard", "--model", model, *only) == 2
    assert "torn_shouts/test_unseen.jsonl.gz'" in capsys.readouterr().err
    assert not ran


@pytest.mark.parametrize(
    ("prefix", "named", "name", "error"),
    [
        ("odd ", "odd shouts", "odd shouts", "'odd shouts' is not a valid name"),
        ("y", "yshouts", "Policy.toml", "The guard 'Policy.toml' would need a folder"),
    ],
)
def test_invalid_guard_name_is_refused_before_training(
    prefix, named, name, error, model, tmp_path, monkeypatch, capsys, ran
):
    package = f"{prefix.strip()}_guards"
    home = install_guards(tmp_path, monkeypatch, package, prefix=prefix)
    names = tmp_path / f"{package}-1.0.dist-info/entry_points.txt"
    names.write_text(names.read_text().replace(named, name))
    for path in (home / f"{named}.toml", home / named):
        path.rename(str(path).replace(named, name))
    out = tmp_path / "out"
    assert cli("guard", "--model", model, "--only", name, "--out", str(out)) == 2
    assert error in capsys.readouterr().err
    assert not ran
    assert not out.exists()


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (None, "mine.jsonl, line 2. Label them, or remove them."),
        ("calm", "line 2: unknown label 'calm'. Known: other, shouting. Correct the row."),
    ],
)
def test_invalid_user_rows_are_refused_with_valid_remedy(
    label, message, model, tmp_path, capsys, ran
):
    user_file = write(tmp_path / "mine.jsonl", [*guard_texts(1), {"text": "Hello", "label": label}])
    words = ("--only", "shouts", "--data", str(user_file), "--out", str(tmp_path / "out"))
    assert cli("guard", "--model", model, *words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert {*re.findall("--[a-z]+", error)} <= {
        option for each in guard.params for option in each.opts
    }
    assert not ran


def test_generated_policy_handles_dotted_guard_names(tiny):
    rules = tomllib.loads(ready.shadow_policy([untrained_probe(tiny, "odd.one").card]))
    assert rules == {"input": {"odd.one": {"mode": "shadow"}}}


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("--only", "", "--out", "g"), "no guard ''"),
        (("--only", "shouts", "--data", "", "--out", "g"), "Cannot read 'guard:shouts,'"),
        (("--only", "shout", "--out", "g"), "no guard 'shout'. Did you mean 'shouts'?"),
        (("--only", "shouts", "--rows", "40"), "Name a folder for them with --out"),
        (
            ("--data", "mine.jsonl", "--out", "g"),
            "--data adapts a single guard. Name it with --only",
        ),
        (("--only", "shouts,letters", "--data", "m.jsonl", "--out", "g"), "--only: shouts or lett"),
        (("--only", "shouts", "--data", "absent.jsonl", "--out", "g"), "No file 'absent.jsonl'"),
        (("--out", "/proc/guards"), "Cannot write to /proc/guards"),
        (("--only", "shouts", "--model", "/absent", "--out", "g"), "/absent"),
        (("--only", "shouts", "--threshold", "fpr", "--out", "g"), "fpr"),
    ],
)
def test_invalid_options_are_refused_before_training(words, error, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli("guard", *words) == 2
    assert error in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_list_prints_guard_cards(capsys):
    assert cli("guard", "--list", "--only", "shouts,replies") == 0
    told = capsys.readouterr().out
    assert "shouts: shouts. The text has an X." in told
    assert "Reads the response." in told
    assert "Letters of other alphabets." in told
    assert "Tests: unseen" in told
