"""Laws of standardisation: it folds into the projection, and is measured from the states."""

import torch

from sidelight.mechanisms.base import Geometry
from sidelight.standardisation import Projection, Standardisation

# Standardisation subtracts means a hundred times the spread, which costs two digits.
CANCELLATION = {"rtol": 1e-2, "atol": 2e-3}


def test_standardisation_folds_away_even_where_means_dwarf_the_spread():
    generator = torch.Generator().manual_seed(0)
    mean = 100 * torch.randn(3, 32, generator=generator)
    scale = 0.1 + torch.rand(3, 32, generator=generator)
    columns = torch.randn(3, 32, 5, generator=generator)
    states = mean[:, None] + scale[:, None] * torch.randn(3, 200, 32, generator=generator)
    folded = Standardisation(mean, scale).fold(columns)
    actual = states @ folded.weight + folded.shift[:, None]
    expected = ((states - mean[:, None]) / scale[:, None]) @ columns
    torch.testing.assert_close(actual, expected, **CANCELLATION)


def test_rounding_the_folded_weight_does_not_move_the_mean():
    generator = torch.Generator().manual_seed(0)
    mean = 100 * torch.randn(3, 32, generator=generator)
    columns = torch.randn(3, 32, 5, generator=generator)
    folded = Standardisation(mean, torch.ones(3, 32)).fold(columns, dtype=torch.bfloat16)
    assert folded.weight.dtype == torch.bfloat16
    at_mean = mean[:, None] @ folded.weight.float() + folded.shift[:, None]
    torch.testing.assert_close(at_mean, torch.zeros_like(at_mean), **CANCELLATION)


def test_measured_standardisation_gives_mean_0_and_scale_1_and_spares_constants():
    states = 5 + 3 * torch.randn(2, 500, 4, generator=torch.Generator().manual_seed(0))
    states[:, :, 0] = 7
    scaling = Standardisation.measured(states.bfloat16())
    assert (scaling.scale[:, 0] == 1).all()
    scaled = (states - scaling.mean[:, None]) / scaling.scale[:, None]
    # bf16 rounds states of size 10 to 0.03.
    torch.testing.assert_close(scaled.mean(1), torch.zeros(2, 4), rtol=0, atol=0.02)
    torch.testing.assert_close(scaled[..., 1:].std(1), torch.ones(2, 3), rtol=0, atol=0.02)


def test_identity_standardisation_changes_nothing():
    columns = torch.randn(3, 32, 5)
    folded = Standardisation.identity(Geometry(3, 32, 1)).fold(columns)
    assert torch.equal(folded.weight, columns)
    assert not folded.shift.any()


def test_normalised_states_fold_away_and_ignore_the_norm():
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(3, 32, generator=generator)
    scale = 0.1 + torch.rand(3, 32, generator=generator)
    columns = torch.randn(3, 32, 5, generator=generator)
    states = 40 * torch.randn(3, 200, 32, generator=generator)
    unit = states / states.square().mean(2, keepdim=True).sqrt()
    folded = Standardisation(mean, scale, is_normalised=True).fold(columns)
    expected = ((unit - mean[:, None]) / scale[:, None]) @ columns
    torch.testing.assert_close(folded.layers(states), expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(folded.layers(1000 * states), expected, rtol=1e-4, atol=1e-3)
    by_layer = torch.stack([folded.layer(layer, own) for layer, own in enumerate(states)])
    torch.testing.assert_close(by_layer, expected, rtol=1e-4, atol=1e-3)


def test_a_norm_that_overflows_gives_no_number():
    states = torch.tensor([[[1e20, 1.0], [3.0, 4.0], [0.0, 0.0]]])
    folded = Standardisation(torch.zeros(1, 2), torch.ones(1, 2), is_normalised=True).fold(
        torch.ones(1, 2, 1)
    )
    assert folded.layers(states)[0, :, 0].isfinite().tolist() == [False, True, True]


def test_joined_projections_keep_what_each_does():
    generator = torch.Generator().manual_seed(0)
    states = 40 * torch.randn(3, 20, 32, generator=generator)
    parts = [
        Standardisation(torch.randn(3, 32, generator=generator), torch.ones(3, 32), flag).fold(
            torch.randn(3, 32, 4, generator=generator)
        )
        for flag in (False, True)
    ]
    together = Projection.joined(parts).layers(states)
    apart = torch.cat([part.layers(states) for part in parts], 2)
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-3)
    assert Projection.joined(parts[:1]).is_normalised is None
