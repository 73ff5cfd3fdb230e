"""From a conversation to token ids, and to what probes read of them.

Knows neither models nor probes.
"""

from sidelight.prompts.control_tokens import Tokenizer, control_tokens
from sidelight.prompts.conversation import (
    Conversation,
    EncodedPrompt,
    Message,
    Part,
    PlainText,
    PromptFormat,
    Reads,
    Scope,
    Side,
    Unit,
    characters,
    contents,
    has_response,
    judged_units,
    piece_lengths,
    read_tokens,
    require_whole_characters,
    shared_length,
    shared_unread,
)
from sidelight.prompts.encode import Place, PromptEncoder
from sidelight.prompts.turns import OUTSIDE, ChatFormat, Turn, token_parts

__all__ = [
    "OUTSIDE",
    "ChatFormat",
    "Conversation",
    "EncodedPrompt",
    "Message",
    "Part",
    "Place",
    "PlainText",
    "PromptEncoder",
    "PromptFormat",
    "Reads",
    "Scope",
    "Side",
    "Tokenizer",
    "Turn",
    "Unit",
    "characters",
    "contents",
    "control_tokens",
    "has_response",
    "judged_units",
    "piece_lengths",
    "read_tokens",
    "require_whole_characters",
    "shared_length",
    "shared_unread",
    "token_parts",
]
