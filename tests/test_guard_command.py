"""``sidelight guard``: ready guards trained, measured and served as a set."""

import json
import re
import shutil
import tomllib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sidelight.artifact import load_probe, save_probe
from sidelight.cli.guard import guard
from sidelight.cli.runtime import Runtime
from sidelight.data.guards import draw_texts
from sidelight.policy.rules import (
    bound_rules,
    read_policy,
    require_policy_applies,
    require_rule_applies,
)
from sidelight.smollm2 import cache_root
from sidelight.states import cache
from sidelight.storage import only_writer
from sidelight.thresholds import ThresholdRule
from sidelight.training import background, ready
from worlds.data import brief_trainings, guard_texts, install_guards, write
from worlds.gguf import CONFIGS, needs_llama, write_gguf
from worlds.models import tiny_backbone, untrained_probe
from worlds.servers import cli, in_process

NAMES = ("letters", "replies", "shouts")
FIGURES = (
    b'{"letters": {"tests": {"unseen": {"title": "a", "rows": 24, "character_f1": {"value": 0.5}, '
    b'"f1": {"value": 0.5}}}}}'
)
UNREADABLE = "figures.json as figures of guards"


@pytest.fixture(scope="module", autouse=True)
def quick(tmp_path_factory):
    """A package of guards, a cache of its own, little ordinary traffic, and brief trainings."""
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


def test_each_guard_is_a_probe_with_figures_on_its_tests(words):
    out = Path(words[-1])
    figures = json.loads((out / "figures.json").read_text())
    assert tuple(figures) == NAMES
    for name in NAMES:
        probe, told = load_probe(out / name), figures[name]
        assert (probe.name, probe.version) == (name, told["version"])
        assert probe.record["training"]["rows"] <= 40
        assert told["tests"]["unseen"]["rows"] == 24
    assert load_probe(out / "replies").reads.side == "response"
    assert load_probe(out / "letters").spans is not None
    assert figures["shouts"]["traffic"][1] > 0


def test_tests_are_counted_at_the_threshold_of_the_probe_and_words_at_as_many_alarms(words, tiny):
    out = Path(words[-1])
    told = json.loads((out / "figures.json").read_text())["shouts"]["tests"]["unseen"]
    probe, examples = load_probe(out / "shouts"), ready.load_guard("shouts", ":unseen")
    logits = ready.Classifier(tiny, probe).logits(examples.items)
    flags = probe.calibration.apply(logits)[:, 0] >= probe.thresholds[0]
    positive = examples.labels == 1
    assert told["positives"] == positive.sum()
    assert (told["found"], told["false_alarms"]) == (flags[positive].sum(), flags[~positive].sum())
    training = draw_texts(ready.load_guard("shouts"), 40)
    scores = ready.fit_tfidf(training.whole_texts, training.labels, training.task).logits(
        examples.whole_texts
    )[:, 0]
    pairs = scores[positive][:, None] > scores[~positive]
    assert told["tfidf_auroc"] == pytest.approx(pairs.mean())
    low, high = told["auroc"]["ci"]
    assert low <= told["auroc"]["value"] <= high


def test_the_policy_observes_and_blocks_at_the_thresholds_of_training_as_it_says(words, tmp_path):
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
        assert bound.thresholds == bound.probe.label_thresholds
    assert not blocking.refuses_system_turns


