"""GGUF files as backbones, identified by header and weight samples, and run by llama.cpp.

The package ``gguf`` reads the header, and nothing is dequantised. llama.cpp loads the file when
hidden states are first needed.
"""

from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import tokenizers
import torch
import transformers
from gguf import GGML_QUANT_SIZES, GGUFReader, ReaderTensor
from jaxtyping import Float
from pydantic import BaseModel, Field
from torch import Tensor
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from sidelight.errors import SidelightError, did_you_mean
from sidelight.models.checkpoint import Checkpoint, fingerprint, model_folder
from sidelight.models.conversation import EncodedPrompt, PromptFormat
from sidelight.models.encode import PromptEncoder
from sidelight.models.fingerprint import hash_of
from sidelight.models.machine import free_memory
from sidelight.models.smollm2 import cache_root
from sidelight.progress import Progress
from sidelight.states.cache import ActivationCache
from sidelight.states.extraction import tapped_states
from sidelight.states.reader import Tap
from sidelight_llama.context import LlamaContext, LlamaModel
from sidelight_llama.decoder import Slot, read_text
from sidelight_llama.library import BY_CALLBACK, BY_LAYER_INPUT, PINNED
from sidelight_llama.trial import SAMPLE, keep, try_once

_BLOCKS_PER_WEIGHT = 16
_SIZES = ("block_count", "context_length", "embedding_length")
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_NOT_READ = {
    "keeps a state other than keys and values": (
        "arwkv7 bailingmoe3 deepseek4 falcon-h1 glm5-next granitehybrid jamba kimi-k3 kimi-linear "
        "lfm2 lfm2moe mamba mamba2 minimax-01 nemotron_h nemotron_h_moe plamo2 qwen35 qwen35moe "
        "qwen3next qwen4exp rwkv6 rwkv6qwen2 rwkv7"
    ),
    "has an encoder": "t5 t5encoder",
    "embeds texts but generates none": (
        "bert eurobert gemma-embedding gemma-embedding2 jina-bert-v2 jina-bert-v3 llama-embed "
        "modern-bert neo-bert nomic-bert nomic-bert-moe"
    ),
    "generates by diffusion": "dream llada llada-moe rnd1",
    "reads images or sound": (
        "chameleon clip cogvlm deepseek2-ocr hunyuan_vl paddleocr qwen2vl qwen3vl qwen3vlmoe"
    ),
}


