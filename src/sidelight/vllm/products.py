"""The forms in which one layer's columns are computed, and the choice between them.

Each form gives ``project(weight, shift, is_normalised, hidden + residual)`` with float32's own
error. It reads no value of a tensor and writes in place, so that it can be part of a captured CUDA
graph. ``kernel.py`` has the form that needs Triton.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from jaxtyping import Float
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
    """

    def __init__(self, projection: Projection):
        self.is_normalised = projection.is_normalised
        # The views are made once: a pass asks for every layer, and it may have a single token.
        self.shifts = projection.shift.unbind()

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

    def __init__(self, projection: Projection):
        super().__init__(projection)
        # With a column's numbers side by side, a matmul of few columns takes a quarter of the time.
        self._weights = projection.weight.mT.contiguous().mT.unbind()

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
        project(self._weights[layer], self.shifts[layer], flags, stream.float(), out=out)


class SplitBfloat16(Product):
    """A bf16 product whose weight is the sum of three bf16 numbers; float32 adds up.

    A product of two bf16 numbers is exact in float32, and three have float32's 24 bits, so the
    error is float32's own. The states are read once, at tensor cores' speed.
    """

    def __init__(self, projection: Projection):
        super().__init__(projection)
        rest, parts = projection.weight.mT, list[Tensor]()
        for _ in range(_PARTS):
            parts.append(rest.bfloat16())
            rest = rest - parts[-1].float()
        stacked = torch.cat(parts, 1)
        self._columns = _PARTS * projection.shift.shape[1]
        self._weights = pad(stacked, (0, 0, 0, -self._columns % _ALIGNMENT)).mT.unbind()

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
        products = _in_float32(stream, self._weights[layer])
        torch.sum(products[:, : self._columns].unflatten(1, (_PARTS, -1)), 1, out=out)
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