def test_the_readme_guards_a_model_by_two_commands_of_which_one_prints_the_other(
    model, tmp_path, monkeypatch, capsys
):
    page = (Path(__file__).parents[1] / "README.md").read_text().replace("injection", "shouts")
    train, serve = re.findall(r"^\$ sidelight (guard .*|serve .*--policy .*)$", page, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    assert cli(*train.split(), "--model", model) == 0
    told, printed = capsys.readouterr().out.split("Next: ")
    assert "policy.toml observes: nothing is blocked, and /metrics needs a key" in told
    printed = printed.strip()
    assert printed == f"sidelight {serve}".replace("serve", f"serve --model {model}")


@needs_llama
@pytest.mark.slow
def test_a_gguf_file_is_guarded_by_its_name(tmp_path, capsys):
    tiny = tiny_backbone(CONFIGS["llama"])
    file = str(write_gguf(tiny.model, tmp_path / "tiny.gguf", "llama", tiny.tokenizer))
    out = tmp_path / "guards"
    given = ("guard", "--model", file, "--only", "shouts", "--rows", "40")
    assert cli(*given, "--out", str(out), "--engine-option", "threads=1") == 0
    probe = load_probe(out / "shouts")
    assert probe.fingerprint.name == file
    assert [*json.loads((out / "figures.json").read_text())] == ["shouts"]
    assert f"Next: sidelight serve --model {file} --probe" in capsys.readouterr().out
    served = Runtime(model=None, dtype="auto", device="auto", engine="auto").load_engine([probe])
    with in_process(served, policy=read_policy(out / "policy.toml")) as http:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "an X"}], "max_tokens": 2}
        assert http.post("/v1/chat/completions", json=body).status_code == 200


def test_what_is_complete_is_skipped_and_what_was_killed_goes_on(words, ran, capsys):
    out = Path(words[-1])
    whole = (out / "figures.json").read_text()
    versions = [load_probe(out / name).version for name in NAMES]
    policy = out / "policy.toml"
    policy.write_text(policy.read_text().replace("shadow", "flag"))
    # Killed between the probe and its figures.
    figures = json.loads(whole)
    del figures["shouts"]
    (out / "figures.json").write_text(json.dumps(figures))
    assert cli(*words) == 0
    told = capsys.readouterr().out
    assert told.count("is complete, of these texts, options and model.") == 3
    assert "policy.toml was there, and stays as it is." in told
    assert "flag" in policy.read_text()
    # Only the missing test was judged.
    assert len(ran) == 24
    assert json.loads((out / "figures.json").read_text()) == json.loads(whole)
    assert [load_probe(out / name).version for name in NAMES] == versions
    assert not [*cache_root().glob("guards-*")]


def test_guards_whose_tests_were_stopped_can_be_served(model, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ready, "measure_tests", stop)
    given = ("--model", model, "--only", "shouts,letters", "--rows", "40", "--out", str(tmp_path))
    assert cli("guard", *given) == 130
    policy = read_policy(tmp_path / "policy.toml")
    require_policy_applies(policy, [load_probe(tmp_path / name) for name in ("shouts", "letters")])
    assert [*policy.input] == ["shouts", "letters"]


def test_a_test_that_was_judged_before_a_kill_is_not_judged_again(
    model, tmp_path, monkeypatch, ran
):
    home, again = (
        install_guards(tmp_path, monkeypatch, "two_guards", prefix="two_"),
        "[tests.again]",
    )
    card, judged = home / "two_shouts.toml", list[int]()
    card.write_text(f"{card.read_text()}\n{again}{card.read_text().partition('[tests.unseen]')[2]}")
    write(home / "two_shouts/test_again.jsonl.gz", guard_texts(20, 2))
    assess = ready.assess

    def stop_at_second(classifier, examples):
        if judged:
            raise KeyboardInterrupt
        judged.append(len(examples))
        return assess(classifier, examples)

    out = tmp_path / "out"
    words = ("guard", "--model", model, "--only", "two_shouts", "--rows", "40", "--out", str(out))
    with monkeypatch.context() as patch:
        patch.setattr(ready, "assess", stop_at_second)
        assert cli(*words) == 130
    before = json.loads((out / "figures.json").read_text())["two_shouts"]["tests"]
    assert [*before] == ["unseen"]
    ran.clear()
    assert cli(*words) == 0
    assert len(ran) == 20
    after = json.loads((out / "figures.json").read_text())["two_shouts"]["tests"]
    assert [*after] == ["unseen", "again"]
    assert after["unseen"] == before["unseen"]


