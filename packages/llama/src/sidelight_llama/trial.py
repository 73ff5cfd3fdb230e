"""A trial of a GGUF file: reading its first tokens in a separate process.

llama.cpp aborts the process if a file is not as expected. A successful result is cached by the
identity of the file, and the trial is not repeated.
"""

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from signal import Signals
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, TypeAdapter

from sidelight.errors import SidelightError
from sidelight.models.fingerprint import hash_of
from sidelight.models.machine import free_memory
from sidelight.models.smollm2 import cache_root
from sidelight.storage import write_json
from sidelight_llama.context import LlamaContext, LlamaModel
from sidelight_llama.library import PINNED, require_version

_log = logging.getLogger(__name__)

SAMPLE = "I'm sure: 3.14159 of 2024's   users\n\n\tdon't read “übergroße” 你好 😀 == {x}\r\n"
"""A text that tokenizers split differently."""
_TOKENS = 8
_MOST_DIFFERENCE = 0.01
# The cached result of a file; anything else is ignored.
_TRIAL = TypeAdapter(dict[Literal["sample"], Annotated[list[int], Field(min_length=1)]])


def try_once(path: Path, architecture: str, key: str) -> list[int]:
    """Tokenize ``SAMPLE`` with llama.cpp, after a trial pass over a few tokens.

    Args:
        path: The file.
        architecture: Its ``general.architecture``.
        key: Identity from its header and weights.

    Raises:
        SidelightError: llama.cpp is not installed or cannot read the file, or there is not enough
            memory for its weights.
    """
    require_version()
    cached = cache_root() / "gguf" / f"{hash_of(PINNED, key)}.json"
    with suppress(OSError, ValueError, KeyError):
        return _TRIAL.validate_json(cached.read_bytes(), strict=True)["sample"]
    size, free = path.stat().st_size, free_memory()
    if free is not None and size > free:
        raise SidelightError(
            f"There is not enough memory for the weights of {path}: they take {size / 1e9:.1f} "
            f"GB, and {free / 1e9:.1f} GB are free. Free some memory, or use a smaller file of "
            "this model."
        )
    # -P: otherwise Python would import from the working directory, which may contain downloads.
    command = [sys.executable, "-P", "-m", __name__, str(path), architecture]
    ended = subprocess.run(command, capture_output=True, text=True, errors="replace")
    lines = ended.stderr.strip().splitlines()
    if ended.returncode == 2 and lines:
        raise SidelightError(lines[-1])
    if ended.returncode:
        signal = f" by {Signals(-ended.returncode).name}" if ended.returncode < 0 else ""
        why = next((line for line in lines if "GGML_ASSERT" in line), lines[-1] if lines else "")
        raise SidelightError(
            f"llama.cpp was terminated{signal} while reading the first tokens of {path}, so the "
            f"file cannot be served{': ' if why else ''}{why.strip()}. Use another file of this "
            "model."
        )
    result = json.loads(ended.stdout.splitlines()[-1])
    keep(cached, lambda: result)
    return result["sample"]


def keep(path: Path, make: Callable[[], Any]) -> None:
    """Write an optional cache entry; on failure, log a warning."""
    try:
        write_json(path, make())
    except OSError as error:
        _log.warning(
            "Cannot keep %s (%s), so every start takes seconds longer. Free some disk space, or "
            "set SIDELIGHT_CACHE to a folder that can be written.",
            path,
            error.strerror or error,
        )


def _try(path: Path, architecture: str) -> list[int]:
    """Read tokens in one pass and in two, then one more token of both; the states must agree."""
    model = LlamaModel(path, architecture)
    context = LlamaContext(model, sequences=2, positions=_TOKENS + 1, threads=1)
    sample = model.tokenize(SAMPLE)
    tokens, half = sample[:_TOKENS], _TOKENS // 2
    states: list[np.ndarray] = []
    for sequence, start, stop in ((0, 0, _TOKENS), (1, 0, half), (1, half, _TOKENS)):
        context.decode(tokens[start:stop], range(start, stop), [sequence] * (stop - start))
        states.append(context.rows().copy())
    context.decode(tokens[:2], [_TOKENS, _TOKENS], [0, 1], outputs=[0, 1])
    once, twice = states[0], np.concatenate(states[1:], 1)
    size, difference = (np.linalg.norm(each, axis=2) for each in (once, once - twice))
    if not (np.isfinite(size) & (size > 0) & (difference <= _MOST_DIFFERENCE * size)).all():
        raise SidelightError(
            f"llama.cpp computes different hidden states of {path} in two passes than in one, or "
            "states that are not finite, so probes cannot read it. Use another file of this "
            "model."
        )
    return sample


if __name__ == "__main__":
    try:
        print(json.dumps({"sample": _try(Path(sys.argv[1]), sys.argv[2])}))
    except SidelightError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
