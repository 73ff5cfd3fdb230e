"""Models of ``transformers`` by name, and taps on their hidden states.

Any Hugging Face causal LM can be a backbone: decoder blocks are found by structure, not by name.
"""

import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils.logging import disable_progress_bar

from sidelight.errors import SidelightError
from sidelight.models.checkpoint import Checkpoint, fingerprint, model_folder, stored_bytes
from sidelight.models.conversation import EncodedPrompt, PromptFormat
from sidelight.models.encode import PromptEncoder
from sidelight.models.fingerprint import Fingerprint
from sidelight.models.machine import find_device, free_memory, keeps_shapes, lacks_bfloat16
from sidelight.models.smollm2 import EMBEDDED_NAME, MODELS, embedded_model_path, require_model
from sidelight.probes.ragged import BATCH_TOKENS, padded_length
from sidelight.progress import Progress
from sidelight.states.cache import ActivationCache
from sidelight.states.extraction import tapped_states
from sidelight.states.reader import Model, Tap


def cache_prefix(model: Any, prefix: Int[Tensor, " prefix"]) -> DynamicCache:
    """Compute the keys and values of a prefix of at least one token.

    Args:
        model: A causal model of ``transformers`` for which ``can_share`` is true.
        prefix: Token ids.
    """
    cache = DynamicCache()
    _read_prefix(model, prefix, cache)
    return cache


def _read_prefix(model: Any, prefix: Int[Tensor, " prefix"], cache: DynamicCache) -> None:
    model(input_ids=prefix[None], use_cache=True, **{cache_name(model): cache})


def run_with_prefix(
    model: Any,
    cache: DynamicCache,
    token_ids: Int[Tensor, "text token"],
    present: Bool[Tensor, "text token"],
    **options: Any,
) -> Any:
    """Run the model on ``token_ids``, where each row follows the prefix in ``cache``.

    Gradients flow back through the prefix. Afterwards, the cache contains the rows as well.

    Args:
        model: The model passed to ``cache_prefix``.
        cache: The result of ``cache_prefix``.
        token_ids: Token ids after the prefix.
        present: Mask of real tokens; padding may be on either side.
        options: Passed to the model's forward pass.
    """
    before = present.new_ones(len(token_ids), cache.get_seq_length())
    cache.batch_repeat_interleave(len(token_ids))
    mask = torch.cat([before, present], 1)
    positions = (mask.cumsum(1) - 1)[:, before.shape[1] :]
    begun = {cache_name(model): cache, "use_cache": True, **options}
    return model(input_ids=token_ids, attention_mask=mask.long(), position_ids=positions, **begun)


def can_share(model: Any) -> bool:
    """Whether the state after a prefix is exactly the keys and values of all its tokens."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    usual = "full_attention" if window is None else "sliding_attention"
    kinds = getattr(config, "layer_types", None) or [usual]
    return set(kinds) == {"full_attention"} and not getattr(model, "_is_stateful", False)


def cache_name(model: Any) -> str:
    """The name of the model's argument for a cache, which transformers 5.24 renamed."""
    return "cache" if "cache" in signature(model.forward).parameters else "past_key_values"


DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_NO_LIMIT = 10**9
_CPU = torch.device("cpu")


class _DepthReachedError(Exception):
    """Ends a pass whose remaining layers are not needed."""