def test_other_texts_replace_a_guard_only_by_force(words, tmp_path, capsys):
    own = str(write(tmp_path / "mine.jsonl", guard_texts(6, seed=3)))
    out = tmp_path / "guards"
    shutil.copytree(words[-1], out)
    before = json.loads((out / "figures.json").read_text())
    adapted = (*words[:3], "--only", "shouts", "--rows", "40", "--data", own, "--out", str(out))
    assert cli(*adapted) == 2
    remedy = "Name another folder, or replace it with --force."
    assert (
        f"shouts holds another probe: there are differences in texts. {remedy}"
        in capsys.readouterr().err
    )
    assert cli(*adapted, "--force") == 0
    after = json.loads((out / "figures.json").read_text())
    assert load_probe(out / "shouts").version == after["shouts"]["version"]
    assert after["shouts"]["version"] != before["shouts"]["version"]
    assert (after["letters"], after["replies"]) == (before["letters"], before["replies"])
    # All guards of the folder are served.
    assert capsys.readouterr().out.split("Next: ")[1].count("--probe") == 3


def test_a_guard_whose_spans_were_corrected_is_not_taken_for_complete(words, tiny, tmp_path):
    own = [{"text": "ab 12", "spans": [{"start": 3, "end": 5, "label": "NUMBER"}]}]
    whole = ready.load_guard("letters", f",{write(tmp_path / 'mine.jsonl', own)}")
    own[0]["spans"][0]["start"] = 4
    corrected = ready.load_guard("letters", f",{write(tmp_path / 'mine.jsonl', own)}")
    letters = load_probe(Path(words[-1]) / "letters")
    record = {**letters.record, "training": {"given_sha256": whole.content_hash}}
    save_probe(replace(letters, record=record), tmp_path / "letters")
    rule = ThresholdRule.parse("f1")
    assert ready.differences(tmp_path / "letters", tiny, whole, rule) == []
    assert ready.differences(tmp_path / "letters", tiny, corrected, rule) == ["texts"]


def test_a_cpu_takes_what_it_reads_in_time_unless_rows_are_named(
    model, tiny, tmp_path, monkeypatch, capsys
):
    whole = ready.load_guard("shouts")
    sizes = {item: len(tiny.encoder.encode(item.conversation)) for item in whole.items}
    most = sum(sizes.values()) // 2
    monkeypatch.setattr(ready, "TOKENS_ON_CPU", most)
    drawn = ready.affordable(tiny, whole)
    assert most - max(sizes.values()) <= sum(sizes[item] for item in drawn.items) <= most
    assert drawn.items == draw_texts(whole, len(drawn)).items
    assert cli("guard", "--model", model, "--only", "shouts", "--out", str(tmp_path / "out")) == 0
    told = f"shouts (1 of 1): {len(drawn)} of 60 (--rows 60 takes all) texts"
    assert told in capsys.readouterr().out
    assert load_probe(tmp_path / "out/shouts").record["training"]["rows"] == len(drawn)
    monkeypatch.setattr(type(tiny), "device", torch.device("meta"))
    assert ready.affordable(tiny, whole) is whole


def test_states_of_ordinary_traffic_are_computed_once_and_those_of_texts_do_not_stay(
    model, tiny, tmp_path, monkeypatch
):
    written: list[str] = []
    write_tensors = cache.write_tensors

    def counted(tensors, path):
        written.append(path.stem)
        write_tensors(tensors, path)

    monkeypatch.setattr(cache, "write_tensors", counted)
    install_guards(tmp_path, monkeypatch, "more_guards", prefix="more_")
    only = ("--only", "shouts,more_shouts", "--rows", "40", "--out", str(tmp_path / "out"))
    assert cli("guard", "--model", model, *only) == 0
    shared = ready.background_states(tiny, background.load_background("packaged"))
    times = Counter(written)
    assert {times[name] for name in shared if name in times} == {1}
    # The two guards have the same texts.
    assert sum(times[name] == 2 for name in times) >= 40


