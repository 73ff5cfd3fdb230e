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
from templates import CHATML, TEMPLATES, merging_tokenizer
from tiny import tiny_tokenizer

QWEN = """\
{%- set ns = namespace(closed=false) -%}
{%- if tools -%}
<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}

{% endif %}# Tools
<tools>{% for tool in tools %}
{{ tool | tojson }}{% endfor %}
</tools><|im_end|>
{% elif messages[0].role == 'system' -%}
<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif -%}
{%- for message in messages -%}
{%- if message.role == 'user' or (message.role == 'system' and not loop.first) -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% elif message.role == 'assistant' -%}
<|im_start|>assistant
{% if loop.last %}<think>

</think>

{% endif %}{{ message.content }}
{%- for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% elif message.role == 'tool' -%}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}
<tool_response>
{{ message.content }}
</tool_response>
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>
{% endif -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif -%}
"""

LLAMA = """\
{{- bos_token }}{% set rest = messages %}{% set system = '' -%}
{%- if messages[0].role == 'system' -%}
{% set system = messages[0].content | trim %}{% set rest = messages[1:] -%}
{%- endif -%}
<|start_header_id|>system<|end_header_id|>

Cutting Knowledge Date: December 2023
Today Date: {{ strftime_now('%d %b %Y') }}

{{ system }}<|eot_id|>
{%- for message in rest -%}
{%- if message.role in ('tool', 'ipython') -%}
<|start_header_id|>ipython<|end_header_id|>

{{ message.content | tojson }}<|eot_id|>
{%- elif message.tool_calls -%}
<|start_header_id|>assistant<|end_header_id|>

{% set call = message.tool_calls[0].function -%}
{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}<|eot_id|>
{%- else -%}
<|start_header_id|>{{ message.role }}<|end_header_id|>

{{ message.content | trim }}<|eot_id|>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|start_header_id|>assistant<|end_header_id|>

{% endif -%}
"""

MISTRAL = """\
{{- bos_token }}{% set rest = messages -%}
{%- if messages[0].role == 'system' -%}
[SYSTEM_PROMPT]{{ messages[0].content }}[/SYSTEM_PROMPT]{% set rest = messages[1:] -%}
{%- else -%}
[SYSTEM_PROMPT]You are a model. Today is {{ strftime_now('%Y-%m-%d') }}.[/SYSTEM_PROMPT]
{%- endif -%}
{%- for message in rest -%}
{%- if message.role == 'user' -%}
{% if tools and loop.last %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif -%}
[INST]{{ message.content }}[/INST]
{%- elif message.tool_calls -%}
[TOOL_CALLS] [{{ message.tool_calls[0].function | tojson }}]</s>
{%- elif message.role == 'assistant' -%}
{{ message.content }}</s>
{%- elif message.role == 'tool' -%}
[TOOL_RESULTS] {"content": {{ message.content }}, "call_id": "{{ message.tool_call_id }}"}\
[/TOOL_RESULTS]
{%- else -%}
{{ raise_exception('Only one system message is supported, at the beginning.') }}
{%- endif -%}
{%- endfor -%}
"""

GEMMA = """\
{{- bos_token }}{% set before = '' %}{% set rest = messages -%}
{%- if messages[0].role == 'system' -%}
{% set before = messages[0].content + '\\n\\n' %}{% set rest = messages[1:] -%}
{%- endif -%}
{%- for message in rest -%}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('Conversation roles must alternate.') }}
{%- endif -%}
<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}
{{ before if loop.first else '' }}{{ message.content | trim }}<end_of_turn>
{% endfor -%}
{%- if add_generation_prompt -%}
<start_of_turn>model
{% endif -%}
"""

PHI_3 = """\
{%- for message in messages -%}
<|{{ message.role }}|>
{{ message.content }}<|end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|assistant|>
{% else %}{{ eos_token }}{% endif -%}
"""

