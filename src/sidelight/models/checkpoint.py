"""The files of a model, read without loading the model, and its fingerprint.

Only the configuration and a few values of each weight are read.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Annotated, Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sidelight.errors import transport_errors
from sidelight.models.encode import PromptEncoder
from sidelight.models.fingerprint import Fingerprint, hash_of

_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
# Files of a model on the hub: its description, and its weights.
_DESCRIPTION = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
_WEIGHT_FILES = ("model*.safetensors",)
_VALUES_PER_WEIGHT = 16

# Buffers of older files, which transformers computes and no longer saves.
_COMPUTED = ("rotary_emb.inv_freq", "masked_bias", ".attn.bias", ".attention.bias")
_INPUT_EMBEDDINGS = (
    "embed_tokens.weight", "embed_in.weight", "word_embeddings.weight", "wte.weight",
)  # fmt: skip
_OUTPUT_EMBEDDINGS = ("lm_head.weight", "embed_out.weight")
# Configuration entries that do not change what the model computes.
_VOLATILE = {
    "_name_or_path", "architectures", "attn_implementation", "dtype", "torch_dtype",
    "transformers_version", "use_cache", "name_or_path",
}  # fmt: skip
_SAMPLE = "The quick brown fox, 1234567890 times: jumps!\n\tüber Straßen 你好"


# The shape of a weight, and evenly spaced values as the bytes of bf16 numbers.
_Sample = tuple[tuple[int, ...], bytes]


class _Index(BaseModel):
    """The index of a sharded model: the file of each weight, all in the folder of the index."""

    weight_map: dict[str, Annotated[str, Field(pattern=r"^\w[^/\\]*$")]]
    metadata: dict[str, Any] = Field(default_factory=dict)

    @property
    def total_size(self) -> int:
        """Bytes of all weights; 0 if the index does not state it."""
        size = self.metadata.get("total_size")
        return int(size) if isinstance(size, int | float) else 0


@dataclass(frozen=True)
class Checkpoint:
    """The description of a model from its files.

    Attributes:
        config: The entries of ``config.json``, or of the header of a GGUF file.
        samples: Sample of every weight, by its name in the files.
        dtype: Dtype of most values.
    """

    config: Mapping[str, Any]
    samples: Mapping[str, _Sample]
    dtype: str

    @staticmethod
    def read(folder: Path) -> "Checkpoint":
        """Read a folder, in milliseconds and without memory, regardless of the size of the model.

        Raises:
            FileNotFoundError: The folder has no weights in safetensors files.
            OSError: A file cannot be read.
            ValueError: A file is damaged.
        """
        config = json.loads((folder / _CONFIG).read_text("utf-8"))
        samples: dict[str, _Sample] = {}
        values: Counter[str] = Counter()
        for path in _weight_files(folder):
            for name, dtype, read in _read_samples(path):
                if samples.setdefault(name, read) != read:
                    raise ValueError(
                        f"{folder} has two different weights '{name}'. Keep only one set of "
                        "weight files."
                    )
                values[str(dtype).removeprefix("torch.")] += prod(read[0])
        return Checkpoint(config, _as_used(samples), values.most_common(1)[0][0])


def model_folder(name: str, *, with_weights: bool = True) -> Path:
    """The folder of a model, downloaded first if it is on the hub and not cached.

    Everything about a model is read from this folder, so the hub is queried once, without retries
    per file.

    Args:
        name: A folder, or a hub id.
        with_weights: Whether the weights are downloaded too.

    Raises:
        OSError: The model does not exist, or the hub cannot be reached.
        ValueError: The name is not a valid name of a model.
    """
    if Path(name).is_dir():
        return Path(name)
    patterns = [*_DESCRIPTION, *(_WEIGHT_FILES if with_weights else ())]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except RepositoryNotFoundError as error:
        raise OSError(
            "it is neither a local folder nor a model on the Hugging Face hub that you can "
            "access. Check the name; for a private or gated model, run `hf auth login`."
        ) from error
    except LocalEntryNotFoundError as error:
        raise OSError(
            "there is no such folder, the Hugging Face hub cannot be reached, and its cache has no "
            "complete copy. Check the name and the network."
        ) from error
    except transport_errors() as error:
        raise OSError(
            f"the request to the Hugging Face hub failed ({type(error).__name__}). Try again."
        ) from error


def stored_bytes(folder: Path) -> int:
    """Size of a model's weights in bytes, from the files, or from the index before they are
    downloaded.

    Raises:
        ValueError: The index is damaged.
    """
    index = _read_index(folder)
    paths = {folder / name for name in (_WEIGHTS, *index.weight_map.values())}
    return max(index.total_size, sum(path.stat().st_size for path in paths if path.exists()))


def _sample(weight: Tensor) -> _Sample:
    values = weight.flatten()[:: max(1, weight.numel() // _VALUES_PER_WEIGHT)]
    numbers = values.to(torch.bfloat16).view(torch.int16).cpu().numpy()
    return tuple(weight.shape), numbers.tobytes()


def _read_index(folder: Path) -> _Index:
    """The index of the weights; empty if there is none."""
    if not (folder / _INDEX).exists():
        return _Index(weight_map={})
    try:
        return _Index.model_validate_json((folder / _INDEX).read_bytes())
    except ValidationError as error:
        raise ValueError(
            f"{folder / _INDEX} is not a valid index of the files in its folder. Save the model "
            "again with save_pretrained."
        ) from error


def _weight_files(folder: Path) -> Iterable[Path]:
    # If both exist, engines differ in which they load.
    names = {_WEIGHTS} if (folder / _WEIGHTS).exists() else set[str]()
    names |= {*_read_index(folder).weight_map.values()}
    if not names:
        raise FileNotFoundError(
            f"{folder} has no {_WEIGHTS} or {_INDEX}, which identify a model. Save the model "
            "again with save_pretrained."
        )
    return sorted(folder / name for name in names)


def _read_samples(path: Path) -> Iterator[tuple[str, torch.dtype, _Sample]]:
    try:
        # Memory-mapped: only the pages of a few values of each weight are read.
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                weight = file.get_tensor(name)
                yield name, weight.dtype, _sample(weight)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a complete safetensors file ({error}). Copy it again."
        ) from error


def _as_used(samples: Mapping[str, _Sample]) -> dict[str, _Sample]:
    """Add the output embeddings, which files omit if they equal the input embeddings."""
    used = {name: s for name, s in sorted(samples.items()) if not name.endswith(_COMPUTED)}
    if not any(name.endswith(_OUTPUT_EMBEDDINGS) for name in used):
        tied = next((s for name, s in used.items() if name.endswith(_INPUT_EMBEDDINGS)), None)
        if tied is not None:
            used["lm_head.weight"] = tied
    return used


def fingerprint(
    checkpoint: Checkpoint,
    encoder: PromptEncoder,
    *,
    name: str,
    layers: int,
    width: int,
) -> Fingerprint:
    """The fingerprint of a model; takes well under a second.

    Args:
        checkpoint: Description of the model's files.
        encoder: Encoder of its prompts: the tokenizer, and how texts are rendered.
        name: Name that the user gave.
        layers: Number of hidden states that a probe reads.
        width: Size of a hidden state.
    """
    tokenizer = encoder.tokenizer
    return Fingerprint(
        name=name,
        config=hash_of(_stable(checkpoint.config)),
        weights=_weights_hash(checkpoint.samples),
        tokenizer=hash_of(sorted(tokenizer.get_vocab().items()), tokenizer(_SAMPLE)["input_ids"]),
        template=hash_of(str(tokenizer.chat_template)) if encoder.uses_template else "raw",
        layers=layers,
        width=width,
        dtype=checkpoint.dtype,
    )


def _stable(entries: Any) -> Any:
    """Remove entries that do not change what the model computes, at any depth."""
    if not isinstance(entries, Mapping):
        return entries
    return {
        key: _stable(value)
        for key, value in entries.items()
        if key not in _VOLATILE and not key.startswith("_")
    }


def _weights_hash(samples: Mapping[str, _Sample]) -> str:
    digest = sha256()
    for key, (shape, values) in sorted(samples.items()):
        digest.update(f"{key}{shape}".encode())
        digest.update(values)
    return digest.hexdigest()[:16]