class LlamaBackbone:
    """A frozen causal LM of a GGUF file.

    Args:
        path: The file.
        name: Its name in messages and cards; defaults to the file's name.
        tokenizer: Folder or hub id of its tokenizer; None uses the file's own.
        prompt_format: As for ``load_backbone``.
        threads: Number of threads; None means one less than the number of cores.

    Attributes:
        is_exact: Whether its weights are float32; if so, keys and values are too.

    Raises:
        SidelightError: The file is damaged, its states cannot be read, or the tokenizer belongs to
            another model.
    """

    engine = f"llama.cpp {PINNED}"
    device = torch.device("cpu")
    # One prompt at a time, because several together are not faster on a CPU.
    batch_tokens = 1
    can_share_prefixes = True

    def __init__(
        self,
        path: Path,
        *,
        name: str | None = None,
        tokenizer: str | None = None,
        prompt_format: PromptFormat | None = None,
        threads: int | None = None,
    ):
        self.path, self.name, self.threads = path, name or path.name, threads
        reader, tokens, self._architecture, config = _read(path)
        self._config = config
        samples = {tensor.name: _sample(tensor) for tensor in reader.tensors}
        checkpoint = Checkpoint(config, samples, _dtype(reader))
        self.is_exact = checkpoint.dtype == "float32"
        header = sha256(reader.data[: reader.data_offset].tobytes()).hexdigest()
        loaded = _tokenizer(path, tokenizer, header)
        limit = config["context_length"]
        self.encoder = PromptEncoder(loaded, prompt_format=prompt_format, max_tokens=limit)
        self.fingerprint = fingerprint(
            checkpoint,
            self.encoder,
            name=self.name,
            # Without the output of the last block, which llama.cpp does not provide for every
            # token.
            layers=config["block_count"],
            width=config["embedding_length"],
        )
        trial_key = f"{header} {self.fingerprint.weights} {path.stat().st_size}"
        sample = try_once(path, self._architecture, trial_key)
        _require_tokens(path, loaded, tokens, sample)
        self._tap: Tap | None = None
        self._context: LlamaContext | None = None
        self._prefix: tuple[int, ...] = ()

    @property
    def max_tokens(self) -> int:
        """Context length in tokens."""
        return self.encoder.max_tokens

    def states(
        self, cache: ActivationCache, rows: Sequence[int], advance: Progress
    ) -> Generator[Mapping[int, Float[Tensor, "layer _ width"]]]:
        """As ``Reader.states``."""
        return tapped_states(self, cache, rows, advance)

    @cached_property
    def model(self) -> LlamaModel:
        """The model in llama.cpp, loaded on first access."""
        return LlamaModel(self.path, self._architecture)

    def limited(self, max_tokens: int) -> "LlamaBackbone":
        """A copy for texts of at most ``max_tokens``, if the limit was larger."""
        limited, base = copy(self), self.encoder
        if max_tokens < base.max_tokens:
            limited.encoder = PromptEncoder(
                base.tokenizer,
                prompt_format=base.prompt_format,
                max_tokens=max_tokens,
                more=f" Of the {base.max_tokens} tokens that the model knows, a server allows more "
                "with --engine-option tokens=N.",
            )
        return limited

    def context(self, *, sequences: int, positions: int) -> LlamaContext:
        """Allocate keys and values for some texts.

        Raises:
            SidelightError: There is not enough memory.
        """
        needed = sequences * positions * _token_bytes(self._config, is_exact=self.is_exact)
        unread = 0 if "model" in vars(self) else self.path.stat().st_size
        free = free_memory()
        # llama.cpp fills both immediately, and the system would kill the process silently.
        if free is not None and needed + unread > free:
            texts = f"a text of {positions} tokens"
            remedy = "Shorten the text, classify it in parts"
            if sequences > 1:
                texts = f"{sequences} texts of {positions} tokens (one only to classify)"
                remedy = (
                    "Serve fewer or shorter texts at once (--engine-option texts=N "
                    "--engine-option tokens=N)"
                )
            raise SidelightError(
                f"There is not enough memory for {texts}: keys and values take "
                f"{needed / 1e9:.1f} GB and the weights {unread / 1e9:.1f} GB, and "
                f"{free / 1e9:.1f} GB are free. {remedy}, or free some memory."
            )
        return LlamaContext(
            self.model,
            sequences=sequences,
            positions=positions,
            is_exact=self.is_exact,
            threads=self.threads,
        )

    @contextmanager
    def tapped(self, tap: Tap) -> Generator[None]:
        """As ``Backbone.tapped``."""
        outer, self._tap = self._tap, tap
        try:
            yield
        finally:
            self._tap = outer

    def run(
        self, prompts: Sequence[EncodedPrompt], *, after: int = 0, layers: int | None = None
    ) -> None:
        """As ``Backbone.run``, for one prompt and all layers; long prompts come in parts."""
        (prompt,) = prompts
        tokens = prompt.token_ids
        if self._context is None or self._context.positions < len(tokens):
            self._context, self._prefix = self.context(sequences=1, positions=len(tokens)), ()
        if tokens[:after] != self._prefix:
            self._context.forget(0)
            self._prefix = ()
            if after:
                _exhaust(read_text(self._context, Slot(0), tokens[:after], None))
                self._prefix = tokens[:after]
        self._context.forget(0, start=after)
        _exhaust(read_text(self._context, Slot(0, after), tokens[after:], self._tap))


