"""Sharing artifacts."""

from unittest.mock import Mock

import pytest
from huggingface_hub import ModelCard

from sidelight.artifact import load_probe, save_probe
from sidelight.errors import SidelightError
from sidelight.hub import pull, push
from tiny import untrained_probe


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
    monkeypatch.setattr("sidelight.hub.HfApi.create_repo", unreachable)
    monkeypatch.setattr("sidelight.hub.snapshot_download", unreachable)
    with pytest.raises(SidelightError, match=r"push to 'me/mine': ConnectError.*folder write \./"):
        push(artifact, "me/mine")
    with pytest.raises(SidelightError, match=r"pull 'me/mine': ConnectError"):
        pull("me/mine", tmp_path / "theirs")


def test_only_an_artifact_can_be_pushed(tmp_path):
    with pytest.raises(SidelightError, match="holds no probe"):
        push(tmp_path, tmp_path / "shared")
    assert not (tmp_path / "shared").exists()