def test_a_policy_that_was_there_is_compared_with_what_would_be_served(words, tmp_path, capsys):
    out = tmp_path / "guards"
    shutil.copytree(words[-1], out)
    policy, again = out / "policy.toml", (*words[:-1], str(out))
    policy.write_text('[input.other]\nmode = "block"\n')
    assert cli(*again) == 0
    said = capsys.readouterr()
    assert "policy.toml was there, and stays as it is." in said.out
    assert "but no probe 'other' judges it" in said.err
    policy.write_text('[input.shouts]\nmode = "block"\n')
    assert cli(*again) == 0
    assert "no rule for letters, replies: clients see their verdicts." in capsys.readouterr().err
    assert policy.read_text() == '[input.shouts]\nmode = "block"\n'
    policy.write_text("input =")
    assert cli(*again) == 0
    assert "is not TOML" in capsys.readouterr().err


def test_a_probe_of_other_options_is_not_taken_for_a_complete_guard(words, tiny, tmp_path, capsys):
    out = tmp_path / "guards"
    shutil.copytree(words[-1], out)
    again = (*words[:-1], str(out))
    assert cli(*again, "--dtype", "bfloat16") == 2
    remedy = "Name another folder, or replace it with --force."
    assert (
        f"letters holds another probe: there are differences in dtype. {remedy}"
        in capsys.readouterr().err
    )
    probe = load_probe(out / "shouts")
    gate = untrained_probe(tiny, "shouts", task=probe.task, mechanism="gate")
    save_probe(replace(gate, record=probe.record), out / "shouts")
    assert cli(*again) == 2
    assert (
        f"shouts holds another probe: there are differences in mechanism. {remedy}"
        in capsys.readouterr().err
    )


def test_of_two_runs_into_one_folder_the_second_is_refused(words, capsys):
    with only_writer(Path(words[-1])):
        assert cli(*words) == 2
    assert f"Another run writes to {words[-1]}. Wait for it" in capsys.readouterr().err
    assert cli(*words) == 0


def test_texts_of_a_test_that_trained_the_guard_are_counted_beside_its_figures(
    model, tmp_path, capsys
):
    own, out = write(tmp_path / "mine.jsonl", guard_texts(24, 1)[:6]), tmp_path / "guards"
    only = ("--only", "shouts", "--rows", "40", "--data", str(own), "--out", str(out))
    assert cli("guard", "--model", model, *only) == 0
    assert "Other letters, 24 texts (6 of them trained it" in capsys.readouterr().out
    figures = json.loads((out / "figures.json").read_text())
    assert figures["shouts"]["tests"]["unseen"]["trained"] == 6


def test_a_test_that_cannot_be_read_is_refused_before_training(
    model, tmp_path, monkeypatch, capsys, ran
):
    home = install_guards(tmp_path, monkeypatch, "torn_guards", prefix="torn_")
    (home / "torn_shouts/test_unseen.jsonl.gz").unlink()
    only = ("--only", "torn_letters,torn_shouts", "--out", str(tmp_path / "out"))
    assert cli("guard", "--model", model, *only) == 2
    assert "torn_shouts/test_unseen.jsonl.gz'" in capsys.readouterr().err
    assert not ran


def test_an_earlier_guard_that_is_damaged_is_refused_before_training(
    words, model, tmp_path, capsys, ran
):
    out = tmp_path / "guards"
    shutil.copytree(words[-1], out)
    (out / "letters/probe.safetensors").write_bytes(b"")
    shutil.rmtree(out / "shouts")
    assert cli("guard", "--model", model, "--only", "shouts", "--out", str(out)) == 2
    assert "letters/probe.safetensors" in capsys.readouterr().err
    assert not ran


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        *(
            ("figures.json", content, UNREADABLE)
            for content in (b"{", b"[]", b"\xff", b"[" * 9_999)
        ),
        ("figures.json", b'{"letters": 3}', UNREADABLE),
        # Of another version, or edited.
        ("figures.json", b'{"letters": {"version": "1"}}', UNREADABLE),
        ("figures.json", b'{"letters": {"tests": {"unseen": {"title": "a"}}}}', UNREADABLE),
        ("figures.json", FIGURES.replace(b"0.5", b'"half"'), UNREADABLE),
        ("figures.json", FIGURES.replace(b'"f1"', b'"positives"'), UNREADABLE),
        ("shouts", b"", "shouts"),
    ],
)
def test_what_stands_in_the_way_of_results_is_refused_before_training(
    name, content, said, model, tmp_path, capsys, ran
):
    (tmp_path / name).write_bytes(content)
    assert cli("guard", "--model", model, "--only", "shouts", "--out", str(tmp_path)) == 2
    (*_, error) = capsys.readouterr().err.splitlines()
    assert error.startswith("Error: ")
    assert said in error
    assert not ran


