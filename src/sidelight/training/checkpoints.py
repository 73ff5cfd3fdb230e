"""Training that continues after a kill: what runs need after an epoch, in one file."""

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sidelight.errors import SidelightError
from sidelight.storage import replacing
from sidelight.training.optimisation import TrainingRun

_EPOCHS, _NUMBERS = "epochs", "numbers"


def save_checkpoint(runs: Sequence[TrainingRun], path: Path, *, epochs: int) -> None:
    """Write the runs after so many epochs, whole or not at all.

    Raises:
        SidelightError: The disk is full, or cannot be written.
    """
    states = [run.state() for run in runs]
    tensors = {
        f"{number}.{name}": tensor.contiguous()
        for number, (own, _) in enumerate(states)
        for name, tensor in own.items()
    }
    metadata = {_EPOCHS: str(epochs), _NUMBERS: json.dumps([numbers for _, numbers in states])}
    try:
        with replacing(path) as partial:
            save_file(tensors, partial, metadata)
    except (OSError, SafetensorError) as error:
        raise SidelightError(
            f"Cannot write {path}: {error}. Free some space, or name another disk "
            "(SIDELIGHT_CACHE)."
        ) from error


def resume(runs: Sequence[TrainingRun], path: Path) -> int:
    """Restore runs from a checkpoint.

    Args:
        runs: Newly created runs.
        path: The checkpoint; ignored if absent.

    Returns:
        Number of completed epochs; 0 without a checkpoint.

    Raises:
        SidelightError: The file is corrupt, or belongs to another training.
    """
    if not path.exists():
        return 0
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        numbers = json.loads(metadata[_NUMBERS])
        for number, (run, own) in enumerate(zip(runs, numbers, strict=True)):
            start = f"{number}."
            named = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
            run.set_state(named, own)
        return int(metadata[_EPOCHS])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise SidelightError(
            f"Cannot continue the training from {path} ({type(error).__name__}: {error}). Delete "
            "it, and run the same command again."
        ) from error
