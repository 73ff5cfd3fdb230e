"""Tiny, randomly initialised models and untrained probes: real, and fast."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from sidelight.backbone import TransformersBackbone
from sidelight.bank import Bank
from sidelight.calibration import Calibration
from sidelight.checkpoint import Checkpoint
from sidelight.mechanisms.base import Geometry, build_mechanism, mechanism_spec
from sidelight.probe import Probe
from sidelight.prompts import EncodedPrompt, PromptFormat, Reads, Side
from sidelight.spans import SpanRule
from sidelight.standardisation import Standardisation
from sidelight.states.extraction import text_logits
from sidelight.types import Task

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL_TOKENS = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
# Of the families that must work.
_GROUPED = {**SIZES, "num_key_value_heads": 2}
_CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_GROUPED),
    "qwen2": Qwen2Config(**_GROUPED),
    "qwen3": Qwen3Config(**_GROUPED, head_dim=8),
    "mistral": MistralConfig(**_GROUPED, sliding_window=8),
    "gemma2": Gemma2Config(**_GROUPED, head_dim=8, sliding_window=8),
    "gpt2": GPT2Config(**SIZES),
    "gpt_neox": GPTNeoXConfig(**SIZES),
}
FAMILIES = tuple(_CONFIGS)
TOXICITY = Task("binary", ("fine", "toxic"))
INTENT = Task("multiclass", ("billing", "refund", "other"))
TOPICS = Task("multilabel", ("violence", "sexual"))
PIECES = Task("multilabel", ("NAME", "PLACE"))


def byte_level(
    texts: Sequence[str] = (),
    *,
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
    vocab_size: int = 400,
) -> Tokenizer:
    """Bytes as tokens, and what is frequent in the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*special_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tiny_tokenizer(plain: Tokenizer | None = None) -> PreTrainedTokenizerFast:
    """Bytes as tokens, unless another is given, and a chat template."""
    return PreTrainedTokenizerFast(
        tokenizer_object=plain or byte_level(),
        eos_token="<|end|>",
        pad_token="<|pad|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=256,
    )


def identified(
    model: Any, tokenizer: Any, *, name: str, prompt_format: PromptFormat | None = None
) -> TransformersBackbone:
    """A backbone of a model made in memory, identified by the files that it is saved to."""
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        checkpoint = Checkpoint.read(Path(folder))
    return TransformersBackbone(
        model, tokenizer, name=name, checkpoint=checkpoint, prompt_format=prompt_format
    )


def tiny_backbone(
    config: PreTrainedConfig | None = None, *, prompt_format: PromptFormat = "chat"
) -> TransformersBackbone:
    """A backbone of random weights; the same ones each time."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config or LlamaConfig(**SIZES), dtype=torch.float32)
    return identified(model, tiny_tokenizer(), name="tiny/llama", prompt_format=prompt_format)


def family_backbone(
    family: str, *, with_template: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0
) -> TransformersBackbone:
    """A backbone of random weights; the same ones for the same family and seed."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(_CONFIGS[family], dtype=torch.float32).to(dtype)
    tokenizer = tiny_tokenizer()
    if not with_template:
        tokenizer.chat_template = None
    return identified(model, tokenizer, name=f"tiny/{family}")


def untrained_probe(
    backbone: TransformersBackbone,
    name: str,
    *,
    task: Task = TOXICITY,
    reads: Reads | None = None,
    mechanism: str = "readout",
    threshold: float = 0.5,
) -> Probe:
    """A probe of random weights, seeded by its name."""
    torch.manual_seed(sum(map(ord, name)))
    who = backbone.fingerprint
    geometry = Geometry(layers=who.layers, width=who.width, outputs=task.outputs)
    spec = mechanism_spec(mechanism)
    built = build_mechanism(spec, geometry).eval().requires_grad_(False)
    for parameter in built.parameters():
        parameter.normal_(std=0.1)
    return Probe(
        name=name,
        task=task,
        reads=reads or Reads(),
        prompt_format=backbone.encoder.prompt_format,
        spec=spec,
        mechanism=built,
        standardisation=Standardisation.identity(geometry),
        calibration=Calibration("none", task.kind, (1.0,) * task.outputs, (0.0,) * task.outputs),
        thresholds=(threshold,) * (0 if task.kind == "multiclass" else task.outputs),
        fingerprint=who,
    )


def score(
    backbone: TransformersBackbone, bank: Bank, prompts: Sequence[EncodedPrompt]
) -> list[np.ndarray]:
    """For each probe the logits of all prompts, ``[prompt, output]``."""
    by_probe = text_logits(backbone, bank, prompts)
    return [np.stack([text.logits for text in of_probe]) for of_probe in by_probe]


def spans_probe(
    backbone: TransformersBackbone, name: str, *, side: Side = "prompt", threshold: float = 0.9
) -> Probe:
    """A probe of random weights that labels the tokens which reach the threshold."""
    probe = untrained_probe(
        backbone, name, task=PIECES, reads=Reads(side, template=False), mechanism="spans"
    )
    outputs = probe.task.outputs
    rule = SpanRule(probe.calibration, (threshold,) * outputs, (None,) * outputs)
    return replace(probe, spans=rule)


def broken(probe: Probe) -> Probe:
    """The same, but it has no verdict on any text."""
    mechanism = deepcopy(probe.mechanism)
    with torch.no_grad():
        mechanism.bias.fill_(torch.nan)
    return replace(probe, mechanism=mechanism)


def three_probes(backbone: TransformersBackbone) -> Sequence[Probe]:
    """One of each kind of task, all of the prompt."""
    return [
        untrained_probe(backbone, "toxicity"),
        untrained_probe(backbone, "intent", task=INTENT, mechanism="gate"),
        untrained_probe(backbone, "topics", task=TOPICS),
    ]