@pytest.mark.parametrize(
    ("prefix", "named", "name", "said"),
    [
        ("odd ", "odd shouts", "odd shouts", "A probe cannot be called 'odd shouts'"),
        ("x", "xshouts", "figures.json", "A guard called 'figures.json' has no room in"),
        ("y", "yshouts", "Policy.toml", "A guard called 'Policy.toml' has no room in"),
    ],
)
def test_a_guard_whose_name_no_folder_of_it_can_have_is_refused_before_training(
    prefix, named, name, said, model, tmp_path, monkeypatch, capsys, ran
):
    package = f"{prefix.strip()}_guards"
    home = install_guards(tmp_path, monkeypatch, package, prefix=prefix)
    names = tmp_path / f"{package}-1.0.dist-info/entry_points.txt"
    names.write_text(names.read_text().replace(named, name))
    for path in (home / f"{named}.toml", home / named):
        path.rename(str(path).replace(named, name))
    out = tmp_path / "out"
    assert cli("guard", "--model", model, "--only", name, "--out", str(out)) == 2
    assert said in capsys.readouterr().err
    assert not ran
    assert not out.exists()


@pytest.mark.parametrize(
    ("label", "said"),
    [
        (None, "mine.jsonl, line 2. Label them, or remove them."),
        ("calm", "line 2: unknown label 'calm'. Known: other, shouting. Correct the row."),
    ],
)
def test_rows_of_ones_own_are_refused_with_a_remedy_that_the_command_has(
    label, said, model, tmp_path, capsys, ran
):
    own = write(tmp_path / "mine.jsonl", [*guard_texts(1), {"text": "Hello", "label": label}])
    words = ("--only", "shouts", "--data", str(own), "--out", str(tmp_path / "out"))
    assert cli("guard", "--model", model, *words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert {*re.findall("--[a-z]+", error)} <= {
        option for each in guard.params for option in each.opts
    }
    assert not ran


def test_a_guard_is_named_in_the_policy_whatever_its_name(tiny):
    rules = tomllib.loads(ready.observing_policy([untrained_probe(tiny, "odd.one")]))
    assert rules == {"input": {"odd.one": {"mode": "shadow"}}}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--only", "", "--out", "g"), "no guard ''"),
        (("--only", "shouts", "--data", "", "--out", "g"), "Cannot read 'guard:shouts,'"),
        (("--only", "shout", "--out", "g"), "no guard 'shout'. Did you mean 'shouts'?"),
        ((), "Name a folder for the guards with --out"),
        (("--data", "mine.jsonl", "--out", "g"), "--data adapts one guard. Name it: --only"),
        (("--only", "shouts,letters", "--data", "m.jsonl", "--out", "g"), "--only shouts or lett"),
        (("--only", "shouts", "--data", "absent.jsonl", "--out", "g"), "No file 'absent.jsonl'"),
        (("--out", "/proc/guards"), "Cannot write to /proc/guards"),
        (("--only", "shouts", "--model", "/absent", "--out", "g"), "/absent"),
        (("--only", "shouts", "--threshold", "fpr", "--out", "g"), "fpr"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_trained(
    words, said, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    assert cli("guard", *words) == 2
    assert said in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_cards_are_printed(capsys):
    assert cli("guard", "--list", "--only", "shouts,replies") == 0
    told = capsys.readouterr().out
    assert "shouts: shouts. The text has an X." in told
    assert "Reads the response." in told
    assert "Letters of other alphabets." in told
    assert "Tests: unseen" in told