class TransformersBackbone:
    """A frozen causal LM of the ``transformers`` library.

    Args:
        model: The model; it is put into evaluation mode and its weights are frozen.
        tokenizer: Its fast tokenizer.
        name: Its name in messages and cards.
        checkpoint: The files that the model was loaded from and still equals; they identify it.
        prompt_format: ``chat``, ``raw`` or ``both``; None means chat if the tokenizer has a
            template.
    """

    engine = "transformers"
    batch_tokens = BATCH_TOKENS

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        name: str,
        checkpoint: Checkpoint,
        prompt_format: PromptFormat | None = None,
    ):
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        # Each thread that runs the model has its own taps.
        self._local = threading.local()
        self._hook_blocks(_decoder_blocks(model))
        self.encoder, stored = _encoder_and_fingerprint(
            model.config, tokenizer, checkpoint, name=name, prompt_format=prompt_format
        )
        self.fingerprint = replace(stored, dtype=str(model.dtype).removeprefix("torch."))

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.model.device

    @property
    def max_tokens(self) -> int:
        """Context length in tokens."""
        return self.encoder.max_tokens

    def states(
        self, cache: ActivationCache, rows: Sequence[int], advance: Progress
    ) -> Generator[Mapping[int, Float[Tensor, "layer _ width"]]]:
        """As ``Reader.states``."""
        return tapped_states(self, cache, rows, advance)

    @contextmanager
    def tapped(self, tap: Tap) -> Generator[None]:
        """As ``Backbone.tapped``; blocks may be nested."""
        outer, self._tap = self._tap, tap
        try:
            yield
        finally:
            self._tap = outer

    @contextmanager
    def stopping_after(self, layers: int | None) -> Generator[None]:
        """Leave the block once a pass of this thread has computed this many hidden states.

        Args:
            layers: Number of hidden states, from the embedding up; None means complete passes.
        """
        outer, self._local.layers = self._depth, layers
        try:
            yield
        except _DepthReachedError:
            pass
        finally:
            self._local.layers = outer

    @property
    def _depth(self) -> int | None:
        return getattr(self._local, "layers", None)

    @property
    def _tap(self) -> Tap | None:
        return getattr(self._local, "tap", None)

    @_tap.setter
    def _tap(self, tap: Tap | None) -> None:
        self._local.tap = tap

    @torch.inference_mode()
    def run(
        self, prompts: Sequence[EncodedPrompt], *, after: int = 0, layers: int | None = None
    ) -> None:
        """As ``Backbone.run``, in one forward pass that stops after the required layers."""
        token_ids, mask = self.pad(prompts)
        longest = token_ids.shape[1]
        # Longer prompts are alone, and few.
        if keeps_shapes(self.device, self.model.dtype) and longest <= self.batch_tokens:
            # Some models have no positions after their context.
            limit = max(longest, self.max_tokens)
            padding = (0, min(after + padded_length(longest - after), limit) - longest)
            token_ids, mask = pad(token_ids, padding), pad(mask, padding)
        # Without the language-model head, whose logits are not needed here.
        body = self.model.base_model
        if after:
            tap, self._tap = self._tap, None
            begun = DynamicCache()
            # The number of tokens is that of the first block's keys.
            with self.stopping_after(layers and max(layers, 2)):
                _read_prefix(body, token_ids[0, :after], begun)
            self._tap = tap
            with self.stopping_after(layers):
                run_with_prefix(body, begun, token_ids[:, after:], mask[:, after:])
        else:
            with self.stopping_after(layers):
                body(input_ids=token_ids, attention_mask=mask, use_cache=False)

    @property
    def can_share_prefixes(self) -> bool:
        """Whether ``run`` accepts ``after``: see ``can_share``."""
        return can_share(self.model)

    @property
    def last_position(self) -> Int[Tensor, " one"]:
        """The value of ``logits_to_keep`` that keeps the last token only.

        The number 1 would keep a slice that is not contiguous in a batch, so PyTorch would copy the
        output matrix for every row.
        """
        return torch.tensor([-1], device=self.device)

    def pad(
        self, prompts: Sequence[EncodedPrompt], *, side: Literal["left", "right"] = "right"
    ) -> tuple[Int[Tensor, "batch token"], Bool[Tensor, "batch token"]]:
        """Pad the token ids of prompts on one side; return them with a mask of the real tokens."""
        longest = max(len(prompt) for prompt in prompts)
        token_ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros(len(prompts), longest, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            start = longest - len(prompt) if side == "left" else 0
            token_ids[row, start : start + len(prompt)] = torch.tensor(prompt.token_ids)
            mask[row, start : start + len(prompt)] = True
        return token_ids.to(self.device), mask.to(self.device)

    def _hook_blocks(self, blocks: nn.ModuleList) -> None:
        def before_first(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            see(0, args[0] if args else kwargs["hidden_states"])

        def after(layer: int, _module: nn.Module, _args: Any, output: Any) -> None:
            see(layer, output if torch.is_tensor(output) else output[0])

        def see(layer: int, hidden: Tensor) -> None:
            if self._tap is not None:
                self._tap(layer, hidden)
            if layer + 1 == self._depth:
                raise _DepthReachedError

        blocks[0].register_forward_pre_hook(before_first, with_kwargs=True)
        for layer, block in enumerate(blocks, start=1):
            block.register_forward_hook(partial(after, layer))


def _encoder_and_fingerprint(
    config: PreTrainedConfig,
    tokenizer: Any,
    checkpoint: Checkpoint,
    *,
    name: str,
    prompt_format: PromptFormat | None,
) -> tuple[PromptEncoder, Fingerprint]:
    """The encoder of a model's prompts, and its fingerprint."""
    text = config.get_text_config()
    # A tokenizer without a limit reports an astronomically large one.
    limit = min(getattr(text, "max_position_embeddings", _NO_LIMIT), tokenizer.model_max_length)
    encoder = PromptEncoder(tokenizer, prompt_format=prompt_format, max_tokens=int(limit))
    # Hidden states: the embedding and one per block.
    layers, width = text.num_hidden_layers + 1, text.hidden_size
    return encoder, fingerprint(checkpoint, encoder, name=name, layers=layers, width=width)


def _decoder_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder blocks: the module list with one entry per layer that has the most parameters."""
    depth = model.config.get_text_config().num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not lists:
        raise SidelightError(
            f"{type(model).__name__} has no list of {depth} decoder blocks, so its residual stream "
            "cannot be tapped. Sidelight supports decoder-only causal language models."
        )
    return max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))


def load_backbone(
    name: str | Path = EMBEDDED_NAME,
    *,
    dtype: DtypeName = "auto",
    device: str = "auto",
    prompt_format: PromptFormat | None = None,
    for_probing: bool = False,
) -> TransformersBackbone:
    """Load a backbone by name.

    Args:
        name: ``smollm2`` (the embedded default), a local folder, or a hub id.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto`` for the dtype of the stored
            weights.
        device: ``cpu``, ``cuda``, ``cuda:1``, or ``auto`` for the first GPU, or the CPU without
            one.
        prompt_format: ``chat``, ``raw``, or ``both`` for a probe that also classifies plain text;
            None means chat if the model has a chat template.
        for_probing: Whether prompts dominate the work, as in training and guarding. In this case,
            ``auto`` means ``float32`` for weights stored in ``bfloat16`` on an x86 CPU without
            bfloat16 arithmetic, if they take at most half of the free memory: reading is two to
            five times as fast, and generation about as fast.

    Raises:
        SidelightError: The model cannot be found, is not a causal LM with decoder blocks, or its
            weights are not in safetensors files, or changed by an adapter.
    """
    name, target = str(name), find_device(device)
    path = _path(name)
    # Loading takes a second, and its progress bars would clutter ours.
    disable_progress_bar()
    with _loading_errors(name, target):
        # Weights may take hours to download, so a wrong or oversized model is refused first.
        config, kind = _read_config(source := model_folder(path, with_weights=False))
        stored_dtype = config.get_text_config().dtype
        stored_dtype = "" if stored_dtype is None else str(stored_dtype).removeprefix("torch.")
        wanted = stored_dtype if dtype == "auto" else dtype
        _require_memory(name, source, stored=stored_dtype, wanted=wanted, target=target)
        folder = model_folder(path)
        checkpoint = Checkpoint.read(folder)
        _require_memory(name, folder, stored=checkpoint.dtype, wanted=wanted, target=target)
        if for_probing and dtype == "auto" and lacks_bfloat16(target):
            dtype = _dtype_for_probing(checkpoint, folder)
        model = kind.from_pretrained(folder, config=config, dtype=dtype, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if getattr(model, "_hf_peft_config_loaded", False):
            raise ValueError(
                "an adapter beside its files (adapter_config.json) changes the weights. Merge it "
                "into them (merge_and_unload of peft), or remove it."
            )
        model = cast(PreTrainedModel, model)
        model.to(target)  # pyright: ignore[reportArgumentType]
    return TransformersBackbone(
        model, tokenizer, name=name, checkpoint=checkpoint, prompt_format=prompt_format
    )


def _dtype_for_probing(checkpoint: Checkpoint, folder: Path) -> DtypeName:
    if checkpoint.dtype != "bfloat16":
        return "auto"
    free = free_memory()
    return "float32" if free is None or 4 * stored_bytes(folder) <= free else "auto"


def _read_config(folder: Path) -> tuple[PreTrainedConfig, Any]:
    """Read the configuration, and choose the class that loads its model."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if not config.is_encoder_decoder:
        if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
            return config, AutoModelForCausalLM
        # A vision-language model may be registered only as such; its text decoder is read.
        if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            return config, AutoModelForImageTextToText
    raise ValueError(
        f"a model of type '{config.model_type}' is not one. Probes read only decoder-only models."
    )


def _path(name: str) -> str:
    require_model(name)
    return embedded_model_path() if name == EMBEDDED_NAME else name


def read_model(name: str | Path, *, prompt_format: PromptFormat | None = None) -> Model:
    """Read a model as in ``load_backbone``, without its weights.

    Args:
        name: As for ``load_backbone``.
        prompt_format: As for ``load_backbone``.

    Raises:
        SidelightError: The model cannot be found, or its weights are not in safetensors files.
    """
    name, path = str(name), _path(str(name))
    with _loading_errors(name):
        folder = model_folder(path)
        config, _ = _read_config(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        checkpoint = Checkpoint.read(folder)
    fields = _encoder_and_fingerprint(
        config, tokenizer, checkpoint, name=name, prompt_format=prompt_format
    )
    return Model(name, path, *fields)


def _require_memory(
    name: str, folder: Path, *, stored: str, wanted: str, target: torch.device
) -> None:
    """Refuse weights that cannot fit into memory, before the system kills the process.

    Args:
        name: Name that the user gave.
        folder: Folder of its files; the weights may be missing.
        stored: Dtype of the weights in the files.
        wanted: Dtype of the loaded weights.
        target: Target device.
    """
    weights, devices = stored_bytes(folder), {target}
    # Weights in the stored dtype are memory-mapped, and need memory only on the target.
    if stored != wanted and {stored, wanted} <= _DTYPE_BYTES.keys():
        weights = weights * _DTYPE_BYTES[wanted] // _DTYPE_BYTES[stored]
        devices.add(_CPU)
    for device in devices:
        free = _free_memory(device)
        if free is not None and weights > free:
            what = f"its weights take {weights / 1e9:.1f} GB and "
            raise SidelightError(_too_large(name, what, device))


def _free_memory(device: torch.device) -> int | None:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()


def _too_large(name: str, what: str, device: torch.device) -> str:
    free = _free_memory(device)
    room = "the memory is full" if free is None else f"{max(free, 0) / 1e9:.1f} GB are free"
    return (
        f"'{name}' does not fit into memory: {what}{room} on {device}. Serve a smaller model, "
        "use --dtype bfloat16, or free some memory."
    )


@contextmanager
def _loading_errors(name: str, device: torch.device = _CPU) -> Generator[None]:
    try:
        yield
    # JSON that is nested too deeply exceeds the interpreter's stack, which is a RuntimeError.
    except (OSError, ValueError, SafetensorError, RecursionError) as error:
        raise SidelightError(
            f"Cannot load '{name}' as a causal language model: {str(error).splitlines()[0]} "
            f"{MODELS}"
        ) from error
    except (MemoryError, RuntimeError) as error:
        # PyTorch's GPU allocator raises a specific exception class; its CPU allocator does not.
        is_of_gpu = isinstance(error, torch.OutOfMemoryError)
        is_full = is_of_gpu or isinstance(error, MemoryError)
        if not is_full and "allocate memory" not in str(error):
            raise
        raise SidelightError(_too_large(name, "", device if is_of_gpu else _CPU)) from error