def _exhaust(chunks: Generator[None, None, Tensor]) -> None:
    for _ in chunks:
        pass


class _Reader(GGUFReader):
    """A reader with plain arrays; with ``np.memmap``, a vocabulary takes seconds."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, np.asarray(value) if name == "data" else value)


def _read(path: Path) -> tuple[GGUFReader, list[str], str, dict[str, Any]]:
    """Read the file: its vocabulary, its architecture, and the configuration in the header."""
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise SidelightError(
                    f"{path} is not a GGUF file despite its name. Copy it again, or name another "
                    "file."
                )
        reader = _Reader(path)
        return reader, _value(reader, "tokenizer.ggml.tokens", []), *_read_config(path, reader)
    except OSError as error:
        raise SidelightError(
            f"Cannot read {path}: {error.strerror}. Check its permissions."
        ) from error
    except (ValueError, TypeError, IndexError, KeyError, OverflowError) as error:
        raise SidelightError(f"{path} is not a complete GGUF file. Copy it again.") from error


def _value(reader: GGUFReader, key: str, default: Any = None) -> Any:
    field = reader.fields.get(key)
    return default if field is None else field.contents()


def _read_config(path: Path, reader: GGUFReader) -> tuple[str, dict[str, Any]]:
    """Read the architecture, and its configuration in the header.

    Raises:
        SidelightError: Hidden states of the file cannot be read.
    """
    architecture = str(_value(reader, "general.architecture"))
    start = f"{architecture}."
    config = {
        key.removeprefix(start): field.contents()
        for key, field in reader.fields.items()
        if key.startswith(start)
    }
    kind = _value(reader, "general.type", "model")
    why = next((why for why, names in _NOT_READ.items() if architecture in names.split()), None)
    if kind != "model":
        why = f"is of type '{kind}', which is only part of a model, such as a LoRA adapter"
    elif _value(reader, "split.count", 1) > 1:
        why = "is one of several parts; merge them with llama-gguf-split --merge"
    elif why is not None:
        why = f"contains a model of the architecture '{architecture}', which {why}"
    elif architecture not in BY_LAYER_INPUT | BY_CALLBACK:
        known = did_you_mean(architecture, BY_LAYER_INPUT | BY_CALLBACK)
        why = f"contains a model of the unknown architecture '{architecture}'.{known}"
    elif config.get("nextn_predict_layers"):
        why = "has layers for multi-token prediction, whose states do not belong to the text"
    elif any(tensor.name.startswith(("v.", "mm.")) for tensor in reader.tensors):
        why = "contains an image encoder as well as a language model"
    elif absent := [name for name in _SIZES if type(config.get(name)) is not int]:
        why = f"lacks the header fields {', '.join(absent)}"
    elif not reader.tensors:
        why = "contains a vocabulary but no weights"
    if why is not None:
        raise SidelightError(f"Probes cannot read {path}: the file {why}.")
    return architecture, {"architecture": architecture, **config}


def _token_bytes(config: Mapping[str, Any], *, is_exact: bool) -> int:
    """Size in bytes of a token's keys and values in all layers."""
    heads = config["attention.head_count"]
    kv_heads = np.broadcast_to(config.get("attention.head_count_kv", heads), config["block_count"])
    width = config["embedding_length"] // np.max(heads)
    lengths = (config.get(f"attention.{what}_length", width) for what in ("key", "value"))
    return int(kv_heads.sum() * sum(lengths)) * (4 if is_exact else 2)


