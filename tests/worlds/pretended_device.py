"""A device that is only pretended, so that faults of devices show without a GPU.

Tensors on ``pretend:0`` say that they lie there and are computed on the CPU, by a GPU's rules: an
operation with a tensor of another device beside it raises (numbers without dimensions and indices
aside), a generator of the CPU cannot draw there, ``.numpy()`` raises, and what is made without a
device lies on the CPU. On ``pretend:1``, a second device, there is no float64, as on Apple's.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

CPU = torch.device("cpu")
FIRST, SECOND = torch.device("privateuseone", 0), torch.device("privateuseone", 1)
# What may have tensors of several devices.
_MOVES = ("aten::_to_copy", "aten::copy_", "aten::to.")
# Their results are numbers of Python.
_VALUES = ("aten::_local_scalar_dense", "aten::equal")
# An index may lie on the CPU.
_INDEXED = ("aten::index.Tensor", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
# What has a kernel of its own: what is made empty first and resized then, which a wrapper cannot
# follow; and the copy of ``torch.tensor``, which reaches no fallback.
_KERNELS = (
    *("arange.default", "arange.start", "arange.start_step"),
    *("randperm.default", "randperm.generator", "eye.default", "eye.m"),
    "_to_copy.default",
)


class _Backend:
    """What PyTorch asks of a backend's module; the devices are there while one pretends."""

    devices = 0

    def is_available(self) -> bool:
        return self.devices > 0

    def device_count(self) -> int:
        return self.devices

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    # The CPU draws its numbers.
    def manual_seed_all(self, seed: int) -> None: ...

    def get_rng_state(self, device: Any = 0) -> Tensor:
        return torch.zeros(0, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor, device: Any = 0) -> None: ...


if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
    pytest.skip("This PyTorch knows no backends in Python.", allow_module_level=True)
backend_registration._setup_privateuseone_for_python_backend("pretend", backend_module=_Backend())


class Elsewhere(torch.Tensor):
    """A tensor on a pretended device; ``numbers`` lies on the CPU."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor, device: torch.device) -> "Elsewhere":
        # A view of a tensor that is none of inference mode must not be one either.
        with torch.inference_mode(mode=False):
            tensor = torch.Tensor._make_wrapper_subclass(
                cls,
                numbers.shape,
                strides=numbers.stride(),
                storage_offset=numbers.storage_offset(),
                dtype=numbers.dtype,
                device=device,
                requires_grad=numbers.requires_grad,
            )
        tensor.numbers = numbers.detach()
        return tensor

    def numpy(self, *, force: bool = False) -> np.ndarray:
        if not force:
            raise TypeError(
                f"A tensor on {self.device} has no NumPy array; use Tensor.cpu() first."
            )
        return self.numbers.numpy(force=True)

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        return self.numpy()

    def tolist(self) -> Any:
        return self.numbers.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name, leaves = func.name(), tree_leaves((args, kwargs))
    if name == "aten::record_stream":
        return None
    elsewhere = [leaf for leaf in leaves if isinstance(leaf, Elsewhere)]
    devices = [leaf for leaf in leaves if isinstance(leaf, torch.device)]
    if not name.startswith(_MOVES):
        _require_one_device(name, args, [leaf for leaf in leaves if isinstance(leaf, Tensor)])
    device = devices[0] if devices else elsewhere[0].device if elsewhere else CPU
    if (generator := kwargs.get("generator")) is not None and generator.device != device:
        raise RuntimeError(f"A generator of {generator.device} cannot draw on {device} ({name}).")
    result = func(*tree_map(_on_cpu, args), **tree_map(_on_cpu, kwargs))
    assert all(tensor.shape == tensor.numbers.shape for tensor in elsewhere), f"{name} resizes"
    if name in _VALUES:
        return result
    if name == "aten::copy_":
        return args[0]
    sources = {id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}
    # What is changed in place stays the tensor that it was.
    before = {id(_on_cpu(tensor)): tensor for tensor in sources.values()}

    def placed(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        same = before.get(id(leaf))
        if same is not None and same.device == device:
            return same
        # Another device has a memory of its own.
        numbers = leaf if same is None else leaf.clone()
        return numbers if device == CPU else _placed(numbers, device, name)

    return tree_map(placed, result)


def _on_cpu(leaf: Any) -> Any:
    if isinstance(leaf, torch.device):
        return CPU
    return leaf.numbers if isinstance(leaf, Elsewhere) else leaf


def _placed(numbers: Tensor, device: torch.device, name: str) -> Elsewhere:
    device = torch.device(FIRST.type, device.index or 0)
    if device == SECOND and numbers.dtype == torch.float64:
        raise TypeError(f"There is no float64 on {device} ({name}).")
    return Elsewhere(numbers, device)


def _require_one_device(name: str, args: Any, tensors: list[Tensor]) -> None:
    counted = [tensor for tensor in tensors if tensor.dim()]
    if name in _INDEXED:
        # A tensor of the CPU takes no index from elsewhere.
        on_device = isinstance(args[0], Elsewhere)
        indices = [each for each in args[1] if isinstance(each, Tensor)]
        counted = [
            tensor
            for tensor in counted
            if not (on_device and any(tensor is each for each in indices))
        ]
    devices = {tensor.device for tensor in counted}
    if len(devices) > 1:
        shapes = ", ".join(f"{[*tensor.shape]} on {tensor.device}" for tensor in counted)
        raise RuntimeError(f"Expected all tensors on one device, got {shapes} ({name}).")


# What is made there from nothing.
_LIBRARIES = [torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")]
_LIBRARIES[0].fallback(lambda func, *args, **kwargs: _run(func, args, kwargs), "PrivateUse1")
for _name in _KERNELS:
    _function = torch.ops.aten
    for _attribute in _name.split("."):
        _function = getattr(_function, _attribute)
    _LIBRARIES[1].impl(
        _name.removesuffix(".default"),
        lambda *args, _function=_function, **kwargs: _run(_function, args, kwargs),
        "PrivateUse1",
    )


@contextmanager
def pretended() -> Iterator[torch.device]:
    """The first device; modules can be moved to it meanwhile."""
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    # The class of a parameter cannot change in place.
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with pytest.MonkeyPatch.context() as patch:
            # What reaches no backend that is written in Python.
            patch.setattr(torch.accelerator, "synchronize", lambda _device: None)
            patch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
            patch.setattr(_Backend, "devices", 2)
            yield FIRST
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swaps)
