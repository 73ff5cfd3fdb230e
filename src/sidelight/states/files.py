"""Files of tensors."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sidelight.errors import SidelightError
from sidelight.storage import replacing


def write_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file atomically.

    Args:
        tensors: Tensors by name.
        path: The file, one of many in its folder.
        metadata: Metadata for the header.

    Raises:
        SidelightError: The disk is full or not writable.
    """
    try:
        with replacing(path, is_one_of_many=True) as partial:
            contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
            save_file(contiguous, partial, dict(metadata) if metadata else None)
    except (OSError, SafetensorError) as error:
        raise SidelightError(
            f"Cannot write {path}: {error}. Free some space, or use another disk (SIDELIGHT_CACHE)."
        ) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a file, memory-mapped.

    Raises:
        SidelightError: The file is missing or corrupt.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise SidelightError(
            f"Cannot read {path}: {error}. Delete it, and run the same command again."
        ) from error
