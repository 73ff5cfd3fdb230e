"""``guard:NAME`` in place of a probe's folder: what it finds, and what it refuses in one line."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import wordings
from sidelight import load
from sidelight.data.guards import guard_names, guard_of
from sidelight.engines.transformers.engine import TransformersEngine
from sidelight.errors import SidelightError
from sidelight.guards import UntrainedGuardError, probe_folder, probe_folders, trained_guards
from sidelight.models.conversation import Reads
from sidelight.models.fingerprint import ACCEPTED, hash_of
from sidelight.models.smollm2 import EMBEDDED_NAME
from sidelight.probes.artifact import load_probe, save_probe
from sidelight.probes.card import PROBE, read_card
from worlds.data import guard_texts, install_guards, write
from worlds.models import untrained_probe
from worlds.servers import MODEL, cli, in_process

ADMIN = {"Authorization": "Bearer admin-key"}


@pytest.fixture(scope="module", autouse=True)
def package(tiny, tmp_path_factory) -> Path:
    """A package whose guard ``shouts`` is trained, and a machine that has trained ``replies``."""
    folder = tmp_path_factory.mktemp("guards")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIDELIGHT_CACHE", str(folder / "cache"))
        patch.delenv(ACCEPTED, raising=False)
        home = install_guards(folder, patch, "named_guards")
        save_probe(untrained_probe(tiny, "shouts"), home / "shouts")
        replies = untrained_probe(tiny, "replies", reads=Reads("response"))
        save_probe(replies, trained_guards(tiny.fingerprint.digest) / "replies@1")
        yield home


@pytest.fixture
def digest(tiny):
    return lambda: tiny.fingerprint.digest


@pytest.fixture
def data(tmp_path) -> str:
    return str(write(tmp_path / "texts.jsonl", guard_texts(4)))


def refused(capsys, *words: str) -> str:
    """The one line that a command ends with; its progress is in others."""
    assert cli(*words) == 2, words
    error = capsys.readouterr().err
    assert "Traceback" not in error
    lines = [line for line in error.splitlines() if not line.endswith(" ...")]
    assert len(lines) == 1, error
    return lines[0]


def test_guard_name_resolves_to_packaged_or_locally_trained_probe(tiny, package, digest):
    local = trained_guards(tiny.fingerprint.digest) / "replies@1"
    assert probe_folder("guard:shouts", MODEL, digest) == package / "shouts"
    assert probe_folder("guard:shouts@1", MODEL, digest) == package / "shouts"
    assert probe_folder("guard:replies", MODEL, digest) == local
    both = [package / "shouts", local]
    for named in ("guard:shouts,replies", "guard:shouts, guard:replies"):
        assert probe_folders([named], MODEL, digest) == both
    assert probe_folders(["a", "guard:replies"], MODEL, digest) == [Path("a"), local]


def test_guard_name_without_model_resolves_for_embedded_model(tiny, package, monkeypatch, tmp_path):
    monkeypatch.setenv("SIDELIGHT_CACHE", str(tmp_path))
    assert probe_folder("guard:shouts") == package / "shouts"
    another_folder = save_probe(
        untrained_probe(tiny, "letters"), trained_guards("another") / "letters@1"
    )
    with pytest.raises(
        UntrainedGuardError,
        match=wordings.UNTRAINED_GUARD.format(name="letters", model=EMBEDDED_NAME),
    ):
        probe_folder("guard:letters")
    probe = load_probe(another_folder)
    embedded = probe.changed(backbone=replace(probe.card.backbone, name=EMBEDDED_NAME))
    folder = save_probe(embedded, trained_guards("embedded") / "letters@1")
    assert probe_folder("guard:letters") == folder


def test_accepted_model_copy_uses_guards_of_original_model(tiny, package, monkeypatch):
    def copy() -> str:
        return "quantised"

    with pytest.raises(UntrainedGuardError):
        probe_folders(["guard:shouts,replies"], "copy", copy)
    monkeypatch.setenv(ACCEPTED, hash_of(tiny.fingerprint.digest, "quantised"))
    local = trained_guards(tiny.fingerprint.digest) / "replies@1"
    assert probe_folders(["guard:shouts,replies"], "copy", copy) == [package / "shouts", local]


def test_locally_trained_version_still_resolves_after_package_upgrade(
    tiny, monkeypatch, tmp_path, digest
):
    monkeypatch.setenv("SIDELIGHT_CACHE", str(tmp_path / "cache"))
    home = install_guards(tmp_path, monkeypatch, "newer_guards", prefix="newer_")
    card = home / "newer_shouts.toml"
    card.write_text(card.read_text().replace("noise =", "version = 2\nnoise ="))
    older = trained_guards(tiny.fingerprint.digest) / "newer_shouts@1"
    save_probe(untrained_probe(tiny, "newer_shouts"), older)
    assert probe_folder("guard:newer_shouts@1", MODEL, digest) == older
    with pytest.raises(UntrainedGuardError):
        probe_folder("guard:newer_shouts", MODEL, digest)


def test_untrained_guard_error_lists_every_missing_guard_in_training_command(digest):
    missing = [name for name in guard_names() if name not in ("shouts", "replies")]
    with pytest.raises(UntrainedGuardError) as refusal:
        probe_folders(["guard:all"], "other/model", digest)
    assert refusal.value.guards == tuple(missing)
    command = f"sidelight guard --only {','.join(missing)} --model other/model"
    assert str(refusal.value).endswith(f"Train them with: {command}")


@pytest.mark.parametrize(
    ("named", "error"),
    [
        ("guard:", "Cannot read 'guard:' as the name of a probe. Write guard:NAME"),
        ("guard:shouts,,replies", "Cannot read 'guard:shouts,,replies'"),
        ("guard:shouts@", "Cannot read 'guard:shouts@'"),
        ("guard:shouts@x", "Cannot read 'guard:shouts@x'"),
        ("guard:shouts@" + "9" * 5000, "Cannot read"),
        ("guard:shouts:unseen", "Cannot read 'guard:shouts:unseen'"),
        ("guard:shout", "There is no guard 'shout'. Did you mean 'shouts'?"),
        ("guard:../shouts", "There is no guard '../shouts'."),
        ("guard:shouts,mine.jsonl", "There is no guard 'mine.jsonl'."),
        ("guard:all,shouts", "There is no guard 'all'."),
        ("guard:shouts@2", "the package has version 1. Install the release that has 2, or leave"),
        ("guard:shouts,replies", "Name one of them here: shouts, replies."),
        ("guard:all", "Name one of them here: "),
    ],
)
def test_invalid_guard_name_error_is_one_line_with_remedy(named, error, model, capsys):
    assert error in refused(capsys, "predict", "--model", model, named, "AN X")


def test_serve_rejects_duplicate_guards(model, capsys, tmp_path):
    serve = ("serve", "--model", model)
    for words in (
        ("--probe", "guard:shouts,shouts"),
        ("--probe", "guard:shouts", "--probe", "guard:replies,guard:shouts@1"),
    ):
        error = refused(capsys, *serve, *words)
        assert error.endswith("The guard 'shouts' is named twice. Name it once.")
    config = tmp_path / "server.toml"
    config.write_text('probe = ["guard:replies", "guard:replies"]')
    assert "'replies' is named twice" in refused(capsys, *serve, "--config", str(config))


def test_config_file_with_untrained_guard_reports_training_requirements(model, capsys, tmp_path):
    config = tmp_path / "server.toml"
    config.write_text('probe = ["guard:shouts,letters"]')
    error = refused(capsys, "serve", "--model", model, "--config", str(config))
    assert f"The guard 'letters' has not been trained for {model}." in error
    assert "GB of disk" in error


@pytest.mark.parametrize(
    "words",
    [
        ("predict", "guard:shout", "AN X"),
        ("eval", "guard:shout", "--data", "DATA"),
        ("inspect", "guard:shout"),
        ("recalibrate", "guard:shout", "--data", "DATA", "--out", "OUT"),
        ("parity", "guard:shout", "--data", "DATA"),
        ("serve", "--probe", "guard:shout"),
        ("label", "DATA", "--out", "OUT", "--probe", "guard:shout"),
        ("anatomy", "guard:shout", "--data", "DATA", "--out", "OUT"),
        ("redteam", "guard:shout", "--data", "DATA"),
        ("bench", "everyday", "guard:shout", "--data", "DATA"),
        ("bench", "tools", "guard:shout", "--data", "DATA"),
        ("policy", "check", "POLICY", "--probe", "guard:shout"),
    ],
    ids=lambda words: words[0],
)
def test_every_probe_command_accepts_guard_names(words, data, tmp_path, capsys):
    (tmp_path / "policy.toml").write_text("")
    places = {"DATA": data, "OUT": str(tmp_path / "out"), "POLICY": str(tmp_path / "policy.toml")}
    assert "There is no guard 'shout'. Did you mean 'shouts'?" in refused(
        capsys, *(places.get(word, word) for word in words)
    )


def test_predict_and_inspect_resolve_guard_names(model, package, capsys):
    version = read_card(package / "shouts").version
    assert cli("predict", "--model", model, "guard:shouts", "AN X") == 0
    verdict = json.loads(capsys.readouterr().out)
    assert (verdict["probe"], verdict["version"]) == ("shouts", version)
    assert cli("inspect", "guard:shouts", "--json") == 0
    assert json.loads(capsys.readouterr().out)["name"] == "shouts"


def test_load_resolves_guard_for_its_model(tiny, model, package):
    version = read_card(package / "shouts").version
    for named_model in (tiny, model):
        (verdict,) = load("guard:shouts", model=named_model).predict(["AN X"])
        assert verdict.version == verdict.to_dict()["version"] == version
    with pytest.raises(SidelightError, match=wordings.NAME_ONE):
        load("guard:shouts,replies", model=tiny)


def test_parity_resolves_guards_for_named_model(model, data, capsys):
    words = ("parity", "--data", data, "--engines", "transformers", "--model", model)
    assert cli(*words, "guard:shouts") == 0
    assert "shouts" in capsys.readouterr().out
    assert "The guard 'letters' has not been trained for " + model in refused(
        capsys, *words, "guard:letters"
    )


def test_recalibrate_requires_out_folder_for_guard(model, data, capsys):
    error = refused(capsys, "recalibrate", "guard:shouts", "--data", data)
    assert error.endswith("Name a folder for the recalibrated guard:shouts with --out.")


def test_folder_named_like_guard_requires_absolute_path(
    tiny, package, model, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    folder = save_probe(untrained_probe(tiny, "own"), tmp_path / "guard:own")
    for named in ("guard:own", "./guard:own"):
        error = refused(capsys, "inspect", named)
        assert error.endswith(f"If you mean the folder 'guard:own', write {folder}.")
    assert cli("inspect", str(folder)) == 0
    # It does not stand in for a guard.
    shutil.copytree(folder, tmp_path / "guard:shouts")
    assert probe_folder("guard:shouts") == package / "shouts"


@pytest.mark.parametrize("damage", ["torn", "foreign"])
def test_damaged_packaged_probe_error_suggests_reinstalling_package(damage, package, model, capsys):
    path = package / "shouts" / PROBE
    sound = path.read_bytes()
    path.write_bytes(sound[:40] if damage == "torn" else b"\x02" + b"\x00" * 7 + b"{}")
    try:
        error = refused(capsys, "predict", "--model", model, "guard:shouts", "AN X")
    finally:
        path.write_bytes(sound)
    assert str(path.parent) in error
    assert error.endswith("packaged probe of the guard 'shouts'; reinstall its package.")


def test_train_rejects_data_from_two_guards(model, tmp_path, capsys):
    for named in ("guard:shouts,guard:letters", "guard:shouts, guard:letters"):
        words = ("--data", named, "--model", model, "--out", str(tmp_path / "out"))
        assert "names two guards, but data belongs to one" in refused(capsys, "train", *words)
        with pytest.raises(SidelightError, match=wordings.TWO_GUARDS):
            guard_of(named)


def test_admin_route_replaces_probes_with_guards(tiny, package):
    first = untrained_probe(tiny, "first")
    with in_process(TransformersEngine(tiny, [first]), admin_key="admin-key") as http:

        def put(*named: str):
            return http.put("/admin/probes", json={"probe": named}, headers=ADMIN)

        def served() -> dict[str, str]:
            lines = http.get("/metrics", headers=ADMIN).text.splitlines()
            info = [line for line in lines if line.startswith("sidelight_probe_info{")]
            assert all(line.endswith(" 1.0") for line in info)
            pairs = (line.split('"')[1::2] for line in info)
            return dict(pairs)

        assert served() == {"first": ""}
        for wrong, error in (
            (("guard:shout",), "Did you mean 'shouts'?"),
            (("guard:shouts", "guard:shouts"), "named twice"),
            (("guard:letters",), "sidelight guard --only letters"),
        ):
            answer = put(*wrong)
            assert answer.status_code == 400
            assert error in answer.json()["error"]["message"]
        assert served() == {"first": ""}
        assert put("guard:shouts,replies").status_code == 200
        local = trained_guards(tiny.fingerprint.digest) / "replies@1"
        wanted = {folder.name.split("@")[0]: folder for folder in (package / "shouts", local)}
        assert served() == {name: read_card(path).version for name, path in wanted.items()}


def test_vllm_settings_accept_guard_names_among_folders(monkeypatch, model, package):
    settings = pytest.importorskip("sidelight_vllm.settings")
    named = ["guard:shouts", "/probes/guard", "guard:replies@1,shouts", "safeguard", "guard:pii"]
    monkeypatch.setenv(settings.ENVIRONMENT, os.pathsep.join(named))
    assert settings.named_folders({}) == tuple(named)
    monkeypatch.setenv(settings.ENVIRONMENT, os.pathsep.join(["", "guard:shouts", ""]))
    assert settings.named_folders({}) == ("guard:shouts",)
    assert settings.found_folders(model, ["guard:shouts"]) == (str(package / "shouts"),)
    with pytest.raises(UntrainedGuardError, match="--only letters --model"):
        settings.found_folders(model, ["guard:letters"])
