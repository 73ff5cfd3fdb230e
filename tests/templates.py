"""Chat templates as models ship them, shortened, and a tokenizer that merges across their edges."""

from functools import cache
from pathlib import Path

from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from tiny import byte_level

SPECIAL_TOKENS = [
    "<|pad|>", "<s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<start_of_turn>", "<end_of_turn>",
]  # fmt: skip
DEFAULT_SYSTEM = "You are a helpful assistant."


def written(name: str) -> str:
    """A template from its file, which ends by a line break that is not part of it."""
    file = Path(__file__).with_name("chat_templates") / f"{name}.jinja"
    return file.read_text("utf-8").removesuffix("\n")


# In the last, no special token stands between the text and the template, but words do.
TEMPLATES = {name: written(f"short-{name}") for name in ("chatml", "llama-3", "gemma", "plain")}
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
    return byte_level(_CORPUS, special_tokens=SPECIAL_TOKENS).to_str()
