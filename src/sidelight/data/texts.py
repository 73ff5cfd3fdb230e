"""A text cell as the messages of a chat. Knows no labels and no chat template."""

from collections.abc import Sequence

from sidelight.data.rows import is_list, is_mapping, plain, require_whole_characters
from sidelight.errors import SidelightError
from sidelight.prompts import Message


def parse_chat(cell: object, *, place: str) -> tuple[Message, ...]:
    """The messages of a text cell: a string is one user message, a list is a chat.

    Args:
        cell: A string, a list of objects with `role` and `content`, or None.
        place: Where the cell stands, for the error message.

    Returns:
        No message at all when the cell holds nothing but white space.

    Raises:
        SidelightError: The cell is neither, or its characters are not valid Unicode.
    """
    cell = plain(cell)
    if not is_list(cell):
        cell = [{"role": "user", "content": cell}]
    messages = tuple(_parse_message(message, place) for message in cell)
    return messages if any(message.content.strip() for message in messages) else ()


def parse_text(cell: object, *, place: str) -> str:
    """The text of a cell that must be a string; None is the empty text.

    Raises:
        SidelightError: The cell is not a string, or its characters are not valid Unicode.
    """
    if cell is None:
        return ""
    if not isinstance(cell, str):
        raise SidelightError(
            f"{place}: expected a text (a string, or a list of messages), got {_shown(cell)}. "
            "Quote it, or name the right column."
        )
    require_whole_characters(cell, place=place)
    return cell


def _parse_message(message: object, place: str) -> Message:
    role = message.get("role") if is_mapping(message) else None
    if not (is_mapping(message) and isinstance(role, str) and role and "content" in message):
        raise SidelightError(
            f"{place}: expected messages such as {{'role': 'user', 'content': 'Hello'}}, "
            f"got {_shown(message)}."
        )
    content = plain(message["content"])
    if is_list(content):
        return Message(role, _join_parts(content, place))
    return Message(role, parse_text(content, place=place))


def _join_parts(parts: Sequence[object], place: str) -> str:
    """The text of a message whose content is a list of OpenAI content parts."""
    for part in parts:
        if not (is_mapping(part) and part.get("type") == "text"):
            raise SidelightError(
                f"{place}: a probe reads text only, but a message has the part {_shown(part)}. "
                "Remove the parts that are not of type 'text'."
            )
    return "\n".join(
        parse_text(part.get("text"), place=place) for part in parts if is_mapping(part)
    )


def _shown(value: object) -> str:
    """A cell's value, short enough for an error message."""
    return repr(value)[:80]
