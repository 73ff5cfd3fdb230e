"""Prompts whose verdicts are known beforehand, since each carries what decides them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np

from sidelight.data import Example, Examples
from sidelight.prompts import Message
from sidelight.types import Task

# A word that names the ticket: a verdict that went to another request most likely names another.
WORDS = (
    "amber", "basalt", "cedar", "dune", "ember", "fjord", "glacier", "harbor",
    "iris", "juniper", "kelp", "lagoon", "maple", "nectar", "onyx", "pebble",
)  # fmt: skip
_HARMLESS = (
    "the parcel came today, thank you.",
    "please add one more chair to the order.",
    "which colours does the lamp come in?",
    "I will pick it up on Friday.",
)
_HARMFUL = (
    "you are all useless idiots and thieves.",
    "I hate you, you stupid liars.",
)
# One of so many tickets is blocked.
_BLOCKED_EVERY = 8

WORD = Task("multiclass", WORDS)
ABUSE = Task("binary", ("fine", "abuse"))


@dataclass(frozen=True)
class Ticket:
    """One prompt.

    Attributes:
        number: Its nonce; no two tickets of a run share it.
        word: The label that the probe `word` has to give.
        is_abuse: Whether the probe `abuse` has to flag it.
    """

    number: int
    word: str
    is_abuse: bool

    @property
    def text(self) -> str:
        """What is sent."""
        sentences = _HARMFUL if self.is_abuse else _HARMLESS
        round_of_words = self.number // len(WORDS)
        return f"Ticket {self.word} {self.number}: {sentences[round_of_words % len(sentences)]}"


def tickets(first: int = 100_000) -> Iterator[Ticket]:
    """Tickets without end, numbered from ``first``."""
    for number in count(first):
        # 7 and 16 share no factor, so that neighbours differ and every word comes in turn; abuse
        # comes with other words in each turn.
        is_abuse = (number + number // len(WORDS)) % _BLOCKED_EVERY == 0
        yield Ticket(number, WORDS[number * 7 % len(WORDS)], is_abuse)


def word_examples(some: Sequence[Ticket]) -> Examples:
    """For the probe that names a ticket's word."""
    return _examples(some, WORD, [WORDS.index(ticket.word) for ticket in some])


def abuse_examples(some: Sequence[Ticket]) -> Examples:
    """For the probe that flags abuse."""
    return _examples(some, ABUSE, [int(ticket.is_abuse) for ticket in some])


def reply_examples(some: Sequence[Ticket]) -> Examples:
    """The same sentences as answers, for a probe that reads the response."""
    items = [
        Example((Message("user", f"Write to number {ticket.number}."),), ticket.text)
        for ticket in some
    ]
    return _of(items, ABUSE, [int(ticket.is_abuse) for ticket in some])


def _examples(some: Sequence[Ticket], task: Task, labels: Sequence[int]) -> Examples:
    return _of([Example((Message("user", ticket.text),)) for ticket in some], task, labels)


def _of(items: Sequence[Example], task: Task, labels: Sequence[int]) -> Examples:
    return Examples(tuple(items), task, np.array(labels, dtype=np.int64), ({},) * len(items))
