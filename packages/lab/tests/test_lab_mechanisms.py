"""The laboratory's mechanisms keep the laws of mechanisms, and are found where it is installed."""

import math

import numpy as np
import pytest
import torch
from scipy.special import ndtr

import wordings
from mechanism_contract import (
    COMPLETE,
    LAYERS,
    MechanismContract,
    built,
    drawn,
    gated,
    projected,
    shares_of,
    weights_under,
)
from sidelight.errors import SidelightError
from sidelight.probes.artifact import load_probe, save_probe
from sidelight.probes.mechanisms import base
from sidelight.probes.ragged import Ragged
from sidelight.training.settings import suggested_settings
from sidelight_lab.mechanisms import fusion
from test_mechanisms import readout_logits
from worlds.models import untrained_probe

VARIANTS = [
    ("fusion", {}),
    ("fusion", {"rank": 3, "heads": 1}),
    ("blend", {}),
    ("blend", {"fusions": 1, "rank": 4}),
]


@pytest.fixture(scope="module", params=VARIANTS, ids=str)
def variant(request):
    return request.param


@pytest.fixture(scope="module")
def integrated():
    return ("fusion", "blend")


@pytest.fixture(autouse=True)
def without_dropout(monkeypatch):
    monkeypatch.setattr(fusion, "DROPOUT", 0.0)


def fusion_logits(weights, states, **_options):
    inner = np.einsum("ltd,ldr->tr", states, weights["features"]) / math.sqrt(LAYERS)
    centred = inner - inner.mean(1, keepdims=True)
    normed = centred / np.sqrt(inner.var(1, keepdims=True) + 1e-5)
    features = normed * weights["norm.weight"] + weights["norm.bias"]
    return weights["bias"] + gated(features * ndtr(features), weights)


def blend_logits(weights, states, fusions, **_options):
    first, *rest = [weights_under(weights, f"members.{i}.") for i in range(fusions + 1)]
    logits = [readout_logits(first, states), *(fusion_logits(member, states) for member in rest)]
    return np.mean(logits, 0)


@pytest.fixture(scope="module")
def equations():
    return {"fusion": fusion_logits, "blend": blend_logits}


class TestLabMechanisms(MechanismContract):
    pass


def test_integrated_gradients_match_the_dense_form():
    """Against many small steps along the hidden states themselves."""
    fused = built("fusion", {"rank": 3, "heads": 1}, 1)
    (text,) = drawn([4], seed=5)
    # As the fourth power, in even steps of its root.
    root = ((torch.arange(2000) + 0.5) / 2000)[:, None, None, None]
    hidden = (text * root**4).requires_grad_()
    logits = fused(hidden, torch.ones(2000, 4, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(logits.sum(), hidden)
    expected = (4 * root**3 / 2000 * gradient * text).sum((0, 3))
    tokens = Ragged(projected(fused, text).detach(), torch.tensor([4]))
    torch.testing.assert_close(
        shares_of(fused, tokens, 0).values.float(), expected.T, atol=COMPLETE, rtol=1e-3
    )


@pytest.mark.parametrize(("name", "epochs"), [("fusion", 6), ("blend", 6)])
def test_lab_mechanism_probes_load_only_with_the_lab_installed(
    name, epochs, tiny, tmp_path, monkeypatch
):
    assert name not in base.mechanism_names()
    assert suggested_settings(name).epochs == epochs
    folder = save_probe(untrained_probe(tiny, "p", mechanism=name), tmp_path / "p")
    assert load_probe(folder).card.mechanism.name == name
    monkeypatch.setattr(base, "_GROUP", "a.group.of.nobody")
    with pytest.raises(SidelightError, match=wordings.UNKNOWN_MECHANISM.format(name=name)):
        load_probe(folder)
