"""Any Hugging Face causal LM as a backbone, tapped by hooks on its decoder blocks.

Blocks are found by structure, not by model name. Training, evaluation and the one-machine server
use it; it holds the model, not the batching of requests.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from sidelight.backbones.base import Fingerprint, Tap
from sidelight.backbones.identity import fingerprint
from sidelight.backbones.prefixes import can_share, run_after, run_once
from sidelight.errors import SidelightError
from sidelight.prompts import EncodedPrompt, PromptEncoder, PromptFormat

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
