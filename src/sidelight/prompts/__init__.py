"""Turns a conversation into token ids, and says for each token what part of it a probe may read.

Knows text and tokens, not hidden states.
"""

from sidelight.prompts.conversation import (
    Conversation,
    Message,
    Part,
    PlainText,
    PromptFormat,
    Reads,
    Side,
)
from sidelight.prompts.encoded import EncodedPrompt, shared_length, shared_unread
from sidelight.prompts.encoder import PromptEncoder

__all__ = [
    "Conversation",
    "EncodedPrompt",
    "Message",
    "Part",
    "PlainText",
    "PromptEncoder",
    "PromptFormat",
    "Reads",
    "Side",
    "shared_length",
    "shared_unread",
]
