"""Tiny, randomly initialised models and untrained probes: real, and fast.

Their tokenizers have chat templates as families of models write them, or are odd in other ways.
"""

# ruff: noqa: RUF001

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
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

from sidelight.data.spans import SpanRule
from sidelight.engines.transformers.backbone import TransformersBackbone
from sidelight.models.checkpoint import Checkpoint
from sidelight.models.conversation import EncodedPrompt, PromptFormat, Reads, Side
from sidelight.models.encode import PromptEncoder
from sidelight.probes.bank import Bank
from sidelight.probes.card import ProbeCard
from sidelight.probes.mechanisms.base import Geometry, build_mechanism, mechanism_spec
from sidelight.probes.probe import Probe
from sidelight.probes.standardisation import Standardisation
from sidelight.states.extraction import text_logits
from sidelight.statistics.calibration import Calibration
from sidelight.types import OptionValue, Task

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
NAMES_AND_PLACES = Task("multilabel", ("NAME", "PLACE"))


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
    options: Mapping[str, OptionValue] | None = None,
    threshold: float = 0.5,
) -> Probe:
    """A probe of random weights, seeded by its name."""
    torch.manual_seed(sum(map(ord, name)))
    who = backbone.fingerprint
    geometry = Geometry(layers=who.layers, width=who.width, outputs=task.outputs)
    spec = mechanism_spec(mechanism, options)
    built = build_mechanism(spec, geometry).eval().requires_grad_(False)
    for parameter in built.parameters():
        parameter.normal_(std=0.1)
    card = ProbeCard(
        name=name,
        mechanism=spec,
        task=task,
        reads=reads or Reads(),
        prompt_format=backbone.encoder.prompt_format,
        calibration=Calibration("none", task.kind, (1.0,) * task.outputs, (0.0,) * task.outputs),
        thresholds=(threshold,) * len(task.flaggable),
        backbone=who,
    )
    return Probe(card, built, Standardisation.identity(geometry))


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
        backbone, name, task=NAMES_AND_PLACES, reads=Reads(side, template=False), mechanism="spans"
    )
    outputs = probe.task.outputs
    rule = SpanRule(probe.calibration, (threshold,) * outputs, (None,) * outputs)
    return probe.changed(spans=rule)


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


MERGING_TOKENS = [
    "<|pad|>", "<s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<start_of_turn>", "<end_of_turn>",
]  # fmt: skip
DEFAULT_SYSTEM = "You are a helpful assistant."


def template_named(name: str) -> str:
    """A template from its file, which ends by a line break that is not part of it."""
    file = Path(__file__).with_name("chat_templates") / f"{name}.jinja"
    return file.read_text("utf-8").removesuffix("\n")


# In the last, no special token stands between the text and the template, but words do.
TEMPLATES = {
    name: template_named(f"short-{name}") for name in ("chatml", "llama-3", "gemma", "plain")
}
CHATML = TEMPLATES["chatml"]
_CORPUS = [
    "user: assistant: system You are a helpful assistant.\n\nuser\nassistant\n  hello   world\n\n\n"
] * 50


def merging_tokenizer(
    template: str | None, *, trims_offsets: bool = False, adds_bos: bool = False
) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few hundred merges, some of several line breaks and spaces.

    Args:
        template: The chat template.
        trims_offsets: Whether a token's offsets leave out white space, as GPT-NeoX's do.
        adds_bos: Whether the tokenizer begins raw texts by a special token.
    """
    tokenizer = Tokenizer.from_str(_trained())
    steps = [processors.ByteLevel(trim_offsets=trims_offsets)]
    if adds_bos:
        steps.append(processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)]))
    tokenizer.post_processor = processors.Sequence(steps)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token="<|pad|>", chat_template=template
    )


@cache
def _trained() -> str:
    return byte_level(_CORPUS, special_tokens=MERGING_TOKENS).to_str()


_CHAT_NAMES = (
    "qwen", "llama-3", "mistral", "gemma-3", "phi-3", "phi-4", "gpt-oss", "deepseek", "granite",
)  # fmt: skip
CHAT_FAMILIES = {name: template_named(name) for name in _CHAT_NAMES}
_CONTROLS = re.compile(
    r"<\|\w+\|>|<｜[\w▁]+｜>|</?s>|</?think>|<(?:start|end)_of_turn>|\[/?[A-Z_]{4,}\]"
)
WITHOUT_SYSTEM = {"gemma-3"}
"""Families that write the system's text into the first turn of the user."""
WITHOUT_TOOLS = {"gemma-3", "phi-3", "phi-4"}


