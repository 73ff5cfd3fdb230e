"""Laws of standardisation: it folds into the projection, and is measured from the states."""

import torch

from sidelight.mechanisms.base import Geometry
from sidelight.standardisation import Standardisation

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
