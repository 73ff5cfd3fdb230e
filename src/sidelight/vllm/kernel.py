"""The columns of one layer in a single kernel: add, project, normalise, store.

The states are read once, and nothing of their width is written. Triton comes with vLLM. The kernel
has not run on a GPU yet: ``tests/vllm/test_kernel.py`` runs it in Triton's interpreter, and
compiles it.
"""

# pyright: reportMissingImports=false, reportUnknownParameterType=false
# pyright: reportMissingParameterType=false, reportUntypedFunctionDecorator=false, reportIndexIssue=false

import os

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from sidelight.errors import SidelightError
from sidelight.standardisation import EPSILON, Projection
from sidelight.vllm.products import ENVIRONMENT, Product

# Tokens and numbers of their width at a time. ``tl.dot`` takes at least 16 of each; more would not
# fit in the 99 KiB of shared memory that some GPUs have.
_FEW_TOKENS = 256
_FEW, _MANY = (16, 128), (64, 64)
_COLUMNS_AT_ONCE = (16, 64)


@triton.jit(do_not_specialize=["tokens"])
def _project(
    hidden, residual, weight, shift, flags, slots, out, tokens, out_stride,
    width: tl.constexpr, columns: tl.constexpr, epsilon: tl.constexpr,
    tokens_at_once: tl.constexpr, width_at_once: tl.constexpr, columns_at_once: tl.constexpr,
):  # fmt: skip
    # Programs of the same tokens are neighbours, so that they find the states in the cache.
    column = tl.program_id(0) * columns_at_once + tl.arange(0, columns_at_once)
    token = tl.program_id(1).to(tl.int64) * tokens_at_once + tl.arange(0, tokens_at_once)
    is_token, is_column = token < tokens, column < columns
    total = tl.zeros((tokens_at_once, columns_at_once), tl.float32)
    squares = tl.zeros((tokens_at_once,), tl.float32)
    for start in range(0, width, width_at_once):
        place = start + tl.arange(0, width_at_once)
        is_place = place < width
        where = token[:, None] * width + place[None, :]
        is_state = is_token[:, None] & is_place[None, :]
        loaded = tl.load(hidden + where, mask=is_state, other=0.0)
        state = loaded.to(tl.float32)
        if residual is not None:
            # As the model does itself: the sum is rounded to its dtype.
            state += tl.load(residual + where, mask=is_state, other=0.0).to(tl.float32)
            state = state.to(loaded.dtype).to(tl.float32)
        block = tl.load(
            weight + column[None, :] * width + place[:, None],
            mask=is_place[:, None] & is_column[None, :],
            other=0.0,
        )
        # Three products on tensor cores, as exact as one in float32.
        total = tl.dot(state, block, total, input_precision="tf32x3")
        if flags is not None:
            squares += tl.sum(state * state, 1)
    if flags is not None:
        inverse = tl.rsqrt(squares / width + epsilon)
        # As in ``inverse_rms``: no number where the square overflowed.
        inverse = tl.where(inverse > 0, inverse, float("nan"))
        is_normalised = tl.load(flags + column, mask=is_column, other=0) != 0
        total *= tl.where(is_normalised[None, :], inverse[:, None], 1.0)
    total += tl.load(shift + column, mask=is_column, other=0.0)[None, :]
    row = token
    if slots is not None:
        row = tl.load(slots + token, mask=is_token, other=-1).to(tl.int64)
        # vLLM pads with -1.
        is_token = is_token & (row >= 0)
    tl.store(
        out + row[:, None] * out_stride + column[None, :],
        total,
        mask=is_token[:, None] & is_column[None, :],
    )


class FusedProduct(Product):
    """One launch a layer."""

    def __init__(self, projection: Projection):
        device = projection.weight.device.type
        if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise SidelightError(
                f"{ENVIRONMENT}=triton needs a GPU, and this is {device}. Unset it."
            )
        super().__init__(projection)
        # The kernel takes bytes; this is the same memory.
        flags = self.is_normalised
        self._flags = None if flags is None else flags.view(torch.int8)

    def derived_weights(
        self, weight: Float[Tensor, "layer width column"]
    ) -> Float[Tensor, "layer column width"]:
        return weight.mT.contiguous()

    def __call__(
        self,
        layer: int,
        hidden: Float[Tensor, "token width"],
        residual: Float[Tensor, "token width"] | None,
        *,
        out: Float[Tensor, "row column"],
        slots: Int[Tensor, " token"] | None = None,
    ) -> None:
        """As ``Product``; with slots, a token's row is its slot, and it has none if that is -1."""
        columns, width = self.weights[layer].shape
        tokens = len(hidden)
        tokens_at_once, width_at_once = _FEW if tokens <= _FEW_TOKENS else _MANY
        least, most = _COLUMNS_AT_ONCE
        columns_at_once = min(most, max(least, triton.next_power_of_2(columns)))
        grid = (triton.cdiv(columns, columns_at_once), triton.cdiv(tokens, tokens_at_once))
        _project[grid](
            hidden.contiguous(), None if residual is None else residual.contiguous(),
            self.weights[layer], self.shifts[layer], self._flags, slots, out,
            tokens, out.stride(0), width, columns, EPSILON,
            tokens_at_once, width_at_once, columns_at_once,
        )  # fmt: skip
