"""How eight families of models mark turns: chat templates written after theirs, with tokenizers."""

# ruff: noqa: RUF001

import re
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from templates import merging_tokenizer

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
    letters = [chr(code) for code in range(33, 127)]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    words = ["▁", "\n", "\n\n", "▁a", "us", "er", "user", "▁user", "\nu"]
    tokens = dict.fromkeys(["<unk>", "<s>", *bytes_, *letters, *words])
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [("\n", "\n"), ("▁", "a"), ("u", "s"), ("e", "r"), ("us", "er"), ("▁", "user")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never", split=False)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", chat_template=template
    )
