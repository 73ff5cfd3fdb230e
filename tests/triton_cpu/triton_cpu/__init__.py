"""A Triton backend that compiles nothing, so that vLLM's model runner V2 runs without a GPU.

Kernels run in Triton's interpreter (``TRITON_INTERPRET=1``). The tests put this folder on the path.
"""

from typing import Any

import numpy as np
from triton._C.libtriton import interpreter

_nanargmax, _store = np.nanargmax, interpreter.store


def _of_any_row(values: Any, **options: Any) -> Any:
    """Of a row of NaN a GPU takes any index, and vLLM's warm-up draws from unwritten memory."""
    try:
        return _nanargmax(values, **options)
    except ValueError:
        return np.argmax(np.where(np.isnan(values), -np.inf, values), **options)


def _store_masked(pointers: Any, values: Any, mask: Any) -> None:
    """A GPU takes a mask of integers, as vLLM 0.33 has in the warm-up of compiled models."""
    _store(pointers, values, mask.astype(bool))


# The interpreter looks them up by these names.
np.nanargmax = _of_any_row
interpreter.store = _store_masked
