"""Inputs for the forms of the columns' product, and what each must give, in float64."""

import torch
from torch import Tensor

from sidelight.standardisation import EPSILON, Projection
from sidelight.vllm.products import Product

# Of the size that a column has by the sizes of its factors. Float32's own; a weight in two bf16
# parts would be off by 1e-5.
ROUNDING = 4e-6
LAYER = 1


def random_projection(width: int, columns: int, *, flags: Tensor | None = None) -> Projection:
    """Of two layers; the weights have all of float32's digits."""
    return Projection(torch.randn(2, width, columns), torch.randn(2, columns), flags)


def mixed_flags(columns: int) -> Tensor:
    """Every second column is normalised, beginning with the first."""
    return torch.arange(columns) % 2 == 0


def random_states(tokens: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What a layer adds, and the residual stream, whose size differs by token."""
    residual = 10 * torch.randn(tokens, width) * torch.rand(tokens, 1)
    return torch.randn(tokens, width).to(dtype), residual.to(dtype)


def in_float64(projection: Projection, stream: Tensor) -> tuple[Tensor, Tensor]:
    """The columns of ``LAYER``, and their sizes: what they are but for their factors' signs."""
    states, weight = stream.double(), projection.weight[LAYER].double()
    columns, sizes = states @ weight, (states.square() @ weight.square()).sqrt()
    if projection.is_normalised is not None:
        rms = (states.square().mean(1, keepdim=True) + EPSILON).sqrt()
        divisor = torch.where(projection.is_normalised, rms, 1)
        columns, sizes = columns / divisor, sizes / divisor
    shift = projection.shift[LAYER].double()
    return columns + shift, sizes + shift.abs()


def require_float32s_error(
    product: Product,
    projection: Projection,
    hidden: Tensor,
    residual: Tensor | None,
    *,
    stream: Tensor,
) -> None:
    """Checks the columns of ``stream``, the sum of both, and that no other row is written."""
    tokens, columns = len(hidden), projection.shift.shape[1]
    rows = torch.full((tokens + 3, columns), torch.nan)
    product(LAYER, hidden, residual, out=rows[:tokens])
    wanted, sizes = in_float64(projection, stream)
    assert ((rows[:tokens] - wanted).abs() < ROUNDING * sizes).all()
    assert rows[tokens:].isnan().all()


def require_copied_in_place(
    product: Product, projection: Projection, states: tuple[Tensor, Tensor], stream: Tensor
) -> None:
    """Checks that it computes these columns after a copy, with buffers that have not moved."""
    addresses = [buffer.data_ptr() for buffer in product.buffers]
    product.copy_(projection)
    assert [buffer.data_ptr() for buffer in product.buffers] == addresses
    require_float32s_error(product, projection, *states, stream=stream)


def require_no_number_of_none(product: Product, hidden: Tensor, *, columns: int) -> None:
    """Checks that a state that is no number gives none, and that its neighbours keep theirs."""
    plain, broken = torch.empty(len(hidden), columns), torch.empty(len(hidden), columns)
    product(LAYER, hidden, None, out=plain)
    states = hidden.clone()
    states[1, 3], states[4, 0], states[6, -1] = torch.nan, torch.inf, -torch.inf
    product(LAYER, states, None, out=broken)
    is_broken = torch.zeros(len(hidden), dtype=torch.bool)
    is_broken[[1, 4, 6]] = True
    assert not broken[is_broken].isfinite().any()
    assert torch.equal(broken[~is_broken], plain[~is_broken])
    assert plain.isfinite().all()
