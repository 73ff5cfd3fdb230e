"""What every backbone engine gives: hidden states while the forward pass runs, and who it is.

Computes who a backbone is: hashes of its configuration, weights, tokenizer and template.

Runs a causal model on texts that begin alike: what they share passes through it once.

Any Hugging Face causal LM as a backbone, tapped by hooks on its decoder blocks.

Blocks are found by structure, not by model name. Training, evaluation and the one-machine server
use it; it holds the model, not the batching of requests.

Frozen LLMs: how to get one by name, and what it gives.
"""

import hashlib
import json
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from inspect import signature
from pathlib import Path
from typing import Any, Literal, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedModel,
)
from transformers.utils.logging import disable_progress_bar

from sidelight.errors import FingerprintMismatchError, SidelightError
from sidelight.prompts import EncodedPrompt, PromptEncoder, PromptFormat
from sidelight.smollm2 import EMBEDDED_NAME, embedded_model_path


@runtime_checkable
class Tap(Protocol):
    """Called with each hidden state while it exists; must not keep it.

    ``layer`` 0 is the residual stream after the embedding, ``layer`` l the stream after block l,
    before the final norm.
    """

    def __call__(self, layer: int, hidden: Float[Tensor, "batch token width"]) -> None:
        """Receives the state of one layer."""
        ...


_NOT_COMPARED = ("name", "dtype")


