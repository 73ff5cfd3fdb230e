"""The turns of a prompt, recognised from its token ids alone.

``ChatFormat`` learns how a chat template delimits turns by rendering it with known contents. It
depends only on the tokenizer: the same ids have the same turns regardless of their origin.
"""

import calendar
import json
import re
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, dropwhile, groupby
from typing import Any

from jinja2 import TemplateError

from sidelight.models.control_tokens import Tokenizer, control_tokens
from sidelight.models.conversation import TokenRole

# Any other role is treated as the user.
_TOKEN_ROLES = {"assistant": TokenRole.REPLY, "tool": TokenRole.TOOL, "system": TokenRole.SYSTEM}
OUTSIDE = "outside"
"""The role of text before the first turn that the template does not write."""


@dataclass(frozen=True, slots=True)
class Turn:
    """The content of one turn.

    Attributes:
        role: As in messages, or ``OUTSIDE``.
        start: Index of its first token. A token that contains the end of a marker and the beginning
            of the content counts as content.
        stop: Index after its last token; equal to ``start`` if the content is empty.
    """

    role: str
    start: int
    stop: int


def roles_of_tokens(
    turns: Sequence[Turn], tokens: int, *, has_response: bool
) -> tuple[TokenRole, ...]:
    """The ``TokenRole`` of each token of a conversation.

    The template text around empty turns is not read, so that these turns add nothing. It is read
    only if no turn has text.

    Args:
        turns: One or more turns from ``ChatFormat``.
        tokens: Number of tokens of the conversation.
        has_response: Whether the last turn is the response to classify.
    """
    first = next((i for i, turn in enumerate(turns) if turn.role != "system"), None)
    if first is None:
        first, kinds = 0, [TokenRole.PROMPT] * len(turns)
    else:
        kinds = [TokenRole.UNREAD] * first
        kinds += [_TOKEN_ROLES.get(turn.role, TokenRole.PROMPT) for turn in turns[first:]]
    end = tokens
    if has_response and turns[-1].role == "assistant":
        kinds[-1] = TokenRole.RESPONSE
        end = turns[-1].start
    begin = turns[first].start
    token_roles = (
        [TokenRole.UNREAD] * begin
        + [TokenRole.TEMPLATE] * (end - begin)
        + [TokenRole.UNREAD] * (tokens - end)
    )
    has_text = any(turn.start < turn.stop for turn in turns[first:])
    ends = [*(turn.start for turn in turns[1:]), tokens]
    for turn, kind, next_start in zip(turns, kinds, ends, strict=True):
        token_roles[turn.start : turn.stop] = [kind] * (turn.stop - turn.start)
        if turn.start == turn.stop and has_text:
            token_roles[turn.start : next_start] = [TokenRole.UNREAD] * (next_start - turn.start)
    return tuple(token_roles)


def are_attributed(turns: Sequence[Turn], roles: Iterable[str]) -> bool:
    """Whether the turns found in token ids match messages with these roles.

    If not, a content has forged a turn, or the template renders one role as another. The template
    may add leading system turns, and may merge the results of several tools into one turn.
    """
    return _speakers(turn.role for turn in turns) == _speakers(roles)


def _speakers(roles: Iterable[str]) -> list[str]:
    read = dropwhile(("system", "developer", OUTSIDE).__contains__, roles)
    runs = groupby({"developer": "system", "function": "tool"}.get(role, role) for role in read)
    return [role for role, run in runs for _ in ([role] if role == "tool" else run)]


# A regular expression that matches nothing.
_NEVER = "$."
# Control tokens, and the beginning of the text, are represented by characters that no vocabulary
# has (Unicode's private planes).
_START = "\U000f0000"
_SYMBOL = "[\U000f0000-\U0010fffd]"
_CONTROL = re.compile(_SYMBOL)
_NOT_A_TOKEN = "\ufffd"

