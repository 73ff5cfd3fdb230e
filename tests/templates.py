"""Chat templates as models ship them, shortened, and a tokenizer that merges across their edges."""

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

_OPEN, _CLOSE = "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = [
    "<|pad|>", "<s>", _OPEN, _CLOSE, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<start_of_turn>", "<end_of_turn>",
]  # fmt: skip
DEFAULT_SYSTEM = "You are a helpful assistant."
CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}"
    "<|end_header_id|>\n\n{{ message.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message.role == 'assistant' else message.role }}\n"
    "{{ message.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# No special token between the text and the template, and words on both sides of it.
PLAIN = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
DROPS_TOOLS = (
    "{% for message in messages %}{% if message.role != 'tool' %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>\n{% endif %}{% endfor %}"
)
SHOUTS = "{% for message in messages %}<|im_start|>{{ message.content | upper }}{% endfor %}"
TEMPLATES = {"chatml": CHATML, "llama-3": LLAMA_3, "gemma": GEMMA, "plain": PLAIN}
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
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer.to_str()