@dataclass(frozen=True)
class Fingerprint:
    """Who a backbone is. Two backbones with the same fingerprint give a probe the same states.

    Attributes:
        name: What the user called it; not compared.
        config: Hash of the architecture's configuration.
        weights: Hash of values sampled from every weight, rounded to bf16, so that the same
            weights in another dtype are the same backbone.
        tokenizer: Hash of the vocabulary and of the ids of a sample text.
        template: Hash of the chat template, or ``raw``.
        layers: Hidden states that a probe reads: embedding output and one per block.
        width: Size of a hidden state.
        dtype: Dtype of the weights; not compared, since verdicts move only within its rounding.
    """

    name: str
    config: str
    weights: str
    tokenizer: str
    template: str
    layers: int
    width: int
    dtype: str

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits that stand for all compared fields."""
        return sha256(repr(self._compared()).encode()).hexdigest()[:12]

    def require(self, served: "Fingerprint", *, probe: str) -> None:
        """Checks that ``served`` is the backbone that the probe was trained on.

        Raises:
            FingerprintMismatchError: It is not; both are named, and what differs.
        """
        theirs = served._compared()
        different = [name for name, value in self._compared().items() if value != theirs[name]]
        if different:
            raise FingerprintMismatchError(
                f"Probe '{probe}' was trained on {self.name} (fingerprint {self.digest}), but this "
                f"backbone is {served.name} ({served.digest}); different: {', '.join(different)}. "
                "Train the probe on this model, or serve the other."
            )

    def _compared(self) -> dict[str, str | int]:
        return {name: value for name, value in asdict(self).items() if name not in _NOT_COMPARED}


@runtime_checkable
class Backbone(Protocol):
    """A frozen LLM whose residual stream can be tapped."""

    name: str
    encoder: PromptEncoder
    fingerprint: Fingerprint

    @property
    def can_share_prefixes(self) -> bool:
        """Whether ``run`` takes ``after``."""
        ...

    def tapped(self, tap: Tap) -> AbstractContextManager[None]:
        """Calls ``tap`` with every hidden state of the forward passes run inside the block."""
        ...

    def run(self, prompts: Sequence[EncodedPrompt], *, after: int = 0) -> None:
        """One forward pass over right-padded prompts; the result is what the tap saw.

        Args:
            prompts: The batch.
            after: Tokens that all prompts begin with; they are run once, and not tapped.
        """
        ...


# What a configuration says of where and how it was saved or run, not of what the model computes.
_VOLATILE = {
    "_name_or_path", "architectures", "attn_implementation", "dtype", "torch_dtype",
    "transformers_version", "use_cache", "name_or_path",
}  # fmt: skip
_SAMPLE = "The quick brown fox, 1234567890 times: jumps!\n\tüber Straßen 你好"
_VALUES_PER_WEIGHT = 16


def fingerprint(
    model: PreTrainedModel, tokenizer: Any, *, name: str, prompt_format: PromptFormat
) -> Fingerprint:
    """The fingerprint of a loaded model, in well under a second."""
    config = model.config.get_text_config()
    template = "raw" if prompt_format == "raw" else _hash(str(tokenizer.chat_template))
    return Fingerprint(
        name=name,
        config=_hash(_stable_config(config.to_dict())),
        weights=_weights_hash(model),
        tokenizer=_hash(sorted(tokenizer.get_vocab().items()), tokenizer(_SAMPLE)["input_ids"]),
        template=template,
        layers=config.num_hidden_layers + 1,
        width=config.hidden_size,
        dtype=str(model.dtype).removeprefix("torch."),
    )


def _stable_config(config: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k not in _VOLATILE and not k.startswith("_")}


def _weights_hash(model: PreTrainedModel) -> str:
    """Hash of every weight's name, shape, and a few of its values spread over its length."""
    digest = hashlib.sha256()
    for key, weight in sorted(model.state_dict().items()):
        step = max(1, weight.numel() // _VALUES_PER_WEIGHT)
        sample = weight.flatten()[::step].to(torch.bfloat16).view(torch.int16).cpu()
        digest.update(f"{key}{tuple(weight.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def _hash(*values: Any) -> str:
    text = json.dumps(values, sort_keys=True, default=str, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def run_once(model: Any, prefix: Int[Tensor, " prefix"]) -> DynamicCache:
    """The keys and values of a prefix.

    Args:
        model: A causal model of ``transformers`` for which ``can_share`` holds.
        prefix: Token ids; at least one.
    """
    cache = DynamicCache()
    model(input_ids=prefix[None], use_cache=True, **{cache_name(model): cache})
    return cache


def run_after(
    model: Any,
    cache: DynamicCache,
    token_ids: Int[Tensor, "text token"],
    present: Bool[Tensor, "text token"],
    **options: Any,
) -> Any:
    """The model's output on ``token_ids``, each row after the prefix in ``cache``.

    Gradients flow back through the prefix. The cache holds the rows as well afterwards.

    Args:
        model: As in ``run_once``.
        cache: Of ``run_once``.
        token_ids: What follows the prefix.
        present: Where there is a token; the padding may be on either side.
        options: Of the model's forward pass.
    """
    before = present.new_ones(len(token_ids), cache.get_seq_length())
    cache.batch_repeat_interleave(len(token_ids))
    mask = torch.cat([before, present], 1)
    positions = (mask.cumsum(1) - 1)[:, before.shape[1] :]
    begun = {cache_name(model): cache, "use_cache": True, **options}
    return model(input_ids=token_ids, attention_mask=mask.long(), position_ids=positions, **begun)


def can_share(model: Any) -> bool:
    """Whether a prefix's state is keys and values of every token, and no more."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    usual = "full_attention" if window is None else "sliding_attention"
    kinds = getattr(config, "layer_types", None) or [usual]
    return set(kinds) == {"full_attention"} and not getattr(model, "_is_stateful", False)


def cache_name(model: Any) -> str:
    """The argument that takes a cache: transformers 5.24 renamed it."""
    return "cache" if "cache" in signature(model.forward).parameters else "past_key_values"


DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
# Tokenizers without a limit of their own report an astronomically large one.
_NO_LIMIT = 10**9


class TransformersBackbone:
    """A frozen causal LM of the ``transformers`` library.

    Args:
        model: The model; it is put into evaluation mode and its weights are frozen.
        tokenizer: Its fast tokenizer.
        name: How messages and manifests call it.
        prompt_format: ``chat``, ``raw``, or None: chat where the tokenizer has a template.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        name: str,
        prompt_format: PromptFormat | None = None,
    ):
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self._tap: Tap | None = None
        self._watch(_decoder_blocks(model))
        chosen = prompt_format or ("chat" if tokenizer.chat_template else "raw")
        self.encoder = PromptEncoder(
            tokenizer, prompt_format=chosen, max_tokens=_max_tokens(model, tokenizer)
        )
        self.fingerprint: Fingerprint = fingerprint(
            model, tokenizer, name=name, prompt_format=chosen
        )

    @classmethod
    def load(
        cls,
        path: str,
        *,
        name: str,
        dtype: DtypeName = "auto",
        device: str = "auto",
        prompt_format: PromptFormat | None = None,
    ) -> "TransformersBackbone":
        """The model at a local folder or hub id.

        Raises:
            SidelightError: No such model, or not a causal LM.
        """
        place = _device(device)
        # Loading takes a second; its progress bars would only clutter ours.
        disable_progress_bar()
        try:
            config = AutoConfig.from_pretrained(path)
            model = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=dtype)
            tokenizer = AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError, SafetensorError) as error:
            raise SidelightError(
                f"Cannot load '{name}' as a causal language model: {str(error).splitlines()[0]} "
                "Give 'smollm2', a folder saved by save_pretrained, or a hub id."
            ) from error
        model = cast(PreTrainedModel, model)
        model.to(place)  # pyright: ignore[reportArgumentType]
        return cls(model, tokenizer, name=name, prompt_format=prompt_format)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @contextmanager
    def tapped(self, tap: Tap) -> Generator[None]:
        """Calls ``tap`` with every hidden state of the forward passes run inside the block."""
        self._tap = tap
        try:
            yield
        finally:
            self._tap = None

    @torch.inference_mode()
    def run(self, prompts: Sequence[EncodedPrompt], *, after: int = 0) -> None:
        """One forward pass over right-padded prompts; the result is what the tap saw.

        Args:
            prompts: The batch.
            after: Tokens that all prompts begin with; they are run once, and not tapped.
        """
        token_ids, mask = self.pad(prompts)
        # Without the language-model head: nobody reads its logits here.
        body = self.model.base_model
        if after:
            tap, self._tap = self._tap, None
            begun = run_once(body, token_ids[0, :after])
            self._tap = tap
            run_after(body, begun, token_ids[:, after:], mask[:, after:])
        else:
            body(input_ids=token_ids, attention_mask=mask, use_cache=False)

    @property
    def can_share_prefixes(self) -> bool:
        """Whether ``run`` takes ``after``: a prefix leaves keys and values, and no more."""
        return can_share(self.model)

    @property
    def last_position(self) -> Int[Tensor, " one"]:
        """The ``logits_to_keep`` of the last token only.

        The number 1 keeps a slice, which is not contiguous in a batch: PyTorch then copies the
        output matrix once for every row.
        """
        return torch.tensor([-1], device=self.device)

    def pad(
        self, prompts: Sequence[EncodedPrompt]
    ) -> tuple[Int[Tensor, "batch token"], Bool[Tensor, "batch token"]]:
        """The prompts' ids, padded on the right, and where they are real."""
        longest = max(len(prompt) for prompt in prompts)
        token_ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros(len(prompts), longest, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            token_ids[row, : len(prompt)] = torch.tensor(prompt.token_ids)
            mask[row, : len(prompt)] = True
        return token_ids.to(self.device), mask.to(self.device)

    def _watch(self, blocks: nn.ModuleList) -> None:
        def embedded(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._tap is not None:
                self._tap(0, args[0] if args else kwargs["hidden_states"])

        blocks[0].register_forward_pre_hook(embedded, with_kwargs=True)
        for layer, block in enumerate(blocks, start=1):
            block.register_forward_hook(self._block_hook(layer))

    def _block_hook(self, layer: int) -> Any:
        def passed(_module: nn.Module, _args: Any, output: Any) -> None:
            if self._tap is not None:
                hidden: Float[Tensor, "batch token width"] = (
                    output if torch.is_tensor(output) else output[0]
                )
                self._tap(layer, hidden)

        return passed


def _decoder_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The list of decoder blocks: of the module lists with one entry a layer, the heaviest."""
    depth = model.config.get_text_config().num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not lists:
        raise SidelightError(
            f"{type(model).__name__} has no list of {depth} decoder blocks, so its residual stream "
            "cannot be tapped. Sidelight supports decoder-only causal language models."
        )
    return max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise SidelightError(
            f"There is no device '{name}' here: {str(error).splitlines()[0]} "
            "Give cpu, cuda, cuda:1 or auto."
        ) from error


def _max_tokens(model: PreTrainedModel, tokenizer: Any) -> int:
    config = model.config.get_text_config()
    limits = [getattr(config, "max_position_embeddings", _NO_LIMIT), tokenizer.model_max_length]
    return int(min(limits))


def load_backbone(
    name: str | Path = EMBEDDED_NAME,
    *,
    dtype: DtypeName = "auto",
    device: str = "auto",
    prompt_format: PromptFormat | None = None,
) -> TransformersBackbone:
    """A backbone by name.

    Args:
        name: ``smollm2`` (the embedded default), a local folder, or a hub id.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto``: as the weights are stored.
        device: ``cpu``, ``cuda``, ``cuda:1``, or ``auto``: the first GPU where there is one.
        prompt_format: ``chat`` or ``raw``; None takes the chat template where the model has one.

    Raises:
        SidelightError: The model cannot be found or is not a causal LM with decoder blocks.
    """
    path = embedded_model_path() if str(name) == EMBEDDED_NAME else str(name)
    return TransformersBackbone.load(
        path, name=str(name), dtype=dtype, device=device, prompt_format=prompt_format
    )
