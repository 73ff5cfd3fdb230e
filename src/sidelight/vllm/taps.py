"""Hooks on vLLM's decoder layers, and the two operations that they call.

The hooks are set before vLLM compiles the model, so they become part of the graph. They call
operations that the compiler cannot look into: one after each layer, and one after the last. These
find the current receiver in this file, so different probes need no different graph. A worker
process runs one model, hence one receiver.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sidelight.errors import SidelightError

_library = torch.library.Library("sidelight", "FRAGMENT")
_library.define("project(Tensor hidden, Tensor? residual, int layer, Tensor(a!) order) -> ()")
_library.define("end_pass(Tensor hidden, Tensor(a!) order) -> ()")


@runtime_checkable
class Receiver(Protocol):
    """Takes the residual stream after each layer of this worker, while it exists."""

    def receive(
        self,
        layer: int,
        hidden: Float[Tensor, "token width"],
        residual: Float[Tensor, "token width"] | None = None,
    ) -> None:
        """The stream is the sum of both."""
        ...

    def end_pass(self, tokens: int) -> None:
        """The last layer of this worker has run, over this many tokens with their padding."""


_receivers: list[Receiver] = []


def set_receiver(new: Receiver | None) -> None:
    """Says who receives the states of the next forward passes of this process."""
    _receivers[:] = [] if new is None else [new]


def receiver() -> Receiver | None:
    """Who receives them; None: nobody."""
    return _receivers[0] if _receivers else None


def _project(
    hidden: Float[Tensor, "token width"],
    residual: Float[Tensor, "token width"] | None,
    layer: int,
    order: Float[Tensor, ""],  # noqa: ARG001 - keeps the operation in its place
) -> None:
    for receiver in _receivers:
        receiver.receive(layer, hidden, residual)


def _end_pass(hidden: Float[Tensor, "token width"], order: Float[Tensor, ""]) -> None:  # noqa: ARG001
    for receiver in _receivers:
        receiver.end_pass(len(hidden))


def _nothing(*_arguments: object) -> None:
    """All that the compiler sees."""


for _name, _operation in {"project": _project, "end_pass": _end_pass}.items():
    _library.impl(_name, _operation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sidelight::{_name}", _nothing, lib=_library)


def tap_layers(layers: Sequence[nn.Module], *, reads_embedding: bool, width: int) -> int:
    """Hooks the layers of this worker; returns how many hidden states they give.

    Args:
        layers: The local decoder layers, in order.
        reads_embedding: Whether the first layer's input is the embedding, which is layer 0.
        width: Size of a hidden state.
    """
    # The compiler neither drops nor reorders operations that write to the same tensor.
    order = next(layers[0].parameters()).new_zeros((), dtype=torch.float32)
    first = int(reads_embedding)
    if reads_embedding:
        layers[0].register_forward_pre_hook(_input_hook(order, width), with_kwargs=True)
    for layer, module in enumerate(layers, start=first):
        module.register_forward_hook(_output_hook(layer, order, width))
    layers[-1].register_forward_hook(_last_hook(order))
    return first + len(layers)


def _input_hook(order: Tensor, width: int) -> Callable[..., None]:
    def entered(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = [value for value in (*args, *kwargs.values()) if _is_state(value, width)]
        if len(states) != 1:
            raise _unknown(module)
        torch.ops.sidelight.project(_rows(states[0]), None, 0, order)

    return entered


def _output_hook(layer: int, order: Tensor, width: int) -> Callable[..., None]:
    """vLLM's layers return the stream as two addends; the second is the residual."""

    def left(module: nn.Module, _args: Any, output: Any) -> None:
        hidden, residual = output if isinstance(output, tuple) else (output, None)
        if not _is_state(hidden, width) or not (residual is None or _is_state(residual, width)):
            raise _unknown(module)
        addend = None if residual is None else _rows(residual)
        torch.ops.sidelight.project(_rows(hidden), addend, layer, order)

    return left


def _last_hook(order: Tensor) -> Callable[..., None]:
    def left(_module: nn.Module, _args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        torch.ops.sidelight.end_pass(_rows(hidden), order)

    return left


def _is_state(value: Any, width: int) -> bool:
    # The models of transformers, which vLLM also runs, see a batch of one.
    return (
        torch.is_tensor(value)
        and value.shape[-1] == width
        and (value.dim() == 2 or (value.dim() == 3 and len(value) == 1))
    )


def _rows(states: Tensor) -> Float[Tensor, "token width"]:
    return states[0] if states.dim() == 3 else states


def _unknown(module: nn.Module) -> SidelightError:
    return SidelightError(
        f"Sidelight does not know how to tap {type(module).__name__}. docs/vllm.md lists the "
        "tested models; serve this one with the transformers engine."
    )
