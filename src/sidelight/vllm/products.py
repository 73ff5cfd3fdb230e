"""The forms in which one layer's columns are computed, and the choice between them.

Each form gives ``project(weight, shift, is_normalised, hidden + residual)`` with float32's own
error. It reads no value of a tensor, writes in place, and takes other weights in place, so that it
can be part of a captured CUDA graph. ``kernel.py`` has the form that needs Triton.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from jaxtyping import BFloat16, Float, Shaped
from torch import Tensor
from torch.nn.functional import pad

from sidelight.errors import SidelightError
from sidelight.standardisation import Projection, inverse_rms, project

ENVIRONMENT = "SIDELIGHT_TAP"
DEFAULT = "addmm"
_PARTS = 3
# Tensor cores want products whose columns are a multiple of this.
_ALIGNMENT = 8


class Product(ABC):
    """Computes the columns of one layer's states.

    Args:
        projection: Of the local layers, in float32.

    Attributes:
        buffers: All that it computes with; they never move.
    """

    def __init__(self, projection: Projection):
        self.buffers = tuple(map(torch.clone, self._derived(projection)))
        weights, shifts, *flags = self.buffers
        self.is_normalised = flags[0] if flags else None
        # The views are made once: a pass asks for every layer, and it may have a single token.
        self.weights, self.shifts = weights.unbind(), shifts.unbind()

    def copy_(self, projection: Projection) -> None:
        """Computes these columns from now on: as many as before, and flags if there were any."""
        for own, new in zip(self.buffers, self._derived(projection), strict=True):
            own.copy_(new)

    def _derived(self, projection: Projection) -> Sequence[Tensor]:
        """What the buffers hold: weights, shifts, and which columns are normalised, if any."""
        flags = projection.is_normalised
        weights = self.derived_weights(projection.weight)
        return weights, projection.shift, *([] if flags is None else [flags])

    @abstractmethod
    def derived_weights(
        self, weight: Float[Tensor, "layer width column"]
    ) -> Shaped[Tensor, "layer _ _"]:
        """The weights of each layer in the dtype and order that the product wants."""

    @abstractmethod
    def __call__(
        self,
        layer: int,
        hidden: Float[Tensor, "token width"],
        residual: Float[Tensor, "token width"] | None,
        *,
        out: Float[Tensor, "token column"],
    ) -> None:
        """Writes the columns of ``hidden + residual``, the sum in the model's dtype."""


class Addmm(Product):
    """A product in float32: a bf16 result would lose what standardisation subtracts."""

    def derived_weights(
        self, weight: Float[Tensor, "layer width column"]
    ) -> Float[Tensor, "layer width column"]:
        # With a column's numbers side by side, a matmul of few columns takes a quarter of the time.
        return weight.mT.contiguous().mT

    def __call__(
        self,
        layer: int,
        hidden: Float[Tensor, "token width"],
        residual: Float[Tensor, "token width"] | None,
        *,
        out: Float[Tensor, "token column"],
    ) -> None:
        stream = hidden if residual is None else hidden + residual
        flags = self.is_normalised
        project(self.weights[layer], self.shifts[layer], flags, stream.float(), out=out)


class SplitBfloat16(Product):
    """A bf16 product whose weight is the sum of three bf16 numbers; float32 adds up.

    A product of two bf16 numbers is exact in float32, and three have float32's 24 bits, so the
    error is float32's own. The states are read once, at tensor cores' speed.
    """

    def derived_weights(
        self, weight: Float[Tensor, "layer width column"]
    ) -> BFloat16[Tensor, "layer width part"]:
        rest, parts = weight.mT, list[Tensor]()
        for _ in range(_PARTS):
            parts.append(rest.bfloat16())
            rest = rest - parts[-1].float()
        stacked = torch.cat(parts, 1)
        return pad(stacked, (0, 0, 0, -stacked.shape[1] % _ALIGNMENT)).mT

    def __call__(
        self,
        layer: int,
        hidden: Float[Tensor, "token width"],
        residual: Float[Tensor, "token width"] | None,
        *,
        out: Float[Tensor, "token column"],
    ) -> None:
        if hidden.dtype != torch.bfloat16:
            raise SidelightError(
                f"{ENVIRONMENT}=bf16x3 is for models in bfloat16, and this one is in "
                f"{str(hidden.dtype).removeprefix('torch.')}. Choose {ENVIRONMENT}={DEFAULT}."
            )
        stream = hidden if residual is None else hidden + residual
        products = _in_float32(stream, self.weights[layer])
        torch.sum(products[:, : _PARTS * out.shape[1]].unflatten(1, (_PARTS, -1)), 1, out=out)
        if self.is_normalised is not None:
            out.mul_(torch.where(self.is_normalised, inverse_rms(stream), 1))
        out.add_(self.shifts[layer])


def _in_float32(
    left: Float[Tensor, "token width"], right: Float[Tensor, "width column"]
) -> Float[Tensor, "token column"]:
    """The product of two bf16 matrices, added up and given in float32."""
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    # torch has no such product on a CPU; this one multiplies the same numbers.
    return torch.mm(left.float(), right.float())


def _fused(projection: Projection) -> Product:
    # Triton comes with vLLM, and is not imported without need.
    from sidelight.vllm.kernel import FusedProduct

    return FusedProduct(projection)


PRODUCTS: dict[str, Callable[[Projection], Product]] = {
    DEFAULT: Addmm,
    "bf16x3": SplitBfloat16,
    "triton": _fused,
}


def product_name() -> str:
    """The form that ``SIDELIGHT_TAP`` chooses.

    Raises:
        SidelightError: There is no such form.
    """
    name = os.environ.get(ENVIRONMENT) or DEFAULT
    if name not in PRODUCTS:
        raise SidelightError(
            f"{ENVIRONMENT} is '{name}'; it can be {', '.join(PRODUCTS)}. Unset it for {DEFAULT}."
        )
    return name
