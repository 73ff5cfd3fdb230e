"""Laws of standardisation: it folds into the projection, and is measured from the states."""

import torch

from sidelight.probes.mechanisms.base import Geometry
from sidelight.probes.standardisation import Standardisation

# Standardisation subtracts means a hundred times the spread, which costs two digits.
CANCELLATION = {"rtol": 1e-2, "atol": 2e-3}
# float32: the same sums of 32 products, in another order.
ROUNDING = {"rtol": 1e-4, "atol": 1e-3}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


MEAN, WEIGHTS, SCALE = normal(3, 32), normal(3, 32, 5, seed=1), 0.1 + normal(3, 32, seed=2).abs()


def test_standardisation_folds_into_projection_despite_large_means():
    mean = 100 * MEAN
    states = mean[:, None] + SCALE[:, None] * normal(3, 200, 32)
    folded = Standardisation(mean, SCALE).fold(WEIGHTS)
    actual = states @ folded.weight + folded.shift[:, None]
    expected = ((states - mean[:, None]) / SCALE[:, None]) @ WEIGHTS
    torch.testing.assert_close(actual, expected, **CANCELLATION)
    same = Standardisation.identity(Geometry(3, 32, 1)).fold(WEIGHTS)
    assert torch.equal(same.weight, WEIGHTS)
    assert not same.shift.any()


def test_rounding_folded_weight_does_not_shift_mean():
    folded = Standardisation(100 * MEAN, torch.ones(3, 32)).fold(WEIGHTS, dtype=torch.bfloat16)
    assert folded.weight.dtype == torch.bfloat16
    at_mean = 100 * MEAN[:, None] @ folded.weight.float() + folded.shift[:, None]
    torch.testing.assert_close(at_mean, torch.zeros_like(at_mean), **CANCELLATION)


def test_measured_standardisation_yields_mean_zero_scale_one_and_skips_constants():
    states = 5 + 3 * normal(2, 500, 4)
    states[:, :, 0] = 7
    scaling = Standardisation.measured(states.bfloat16())
    assert (scaling.scale[:, 0] == 1).all()
    scaled = (states - scaling.mean[:, None]) / scaling.scale[:, None]
    # bf16 rounds states of size 10 to 0.03.
    torch.testing.assert_close(scaled.mean(1), torch.zeros(2, 4), rtol=0, atol=0.02)
    torch.testing.assert_close(scaled[..., 1:].std(1), torch.ones(2, 3), rtol=0, atol=0.02)


def test_folded_normalisation_is_exact_and_ignores_norm():
    states = 40 * normal(3, 200, 32)
    normalised = states / states.square().mean(2, keepdim=True).sqrt()
    folded = Standardisation(MEAN, SCALE, is_normalised=True).fold(WEIGHTS)
    expected = ((normalised - MEAN[:, None]) / SCALE[:, None]) @ WEIGHTS
    by_layer = torch.stack(
        [folded.layer(layer, layer_states) for layer, layer_states in enumerate(states)]
    )
    for actual in (folded.layers(states), folded.layers(1000 * states), by_layer):
        torch.testing.assert_close(actual, expected, **ROUNDING)


def test_overflowing_norm_yields_non_finite_value():
    states = torch.tensor([[[1e20, 1.0], [3.0, 4.0], [0.0, 0.0]]])
    scaling = Standardisation(torch.zeros(1, 2), torch.ones(1, 2), is_normalised=True)
    numbers = scaling.fold(torch.ones(1, 2, 1)).layers(states)
    assert numbers[0, :, 0].isfinite().tolist() == [False, True, True]