def _sample(tensor: ReaderTensor) -> tuple[tuple[int, ...], bytes]:
    """The shape of a tensor, its type, and evenly spaced blocks."""
    blocks = tensor.data.reshape(-1).view(np.uint8)
    blocks = blocks.reshape(-1, GGML_QUANT_SIZES[tensor.tensor_type][1])
    chosen = blocks[:: max(1, len(blocks) // _BLOCKS_PER_WEIGHT)]
    shape = tuple(int(size) for size in tensor.shape)
    return shape, tensor.tensor_type.name.encode() + chosen.tobytes()


def _dtype(reader: GGUFReader) -> str:
    """Dtype of most values."""
    values: Counter[str] = Counter()
    for tensor in reader.tensors:
        values[tensor.tensor_type.name] += int(tensor.n_elements)
    name = values.most_common(1)[0][0]
    return _DTYPES.get(name, name)


def _tokenizer(path: Path, source: str | None, header: str) -> Any:
    """Load the named tokenizer, or the file's own, which transformers takes seconds to build."""
    disable_progress_bar()
    key = hash_of(transformers.__version__, tokenizers.__version__, header)
    cached = cache_root() / "gguf" / f"{key}.tokenizer.json"
    if source is None and (tokenizer := _cached_tokenizer(cached)) is not None:
        return tokenizer
    try:
        if source is not None:
            folder = model_folder(source, with_weights=False)
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(
            path.parent, gguf_file=path.name, trust_remote_code=False
        )
    except Exception as error:
        # The libraries may raise anything.
        what = f"'{source}' is not a tokenizer" if source else f"{path} contains no tokenizer"
        raise SidelightError(
            f"{what} that transformers can read ({type(error).__name__}). Name the folder or hub "
            "id of the model's own tokenizer with --tokenizer."
        ) from error
    keep(cached, lambda: _cache_entry(tokenizer))
    return tokenizer


class _CachedTokenizer(BaseModel):
    """A tokenizer in the cache: its hash, and its files by plain names, without paths."""

    tokenizer: str
    files: dict[Annotated[str, Field(pattern=r"^\w[^/\\]*$")], str]


def _cache_entry(tokenizer: Any) -> dict[str, Any]:
    """The cache entry of a tokenizer.

    Raises:
        OSError: There is no room for the temporary files.
    """
    with TemporaryDirectory() as folder:
        try:
            tokenizer.save_pretrained(folder)
        except Exception as error:
            # The Rust library has no specific exception for a full disk.
            raise OSError(str(error)) from error
        files = {file.name: file.read_text("utf-8") for file in Path(folder).glob("*.*")}
    return _CachedTokenizer(tokenizer=_tokenizer_hash(tokenizer), files=files).model_dump()


def _cached_tokenizer(cached: Path) -> Any:
    """The tokenizer in a cache file; None if missing or changed."""
    with suppress(Exception), TemporaryDirectory() as folder:
        entry = _CachedTokenizer.model_validate_json(cached.read_bytes())
        for name, text in entry.files.items():
            (Path(folder) / name).write_text(text, "utf-8")
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if _tokenizer_hash(tokenizer) == entry.tokenizer:
            return tokenizer
    return None


def _tokenizer_hash(tokenizer: Any) -> str:
    """A hash that identifies a tokenizer's behaviour."""
    controls = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    fields = tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, controls
    return hash_of(type(tokenizer), *fields)


def _require_tokens(path: Path, tokenizer: Any, tokens: Sequence[str], sample: list[int]) -> None:
    """Check that a tokenizer tokenizes like llama.cpp.

    Args:
        path: The file.
        tokenizer: The tokenizer.
        tokens: The file's vocabulary.
        sample: Token ids of ``SAMPLE`` from llama.cpp.

    Raises:
        SidelightError: The tokenizer differs.
    """
    got = tokenizer(SAMPLE, add_special_tokens=False)["input_ids"]
    added: dict[int, Any] = tokenizer.added_tokens_decoder
    foreign = [i for i, token in added.items() if i < len(tokens) and tokens[i] != str(token)]
    if got != sample or foreign:
        what = f"token {foreign[0]} is '{added[foreign[0]]}'" if foreign else f"it gives {got[:8]}"
        raise SidelightError(
            f"The tokenizer does not belong to {path}: {what}, which differs from llama.cpp. "
            "Name the folder or hub id of the model's own tokenizer with --tokenizer."
        )
