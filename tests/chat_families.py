"""How families of models mark turns: chat templates written after theirs, with tokenizers.

And tokenizers that are odd in other ways.
"""

# ruff: noqa: RUF001

import re
from collections.abc import Sequence
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sidelight.prompts import PromptEncoder
from templates import CHATML, TEMPLATES, merging_tokenizer, written
from tiny import tiny_tokenizer

NAMES = (
    "qwen", "llama-3", "mistral", "gemma-3", "phi-3", "phi-4", "gpt-oss", "deepseek", "granite",
)  # fmt: skip
FAMILIES = {name: written(name) for name in NAMES}
_CONTROLS = re.compile(
    r"<\|\w+\|>|<｜[\w▁]+｜>|</?s>|</?think>|<(?:start|end)_of_turn>|\[/?[A-Z_]{4,}\]"
)
WITHOUT_SYSTEM = {"gemma-3"}
"""Families that write the system's text into the first turn of the user."""
WITHOUT_TOOLS = {"gemma-3", "phi-3", "phi-4"}


@cache
def family_tokenizer(family: str, *, pieces: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer with the family's template and control tokens.

    Args:
        family: One of ``FAMILIES``.
        pieces: Words with a blank before them, as in SentencePiece, in place of GPT-2's bytes.
    """
    template = FAMILIES[family]
    tokenizer = _pieces(template) if pieces else merging_tokenizer(template)
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


def _pieces(template: str) -> PreTrainedTokenizerFast:
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


def blank_before_texts(template: str = FAMILIES["phi-3"]) -> PreTrainedTokenizerFast:
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


WORDS = ("\n\n", "   ", "hel")


def _words_and_blanks() -> PreTrainedTokenizerFast:
    """Added tokens that are text: runs of blanks, and words of the model's own vocabulary."""
    tokenizer = merging_tokenizer(TEMPLATES["gemma"])
    assert "hel" in tokenizer.get_vocab()
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in WORDS])
    return tokenizer


def _blank_before_the_first_word() -> PreTrainedTokenizerFast:
    """A blank is put before the first word of a text only, as in Llama 2."""
    plain = _with_byte_fallback([*"▁abcdefghijklmnopqrstuvwxyz[]/INST<>|_"])
    plain.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    plain.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first", split=False)]
    )
    tokenizer = _fast(plain, written("llama-2-turns"))
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
