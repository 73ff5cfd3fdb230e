"""Sharing artifacts."""

import fcntl
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
from huggingface_hub import ModelCard

from sidelight.errors import SidelightError
from sidelight.probes.artifact import load_probe, save_probe
from sidelight.probes.hub import pull, push
from sidelight.probes.manifest import CARD, PROBE
from sidelight.storage import write_text
from worlds.models import broken, untrained_probe


@pytest.fixture
def artifact(tiny, tmp_path):
    return save_probe(untrained_probe(tiny, "toxicity"), tmp_path / "mine")


def test_what_is_pulled_is_what_was_pushed_and_its_card_says_so(artifact, tmp_path):
    push(artifact, tmp_path / "shared")
    pulled = load_probe(pull(tmp_path / "shared", tmp_path / "theirs"))
    own = load_probe(artifact)
    assert pulled.fingerprint == own.fingerprint
    for key, value in own.mechanism.state_dict().items():
        assert value.equal(pulled.mechanism.state_dict()[key])
    card = ModelCard.load(tmp_path / "shared" / "README.md")
    assert card.data.library_name == "sidelight"
    for fact in ("toxicity", "fine, toxic", "readout", own.fingerprint.name):
        assert fact in card.text


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


@pytest.fixture
def uploads(monkeypatch):
    """The files of each upload to the hub; what was uploaded last is what it gives."""
    commits = []

    def upload(*_, folder_path, **__):
        commits.append(contents(Path(folder_path)))
        return "https://hub/me/mine"

    def download(*_, local_dir, **__):
        for path, content in commits[-1].items():
            (Path(local_dir) / path).write_bytes(content)

    monkeypatch.setattr("sidelight.probes.hub.HfApi.create_repo", Mock())
    monkeypatch.setattr("sidelight.probes.hub.HfApi.upload_folder", upload)
    monkeypatch.setattr("sidelight.probes.hub.snapshot_download", download)
    return commits


def test_the_hub_gets_the_artifact_with_a_card_and_gives_the_same_version(
    artifact, tmp_path, uploads
):
    write_text(artifact / "runs" / "a-run" / "secret.txt", "mine")
    before = contents(artifact)
    assert push(artifact, "me/mine") == "https://hub/me/mine"
    assert contents(artifact) == before
    assert {str(path) for path in uploads[0]} == {PROBE, CARD}
    pulled = pull("me/mine", tmp_path / "theirs")
    assert contents(pulled) == uploads[0]
    assert load_probe(pulled).version == load_probe(artifact).version
    # A card that somebody has written for this version is pushed as it is.
    write_text(artifact / CARD, f"Version {load_probe(artifact).version}, best on chats.")
    push(artifact, "me/mine")
    assert uploads[1][Path(CARD)] == (artifact / CARD).read_bytes()


@pytest.fixture
def trained_before(tiny, tmp_path):
    """A folder as train and push leave it, with a file of the user's own."""
    folder = save_probe(untrained_probe(tiny, "older", mechanism="gate"), tmp_path / "older")
    write_text(folder / CARD, "The older one.")
    write_text(folder / "notes.txt", "mine")
    return folder


@pytest.mark.parametrize("door", ["push", "pull", "pull from the hub"])
def test_another_probe_is_replaced_by_force_alone_and_as_a_whole(
    artifact, trained_before, door, uploads
):
    push(artifact, "me/mine")
    transfer = {
        "push": partial(push, artifact, trained_before),
        "pull": partial(pull, artifact, trained_before),
        "pull from the hub": partial(pull, "me/mine", trained_before),
    }[door]
    before = contents(trained_before)
    with pytest.raises(SidelightError, match=r"older holds a probe.*--force"):
        transfer()
    assert contents(trained_before) == before
    transfer(force=True)
    # Its card does not stay beside the weights of another.
    assert {str(path) for path in contents(trained_before)} == {PROBE, CARD, "notes.txt"}
    assert load_probe(trained_before).version == load_probe(artifact).version
    assert load_probe(artifact).version in (trained_before / CARD).read_text()


@pytest.mark.parametrize("damage", ["torn", "without verdicts", "no probe"])
def test_what_cannot_be_pulled_leaves_the_old_probe_in_its_place(
    tiny, artifact, trained_before, damage, uploads
):
    if damage == "without verdicts":
        save_probe(broken(load_probe(artifact)), artifact)
    uploads.append(contents(artifact))
    if damage == "torn":
        uploads[-1][Path(PROBE)] = uploads[-1][Path(PROBE)][:-9]
    elif damage == "no probe":
        uploads[-1].clear()
    before = contents(trained_before)
    with pytest.raises(SidelightError, match="me/mine"):
        pull("me/mine", trained_before, force=True)
    assert contents(trained_before) == before


def test_of_two_pushes_at_once_the_later_one_replaces_nothing_without_force(
    artifact, tiny, tmp_path, monkeypatch
):
    other = save_probe(untrained_probe(tiny, "other"), tmp_path / "other")
    shared, flock = tmp_path / "shared", fcntl.flock

    def wait(*arguments):
        """Until the other push is done."""
        monkeypatch.setattr(fcntl, "flock", flock)
        push(other, shared)
        flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", wait)
    with pytest.raises(SidelightError, match=r"shared holds a probe\."):
        push(artifact, shared)
    assert load_probe(shared).name == "other"


def test_a_readme_is_replaced_by_force_alone(artifact, tmp_path):
    write_text(tmp_path / "project" / CARD, "My project.")
    for share in (partial(push, artifact), partial(pull, artifact)):
        with pytest.raises(SidelightError, match=rf"replace .*{CARD}.*--force"):
            share(tmp_path / "project")
    assert contents(tmp_path / "project") == {Path(CARD): b"My project."}
    push(artifact, tmp_path / "project", force=True)
    assert "My project." not in (tmp_path / "project" / CARD).read_text()


def test_a_probe_is_not_copied_onto_itself(artifact):
    before = contents(artifact)
    for share in (push, pull):
        with pytest.raises(SidelightError, match="the probe itself"):
            share(artifact, artifact, force=True)
    assert contents(artifact) == before


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("repository", ["no-one/nothing", "not a name"])
def test_a_hub_that_cannot_answer_is_one_clear_error(artifact, tmp_path, repository):
    for share, places in (
        (pull, (repository, tmp_path / "theirs")),
        (push, (artifact, repository)),
    ):
        with pytest.raises(SidelightError, match=f"'{repository}'.*hf auth login"):
            share(*places)


@pytest.mark.parametrize("client", ["httpx", "httpx2"])
def test_a_hub_that_cannot_be_reached_is_one_line(artifact, tmp_path, monkeypatch, client):
    unreachable = Mock(side_effect=pytest.importorskip(client).ConnectError("no route"))
    monkeypatch.setattr("sidelight.probes.hub.HfApi.create_repo", unreachable)
    monkeypatch.setattr("sidelight.probes.hub.snapshot_download", unreachable)
    said = r"ConnectError: no route"
    with pytest.raises(SidelightError, match=rf"push to 'me/mine' \({said}\).*folder write \./"):
        push(artifact, "me/mine")
    with pytest.raises(SidelightError, match=rf"pull 'me/mine' \({said}\)"):
        pull("me/mine", tmp_path / "theirs")


def test_only_an_artifact_can_be_pushed(tmp_path):
    with pytest.raises(SidelightError, match="holds no probe"):
        push(tmp_path, tmp_path / "shared")
    assert not (tmp_path / "shared").exists()