@cache
def family_tokenizer(family: str, *, is_split: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer with the family's template and control tokens.

    Args:
        family: One of ``FAMILIES``.
        is_split: Words with a blank before them, as in SentencePiece, in place of GPT-2's bytes.
    """
    template = CHAT_FAMILIES[family]
    tokenizer = _split_tokenizer(template) if is_split else merging_tokenizer(template)
    names = {*_CONTROLS.findall(template), "</s>"}
    names |= {"<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"} if family == "phi-3" else set()
    names |= {"<｜begin▁of▁sentence｜>"} if family == "deepseek" else set()
    tokenizer.add_tokens(
        [AddedToken(name, special=not name.endswith("think>")) for name in sorted(names)]
    )
    if family == "deepseek":
        tokenizer.bos_token = "<｜begin▁of▁sentence｜>"
    tokenizer.eos_token = "</s>"
    return tokenizer


def _split_tokenizer(template: str) -> PreTrainedTokenizerFast:
    words = ["▁", "\n", "\n\n", "▁a", "us", "er", "user", "▁user", "\nu"]
    merges = [("\n", "\n"), ("▁", "a"), ("u", "s"), ("e", "r"), ("us", "er"), ("▁", "user")]
    plain = _with_byte_fallback([*_LETTERS, *words], merges)
    plain.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    plain.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never", split=False)]
    )
    return _fast(plain, template)


_LETTERS = [chr(code) for code in range(33, 127)]


def _with_byte_fallback(words: Sequence[str], merges: Sequence[tuple[str, str]] = ()) -> Tokenizer:
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = dict.fromkeys(["<unk>", "<s>", "</s>", *bytes_, *words])
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return Tokenizer(models.BPE(vocabulary, [*merges], unk_token="<unk>", byte_fallback=True))


def _fast(plain: Tokenizer, template: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="<unk>", bos_token="<s>", chat_template=template
    )


def blank_before_texts(template: str = CHAT_FAMILIES["phi-3"]) -> PreTrainedTokenizerFast:
    """Control tokens that swallow the blanks after them, and a blank before each text, as Phi-3."""
    plain = _with_byte_fallback(["▁", *_LETTERS])
    plain.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    plain.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    tokenizer = _fast(plain, template)
    names = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>", "</s>")
    tokenizer.add_tokens(
        [AddedToken(name, special=True, rstrip=True, normalized=False) for name in names]
    )
    return tokenizer


def _called_no_special_tokens() -> PreTrainedTokenizerFast:
    """Markers that the template writes are added tokens that are not called special."""
    thought = "{% if add_generation_prompt %}<think>\n\n</think>\n\n{% endif %}"
    tokenizer = merging_tokenizer("{% if tools %}<tool_call>{% endif %}" + CHATML + thought)
    tokenizer.add_tokens([AddedToken(name) for name in ("<think>", "</think>", "<tool_call>")])
    tokenizer.add_tokens([AddedToken("<|fim|>")])
    return tokenizer


ADDED_WORDS = ("\n\n", "   ", "hel")


def _words_and_blanks() -> PreTrainedTokenizerFast:
    """Added tokens that are text: runs of blanks, and words of the model's own vocabulary."""
    tokenizer = merging_tokenizer(TEMPLATES["gemma"])
    assert "hel" in tokenizer.get_vocab()
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ADDED_WORDS])
    return tokenizer


def _blank_before_the_first_word() -> PreTrainedTokenizerFast:
    """A blank is put before the first word of a text only, as in Llama 2."""
    plain = _with_byte_fallback([*"▁abcdefghijklmnopqrstuvwxyz[]/INST<>|_"])
    plain.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    plain.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first", split=False)]
    )
    tokenizer = _fast(plain, template_named("llama-2-turns"))
    tokenizer.eos_token = "</s>"
    return tokenizer


def _folding() -> PreTrainedTokenizerFast:
    """Names of tokens are looked for in lower case, and in any width."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase()]
    )
    for name in ("<|end|>", "<|stop|>"):
        tokenizer.add_tokens([AddedToken(name, special=True, normalized=True)], True)
    return tokenizer


ODD_TOKENIZERS = {
    "tiny": tiny_tokenizer,
    "called no special tokens": _called_no_special_tokens,
    "blank before texts": blank_before_texts,
    "words and blanks": _words_and_blanks,
    "blank before the first word": _blank_before_the_first_word,
    "folding": _folding,
}


def turns_of(encoder: PromptEncoder, ids: Sequence[int]) -> list[tuple[str, str]]:
    """The role and text of each turn, without the blanks around it."""
    return [
        (turn.role, text_of(encoder, ids[turn.start : turn.stop]).strip())
        for turn in encoder.chat_format.turns(ids)
    ]


def text_of(encoder: PromptEncoder, ids: Sequence[int]) -> str:
    """What these tokens say, where SentencePiece's mark of a blank is one."""
    text = encoder.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return text.replace("▁", " ")


def saved(backbone: TransformersBackbone, folder: Path) -> str:
    """The folder that the backbone has been saved to, as ``--model`` takes it."""
    backbone.model.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
    return str(folder)