# Placeholders for a turn's content while a template is learned. Only letters, because every
# vocabulary has them.
_TURNS = "abcdef"
_SENTINEL = re.compile(f"sidelightmark([{_TURNS}])x")
_ROLES = ("user", "assistant", "tool", "system")
# Roles that may follow each role.
_NEXT = {
    "system": ("user",),
    "user": ("assistant", "user", "system"),
    "assistant": ("user",),
}


class ChatFormat:
    """The turn markers of a chat template.

    A turn begins at the tokens that the template writes before a role's content, regardless of
    their origin, and extends to the next such place, excluding what the template writes after a
    content. Every token between two markers therefore belongs to a turn, and text that imitates
    markers is read as the model reads it.

    Args:
        tokenizer: A tokenizer with a chat template.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        controls = control_tokens(tokenizer)
        self._symbols = {
            token_id: chr(ord(_START) + i) for i, token_id in enumerate(sorted(controls), 1)
        }
        before_contents, first, after = _literals(
            (self._spelled(text), roles, is_prompting)
            for text, roles, is_prompting in _rendered(tokenizer)
        )
        headers = _headers(before_contents)
        self._roles = [role for role, _ in headers]
        # A tokenizer may insert a space before a text unless the text is empty.
        self._header = re.compile(
            "|".join(
                f"({re.sub(f'(?<={_SYMBOL})▁$', '▁?', _as_pattern(text))})" for _, text in headers
            )
            or _NEVER
        )
        footers: dict[tuple[str, bool], set[str]] = defaultdict(set)
        for role, literal, is_end in after:
            before = self._to_header(literal)
            if before is not None or is_end:
                footers[role, before is None].add(literal if before is None else before)
        self._footers = {key: _ending_pattern(literals) for key, literals in footers.items()}
        preambles = {self._to_header(literal) or literal for literal in first}
        self._preamble = re.compile(f"{'|'.join(map(_as_pattern, preambles))}|{_SYMBOL}*")
        # What the tokenizer inserts before any text does not make it a conversation.
        self._no_evidence = {"", self._text(self._names(tokenizer("")["input_ids"]))[1:]}

    def markers(self, token_ids: Sequence[int]) -> tuple[str, ...]:
        """The role of each turn marker, including the generation prompt."""
        text = self._text(self._names(token_ids))
        return tuple(self._role(header) for header in self._header.finditer(text))

    def turns(self, token_ids: Sequence[int]) -> tuple[Turn, ...]:
        """Find the turns, in order; empty if the ids are plain text rather than a conversation.

        A generation prompt is not a turn, but a response that it begins is one.

        Args:
            token_ids: Token ids that the model reads.
        """
        names = self._names(token_ids)
        text = self._text(names)
        headers = list(self._header.finditer(text))
        if all(header[0].lstrip(_START) in self._no_evidence for header in headers):
            return ()
        first = headers[0].start()
        is_known = self._preamble.fullmatch(text, 0, first)
        spans = [] if is_known else [(OUTSIDE, len(_START), first)]
        ends = [*(header.start() for header in headers[1:]), len(text)]
        for header, end in zip(headers, ends, strict=True):
            role, begin = self._role(header), header.end()
            if role == "assistant" and begin == end:
                # A marker at the end is a generation prompt.
                continue
            # Start of the template text after the content.
            ending = self._footers.get((role, end == len(text)))
            footer = ending.search(text, begin, end) if ending else None
            stop = footer.start() if footer else end
            # A system text contains no control token. One means that the marker of another turn was
            # not found, or that the template continues, so probes must read what follows.
            foreign = _CONTROL.search(text, begin, stop) if role == "system" else None
            if foreign:
                spans.append((role, begin, foreign.start()))
                spans.append((OUTSIDE, foreign.start(), end))
            else:
                spans.append((role, begin, stop))
        starts = [*accumulate(map(len, names), initial=len(_START))]
        turns: list[Turn] = []
        for role, begin, end in spans:
            stop = bisect_left(starts, end)
            turns.append(Turn(role, min(bisect_right(starts, begin) - 1, stop), stop))
        return tuple(turns)

    def _role(self, header: re.Match[str]) -> str:
        return self._roles[(header.lastindex or 1) - 1]

    @staticmethod
    def _text(names: Sequence[str]) -> str:
        return _START + "".join(names)

    def _to_header(self, literal: str) -> str | None:
        """The text before the first marker; None if there is none."""
        header = self._header.search(literal)
        return literal[: header.start()] if header else None

    def _names(self, token_ids: Sequence[int]) -> list[str]:
        names = self._tokenizer.convert_ids_to_tokens([*token_ids])
        return [
            self._symbols.get(token_id) or name or _NOT_A_TOKEN
            for token_id, name in zip(token_ids, names, strict=True)
        ]

    def _spelled(self, rendered: str) -> str:
        tokens = self._tokenizer(rendered, add_special_tokens=False, verbose=False)
        return self._text(self._names(tokens["input_ids"]))


# A rendered conversation of known contents, the roles that its placeholders number, and whether a
# generation prompt follows.
_Rendered = tuple[str, tuple[str, ...], bool]


def _literals(
    conversations: Iterable[_Rendered],
) -> tuple[dict[str, set[str]], set[str], set[tuple[str, str, bool]]]:
    """The template text around contents, spelled as names of tokens.

    Returns:
        The text before a content, back to the previous content, by role; the text before the first
        content of a conversation; and for each role, the text after its contents, and whether the
        conversation ends with it.
    """
    before: dict[str, set[str]] = {role: set() for role in _ROLES}
    first: set[str] = set()
    after: set[tuple[str, str, bool]] = set()

    def add(literal: str, *, role: str, sentinels: int, is_end: bool = False) -> None:
        if not role:
            first.add(literal)
            return
        if sentinels > 1:
            # The end of a call's arguments, which may coincide with the end of a content.
            symbol = re.search(_SYMBOL, literal)
            literal = literal[symbol.start() :] if symbol else ""
        after.add((role, literal, is_end))

    for text, roles, is_for_generation in conversations:
        cursor, role, turn, sentinels = 0, "", -1, 0
        for sentinel in _SENTINEL.finditer(text):
            if _TURNS.index(sentinel[1]) == turn:
                # Text between the placeholders of one turn is part of its content.
                sentinels += 1
            else:
                add(text[cursor : sentinel.start()], role=role, sentinels=sentinels)
                turn, sentinels = _TURNS.index(sentinel[1]), 1
                role = roles[turn]
                before[role].add(text[cursor : sentinel.start()])
            cursor = sentinel.end()
        add(text[cursor:], role=role, sentinels=sentinels, is_end=True)
        if role and is_for_generation:
            before["assistant"].add(text[cursor:])
    return before, first, after


def _rendered(tokenizer: Tokenizer) -> Iterator[_Rendered]:
    """Render short conversations, with and without tools, that the template accepts."""
    for roles in (("system",), *_sequences(("user",), 5), *_sequences(("system", "user"), 5)):
        yield from _renderings(tokenizer, [_message(*turn) for turn in enumerate(roles)], roles)
    roles = ("user", "assistant", "tool", "tool", "assistant", "user")
    sentinel = _message(1, "assistant")["content"]
    arguments = {sentinel: sentinel}
    for written in (arguments, json.dumps(arguments)):
        messages = [_message(*turn) for turn in enumerate(roles)]
        function = {"name": sentinel, "arguments": written}
        call = {"id": sentinel, "type": "function", "function": function}
        messages[1] |= {"content": "", "tool_calls": [call]}
        for end in range(3, len(roles) + 1):
            yield from _renderings(tokenizer, messages[:end], roles[:end])


def _sequences(roles: tuple[str, ...], longest: int) -> Iterator[tuple[str, ...]]:
    """Sequences of roles that begin with these."""
    yield roles
    if len(roles) < longest:
        for role in _NEXT[roles[-1]]:
            yield from _sequences((*roles, role), longest)


def _message(index: int, role: str) -> dict[str, Any]:
    sentinel = f"sidelightmark{_TURNS[index]}x"
    message: dict[str, Any] = {"role": role, "content": sentinel}
    return message | ({"tool_call_id": sentinel, "name": sentinel} if role == "tool" else {})


def _renderings(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], roles: tuple[str, ...]
) -> Iterator[_Rendered]:
    try:
        plain, prompting = (
            tokenizer.apply_chat_template(
                [*messages], tokenize=False, add_generation_prompt=for_generation
            )
            for for_generation in (False, True)
        )
    # Templates refuse conversations in many ways, and read arbitrary fields of messages.
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError):
        return
    yield plain, roles, False
    if prompting != plain and roles[-1] != "assistant":
        yield prompting, roles, True


def _headers(before: Mapping[str, set[str]]) -> list[tuple[str, str]]:
    """The role and text of each marker that begins a turn, longest first.

    A marker is the shortest suffix of the text before a role's contents that begins with a control
    token and does not occur before other roles' contents. If the template writes more after a known
    marker, such as an empty thought, the longer text is a marker too.

    In ChatML, ``<|im_end|>`` and a line break precede ``<|im_start|>user`` and its line break
    between turns, but nothing precedes them at the beginning. The shortest suffix of both that no
    assistant turn has begins with ``<|im_start|>``.
    """
    roles: dict[str, str] = {}
    openers: set[str] = set()
    taken: set[str] = set()
    for role in _ROLES:
        literals = before[role] - taken
        taken |= literals
        # A template may render system and tool turns as user turns.
        earlier = (
            set[str]().union(
                *(before[role_before] for role_before in _ROLES[:2] if role_before != role),
                taken - literals,
            )
            - literals
        )
        for literal in sorted(literals, key=lambda text: (len(text), text)):
            markers = [text for text, text_role in roles.items() if text_role == role]
            begins = [literal.rfind(text) for text in markers if text in literal]
            if begins and re.search(_SYMBOL, literal):
                marker = literal[max(begins) :]
            else:
                marker = _shortest(literal, earlier, openers)
            # If a system marker only extends another role's marker by words, that role's content
            # can imitate it, so the system text counts as part of that content.
            imitates = role == "system" and any(
                marker.startswith(text) and not _CONTROL.search(marker, len(text))
                for text, text_role in roles.items()
                if text_role != role
            )
            if marker and not imitates:
                roles.setdefault(marker, role)
                openers.add(marker[0])
    return sorted(
        ((role, text) for text, role in roles.items()), key=lambda marker: -len(marker[1])
    )


# Whitespace in names of tokens: GPT-2's bytes, SentencePiece's symbol, and plain characters.
_BLANKS = re.compile(r"[ĊĠĉč▁\s]|<0x(?:0[9AD]|20)>")


def _shortest(literal: str, earlier: set[str], openers: set[str]) -> str:
    """The shortest marker at the end of a literal, from a known first character if there is one."""
    starts = [symbol.start() for symbol in re.finditer(_SYMBOL, literal)]
    if not starts:
        # A template without control tokens delimits turns by words at the beginning of a line.
        return literal if _BLANKS.sub("", literal) else ""
    suffixes = [literal[start:] for start in reversed(starts)]
    telling = [s for s in suffixes if not any(text.endswith(s) for text in earlier)]
    return next((s for s in telling if s[0] in openers), telling[0] if telling else "")


_MONTH = "|".join([*calendar.month_name[1:], *calendar.month_abbr[1:]])
_DAY = "|".join([*calendar.day_name, *calendar.day_abbr])


def _ending_pattern(literals: Iterable[str]) -> re.Pattern[str]:
    """A pattern that finds the longest of these suffixes of a text."""
    longest_first = sorted(filter(None, literals), key=len, reverse=True)
    return re.compile(f"(?:{'|'.join(map(_as_pattern, longest_first)) or _NEVER})\\Z")


def _as_pattern(literal: str) -> str:
    """A regular expression for a literal that matches any date in it."""
    pattern = re.sub(_MONTH, lambda _: f"(?:{_MONTH})", re.escape(literal))
    pattern = re.sub(_DAY, lambda _: f"(?:{_DAY})", pattern)
    return re.sub(r"\d+", r"\\d+", pattern)
