"""Sharing artifacts."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from sidelight.artifact import load_probe, save_probe
from sidelight.backbone import TransformersBackbone
from sidelight.errors import SidelightError
from sidelight.hub import pull, push
from tiny import untrained_probe


@pytest.fixture
def artifact(tiny: TransformersBackbone, tmp_path: Path) -> Path:
    return save_probe(untrained_probe(tiny, "toxicity"), tmp_path / "mine")


def test_what_is_pulled_is_what_was_pushed(artifact, tmp_path):
    push(artifact, tmp_path / "shared")
    pulled = load_probe(pull(tmp_path / "shared", tmp_path / "theirs"))
    own = load_probe(artifact)
    assert pulled.fingerprint == own.fingerprint
    for key, value in own.mechanism.state_dict().items():
        assert value.equal(pulled.mechanism.state_dict()[key])


def test_the_model_card_says_what_the_manifest_says(artifact, tmp_path):
    push(artifact, tmp_path / "shared")
    card = ModelCard.load(tmp_path / "shared" / "README.md")
    assert card.data.library_name == "sidelight"
    for fact in ("toxicity", "fine, toxic", "readout", load_probe(artifact).fingerprint.name):
        assert fact in card.text


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("repository", ["no-one/nothing", "not a name"])
def test_a_hub_that_cannot_answer_is_one_clear_error(artifact, tmp_path, repository):
    with pytest.raises(SidelightError, match=f"'{repository}'.*hf auth login"):
        pull(repository, tmp_path / "theirs")
    with pytest.raises(SidelightError, match=f"'{repository}'.*hf auth login"):
        push(artifact, repository)


def test_only_an_artifact_can_be_pushed(tmp_path):
    with pytest.raises(SidelightError, match="holds no probe"):
        push(tmp_path, tmp_path / "shared")
    assert not (tmp_path / "shared").exists()