PHI_4 = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}<|im_sep|>{{ message.content }}<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif -%}
"""

HARMONY = """\
<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.
Knowledge cutoff: 2024-06
Current date: {{ strftime_now('%Y-%m-%d') }}

Reasoning: medium

# Valid channels: analysis, commentary, final.<|end|>
{%- set rest = messages -%}
{%- if messages[0].role == 'system' -%}
<|start|>developer<|message|># Instructions

{{ messages[0].content }}<|end|>{% set rest = messages[1:] -%}
{%- endif -%}
{%- for message in rest -%}
{%- if message.role == 'user' -%}
<|start|>user<|message|>{{ message.content }}<|end|>
{%- elif message.tool_calls -%}
{% set call = message.tool_calls[0].function -%}
<|start|>assistant to=functions.{{ call.name }}<|channel|>commentary json<|message|>\
{{ call.arguments | tojson }}<|call|>
{%- elif message.role == 'assistant' -%}
<|start|>assistant<|channel|>final<|message|>{{ message.content }}\
{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}
{%- elif message.role == 'tool' -%}
<|start|>functions.{{ message.name or 'tool' }} to=assistant<|channel|>commentary<|message|>\
{{ message.content | tojson }}<|end|>
{%- else -%}
{{ raise_exception('Unknown role.') }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}<|start|>assistant{% endif -%}
"""

DEEPSEEK = """\
{{- bos_token }}{% set rest = messages -%}
{%- if messages[0].role == 'system' -%}
{{ messages[0].content }}{% set rest = messages[1:] -%}
{%- endif -%}
{%- for message in rest -%}
{%- if message.role == 'user' -%}
<｜User｜>{{ message.content }}
{%- elif message.tool_calls -%}
{% set call = message.tool_calls[0].function -%}
<｜Assistant｜><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{{ call.name }}<｜tool▁sep｜>\
{{ call.arguments | tojson }}<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>
{%- elif message.role == 'assistant' -%}
<｜Assistant｜>{{ message.content }}<｜end▁of▁sentence｜>
{%- elif message.role == 'tool' -%}
<｜tool▁output▁begin｜>{{ message.content }}<｜tool▁output▁end｜>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}<｜Assistant｜>{% endif -%}
"""

GRANITE = """\
{%- if messages[0].role != 'system' -%}
<|start_of_role|>system<|end_of_role|>Knowledge Cutoff Date: April 2024.
Today's Date: {{ strftime_now('%B %d, %Y') }}.
You are Granite, developed by IBM.<|end_of_text|>
{% endif -%}
{%- for message in messages -%}
<|start_of_role|>{{ 'tool_response' if message.role == 'tool' else message.role }}<|end_of_role|>\
{%- if message.tool_calls -%}
<|tool_call|>{{ message.tool_calls | tojson }}
{%- else -%}{{ message.content }}{%- endif -%}
<|end_of_text|>
{% endfor -%}
{%- if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif -%}
"""

FAMILIES = {
    "qwen": QWEN,
    "llama-3": LLAMA,
    "mistral": MISTRAL,
    "gemma-3": GEMMA,
    "phi-3": PHI_3,
    "phi-4": PHI_4,
    "gpt-oss": HARMONY,
    "deepseek": DEEPSEEK,
    "granite": GRANITE,
}
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


def blank_before_texts(template: str = PHI_3) -> PreTrainedTokenizerFast:
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
    template = (
        "{% for message in messages %}{% if message.role == 'assistant' %} {{ message.content }}"
        "</s>{% else %}<s>[INST] {{ message.content }} [/INST]{% endif %}{% endfor %}"
    )
    plain = _with_byte_fallback([*"▁abcdefghijklmnopqrstuvwxyz[]/INST<>|_"])
    plain.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    plain.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first", split=False)]
    )
    tokenizer = _fast(plain, template)
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
    text = encoder._tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return text.replace("▁", " ")
