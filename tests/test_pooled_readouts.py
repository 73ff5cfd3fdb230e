"""A readout learns the same from means of whole states as from a value of each token."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from corpora import rows
from sidelight.data.loading import load_examples
from sidelight.mechanisms.base import Geometry, mechanism_spec
from sidelight.mechanisms.readout import Readout
from sidelight.ragged import Ragged, weighted_sums
from sidelight.standardisation import Standardisation
from sidelight.training import optimisation
from sidelight.training.dataset import make_split
from sidelight.training.loop import train_mechanisms
from sidelight.training.pooled_readouts import readout_logits
from sidelight.training.settings import FitOptions, Job, suggested_settings

LAYERS, WIDTH, OUTPUTS = 3, 8, 5
# The same sums in another order, in float32; relative to the largest.
ROUNDING = 1e-5


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def readout(*, heads, has_extremes):
    made = Readout(Geometry(LAYERS, WIDTH, OUTPUTS), heads=heads, has_extremes=has_extremes)
    for parameter in made.parameters():
        parameter.requires_grad_(parameter.numel() > 0)
        if parameter.numel():
            nn.init.normal_(parameter)
    return made


def gradients(logits, mechanisms):
    parameters = [p for made in mechanisms for p in made.parameters() if p.numel()]
    return torch.autograd.grad(torch.cat(logits, 1).square().sum(), parameters)


@pytest.mark.parametrize("is_normalised", [False, True])
def test_logits_and_gradients_are_those_of_the_columns(is_normalised):
    mechanisms = [readout(heads=2, has_extremes=False), readout(heads=3, has_extremes=True)]
    hidden, lengths = drawn(LAYERS, 9, WIDTH), torch.tensor([3, 1, 5])
    scaled = Standardisation(drawn(LAYERS, WIDTH), drawn(LAYERS, WIDTH).abs() + 0.5, is_normalised)
    # One of the two reads the other states, so that neither gets those of its neighbour.
    scalings = [scaled, replace(scaled, mean=2 * scaled.mean, is_normalised=not is_normalised)]

    def projected(columns):
        pairs = zip(columns, scalings, strict=True)
        layers = [scaling.fold(own).layers(hidden).transpose(0, 1) for own, scaling in pairs]
        return [Ragged(own, lengths) for own in layers]

    tokens = projected([made.columns() for made in mechanisms])
    expected = [made.logits(own) for made, own in zip(mechanisms, tokens, strict=True)]
    tokens = projected([made.token_columns() for made in mechanisms])
    found = readout_logits(mechanisms, tokens, scalings, hidden)
    for own, other in zip(
        [*found, *gradients(found, mechanisms)],
        [*expected, *gradients(expected, mechanisms)],
        strict=True,
    ):
        scale = float(other.detach().abs().max())
        torch.testing.assert_close(own, other, rtol=0, atol=ROUNDING * scale)


def test_weighted_sums_are_sums_of_each_text_alone():
    hidden, weights = drawn(2, 7, 4), drawn(2, 7, 3).requires_grad_()
    lengths = torch.tensor([4, 0, 3])
    sums = weighted_sums(hidden, weights, lengths)
    expected = torch.einsum("ltd,lth->ldh", hidden[:, 4:], weights[:, 4:])
    torch.testing.assert_close(sums[2], expected)
    assert not sums[1].any()
    (gradient,) = torch.autograd.grad(sums[2].sum(), weights)
    torch.testing.assert_close(gradient[:, 4:], hidden[:, 4:].sum(2, keepdim=True).expand(2, 3, 3))
    assert not gradient[:, :4].any()


@pytest.mark.slow
def test_many_classes_are_learnt_from_means_and_few_from_tokens(tiny, tmp_path, monkeypatch):
    split = make_split(
        tiny,
        load_examples(rows("multiclass", 40)),
        FitOptions(max_tokens=512, cache_root=tmp_path),
    )
    settings = suggested_settings("readout").changed(epochs=3, batch_size=16)
    job = Job(mechanism_spec("readout"), 0, settings)
    (by_tokens,) = train_mechanisms([job], training=split, validation=None)
    monkeypatch.setattr(optimisation, "_MANY_OUTPUTS", 2)
    (by_means,) = train_mechanisms([job], training=split, validation=None)
    found, expected = by_means.mechanism.value, by_tokens.mechanism.value
    # bf16 rounds them at other places, and not all of AdamW's steps are small beside that.
    assert not torch.equal(found, expected)
    assert float((found - expected).norm() / expected.norm()) < 0.1
