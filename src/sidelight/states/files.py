"""Files of tensors."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sidelight.errors import SidelightError
from sidelight.storage import replacing


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """A safetensors file that exists afterwards whole or, if killed, not at all.

    Raises:
        SidelightError: The disk is full, or cannot be written.
    """
    try:
        with replacing(path, is_one_of_many=True) as partial:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
    except (OSError, SafetensorError) as error:
        raise SidelightError(
            f"Cannot write {path}: {error}. Free some space, or name another disk "
            "(SIDELIGHT_CACHE)."
        ) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, mapped from disk.

    Raises:
        SidelightError: The file is absent or broken.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise SidelightError(
            f"Cannot read {path}: {error}. Delete it, and run the same command again."
        ) from error
