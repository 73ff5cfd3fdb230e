"""Checkpoints of a training run, for resuming after an interruption."""

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from sidelight.errors import SidelightError
from sidelight.progress import say
from sidelight.states.files import write_tensors
from sidelight.training.optimisation import TrainingRun

_EPOCHS, _NUMBERS, _RUN = "epochs", "numbers", "run_sha256"


def save_checkpoint(
    runs: Sequence[TrainingRun], path: Path, *, epochs: int, run_sha256: str
) -> None:
    """Write the runs after this number of epochs, atomically.

    Args:
        runs: The runs.
        path: The file.
        epochs: Number of completed epochs.
        run_sha256: Hash of everything that determines them, which ``resume`` compares.

    Raises:
        SidelightError: The disk is full or not writable.
    """
    states = [run.state() for run in runs]
    tensors = {
        f"{number}.{name}": tensor
        for number, (values, _) in enumerate(states)
        for name, tensor in values.items()
    }
    numbers = json.dumps([numbers for _, numbers in states])
    write_tensors(tensors, path, {_EPOCHS: str(epochs), _NUMBERS: numbers, _RUN: run_sha256})


def resume(runs: Sequence[TrainingRun], path: Path, *, run_sha256: str) -> int:
    """Restore runs from a checkpoint.

    Args:
        runs: Newly created runs.
        path: The checkpoint; ignored if absent.
        run_sha256: As for ``save_checkpoint``. If the checkpoint has another, for example because
            more memory gives larger batches, it is ignored with a message.

    Returns:
        Number of completed epochs; 0 without a checkpoint.

    Raises:
        SidelightError: The file is corrupt.
    """
    if not path.exists():
        return 0
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            if metadata[_RUN] != run_sha256:
                say(f"Training starts over: the settings of the checkpoint {path} differ.")
                return 0
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        numbers = json.loads(metadata[_NUMBERS])
        for number, (run, numbers_of_run) in enumerate(zip(runs, numbers, strict=True)):
            start = f"{number}."
            named = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
            run.set_state(named, numbers_of_run)
        return int(metadata[_EPOCHS])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise SidelightError(
            f"Cannot resume training from {path} ({type(error).__name__}: {error}). Delete it, "
            "and run the same command again."
        ) from error
