"""A probe is trained on the states of a GGUF file, and belongs to that file."""

import numpy as np
import pytest

import wordings
from sidelight.classifier import Classifier, load
from sidelight.data.loading import load_examples
from sidelight.errors import FingerprintMismatchError
from sidelight.probes.artifact import load_probe, save_probe
from sidelight.probes.mechanisms.base import mechanism_spec
from sidelight.training.fit import fit
from sidelight.training.settings import FitOptions, TrainingSettings
from sidelight_llama.library import PINNED
from worlds.data import planted_rows
from worlds.gguf import gguf_model, needs_llama, write_gguf
from worlds.models import tiny_tokenizer

pytestmark = [pytest.mark.slow, needs_llama, pytest.mark.usefixtures("temporary_cache")]
SETTINGS = TrainingSettings(
    learning_rate=3e-2, weight_decay=0.01, epochs=3, batch_size=16, least_steps=0
)
# States are stored in bfloat16.
ROUNDING = 2e-2


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    return gguf_model(tmp_path_factory.mktemp("gguf"), "llama")


def fitted(backbone, cache):
    options = FitOptions(mechanism=mechanism_spec("readout"), settings=SETTINGS, cache_root=cache)
    rows = load_examples(planted_rows("binary", 60))
    return Classifier(backbone, fit(backbone, rows, None, name="planted", options=options).probe)


def test_probe_trained_on_gguf_states_agrees_with_transformers(gguf, tmp_path):
    trained, theirs = (
        fitted(backbone, tmp_path / "states") for backbone in (gguf.backbone, gguf.reference)
    )
    # Engines, and versions of llama.cpp, share no states on disk.
    assert gguf.backbone.engine == f"llama.cpp {PINNED}"
    assert trained.probe.card.backbone == gguf.backbone.fingerprint
    texts = [row["text"] for row in planted_rows("binary", 10)]
    mine, expected = (
        np.array([[*v.probabilities.values()] for v in classifier.predict(texts)])
        for classifier in (trained, theirs)
    )
    np.testing.assert_allclose(mine, expected, rtol=0, atol=ROUNDING)
    assert np.ptp(mine[:, 0]) > 10 * ROUNDING


def test_probe_is_rejected_for_a_file_with_different_weights(gguf, tmp_path):
    probe = fitted(gguf.backbone, tmp_path / "states").probe
    folder = save_probe(probe, tmp_path / "probe")
    assert load_probe(folder).card.backbone == gguf.backbone.fingerprint
    assert load(folder, model=gguf.backbone).probe.name == "planted"
    weight = gguf.reference.model.model.layers[1].mlp.down_proj.weight
    weight[0, 0] += 1
    changed = write_gguf(gguf.reference.model, tmp_path / "llama.gguf", "llama", tiny_tokenizer())
    weight[0, 0] -= 1
    with pytest.raises(
        FingerprintMismatchError, match=wordings.DIFFER_IN.format(fields="weights, and")
    ):
        load(folder, model=type(gguf.backbone)(changed))
