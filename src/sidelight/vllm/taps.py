"""Hooks on vLLM's decoder layers, and the operation that they call.

The hooks are set before vLLM compiles the model, so that they become part of the graph. What they
call is one operation that the compiler cannot look into: it finds the current stage in this file,
so that other probes need no other graph. A worker process runs one model, hence one stage.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sidelight.errors import SidelightError

_library = torch.library.Library("sidelight", "FRAGMENT")
_library.define("project(Tensor hidden, Tensor? residual, int layer, Tensor(a!) order) -> ()")


@runtime_checkable
class Receiver(Protocol):
    """What is done with a hidden state while it exists."""

    def receive(self, layer: int, hidden: Float[Tensor, "token width"]) -> None:
        """Takes the residual stream after a layer of this worker."""
        ...


_stages: list[Receiver] = []


def set_stage(stage: Receiver | None) -> None:
    """Where the next forward passes of this process leave their states; None: nowhere."""
    _stages[:] = [] if stage is None else [stage]


def _project(
    hidden: Float[Tensor, "token width"],
    residual: Float[Tensor, "token width"] | None,
    layer: int,
    order: Float[Tensor, ""],  # noqa: ARG001 - what keeps the operation in its place
) -> None:
    for stage in _stages:
        stage.receive(layer, hidden if residual is None else hidden + residual)


def _nothing(hidden: Tensor, residual: Tensor | None, layer: int, order: Tensor) -> None:
    """What the compiler sees."""


_library.impl("project", _project, "CompositeExplicitAutograd")
torch.library.register_fake("sidelight::project", _nothing, lib=_library)


def tap_layers(layers: Sequence[nn.Module], *, reads_embedding: bool, width: int) -> int:
    """Hooks the layers of this worker; returns how many hidden states they give.

    Args:
        layers: The local decoder layers, in order.
        reads_embedding: Whether the first layer's input is the embedding, which is layer 0.
        width: Size of a hidden state.
    """
    # The compiler neither drops nor reorders operations that write the same tensor.
    order = next(layers[0].parameters()).new_zeros((), dtype=torch.float32)
    first = int(reads_embedding)
    if reads_embedding:
        layers[0].register_forward_pre_hook(_input_hook(order, width), with_kwargs=True)
    for layer, module in enumerate(layers, start=first):
        module.register_forward_hook(_output_hook(layer, order, width))
    return first + len(layers)


def _input_hook(order: Tensor, width: int) -> Callable[..., None]:
    def entered(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = [value for value in (*args, *kwargs.values()) if _is_state(value, width)]
        if len(states) != 1:
            raise _unknown(module)
        torch.ops.sidelight.project(states[0], None, 0, order)

    return entered


def _output_hook(layer: int, order: Tensor, width: int) -> Callable[..., None]:
    """Layers of vLLM return the stream in two addends, the second of them the residual."""

    def left(module: nn.Module, _args: Any, output: Any) -> None:
        hidden, residual = output if isinstance(output, tuple) else (output, None)
        if not _is_state(hidden, width) or not (residual is None or _is_state(residual, width)):
            raise _unknown(module)
        torch.ops.sidelight.project(hidden, residual, layer, order)

    return left


def _is_state(value: Any, width: int) -> bool:
    return torch.is_tensor(value) and value.dim() == 2 and value.shape[1] == width


def _unknown(module: nn.Module) -> SidelightError:
    return SidelightError(
        f"{type(module).__name__} is no decoder layer that Sidelight knows how to tap. "
        "docs/vllm.md lists the tested models; serve this one with the transformers engine."
    )
