"""From a conversation to token ids, and to what probes read of them.

Knows neither models nor probes.
"""

from sidelight.prompts.control_tokens import Tokenizer, control_tokens
from sidelight.prompts.conversation import (
    Conversation,
    EncodedPrompt,
    Message,
    Part,
    Place,
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
    tool_rows,
)
from sidelight.prompts.encode import PromptEncoder

__all__ = [
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
    "tool_rows",
]
