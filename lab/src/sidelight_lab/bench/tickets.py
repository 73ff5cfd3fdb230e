"""Prompts whose right verdicts are known beforehand, and probes that always give them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

import numpy as np

from sidelight.artifact import save_probe
from sidelight.backbone import TransformersBackbone
from sidelight.data.examples import Example, LabelledExamples
from sidelight.errors import SidelightError
from sidelight.mechanisms.base import mechanism_spec
from sidelight.prompts import Message, Reads
from sidelight.training.classifier import load
from sidelight.training.fit import fit
from sidelight.training.settings import FitOptions
from sidelight.types import Task

# The word of a ticket: a verdict of another request most likely names another word.
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
# One of this many tickets is blocked.
_BLOCKED_EVERY = 8

_ABUSE = Task("binary", ("fine", "abuse"))
# `word` and `abuse` read the prompt, `reply` reads the response.
PROBES = {"word": Task("multiclass", WORDS), "abuse": _ABUSE, "reply": _ABUSE}
# Enough for such plain words; more would only take longer.
_TRAINING_TICKETS = {"word": 320, "abuse": 96, "reply": 96}
_CHECKED_TICKETS = 64
# The rule on the output is checked after every token but never fires, so answers keep their length.
_POLICY = """[input.abuse]
mode = "block"

[output.reply]
mode = "block"
threshold = 1.0
"""


@dataclass(frozen=True)
class Ticket:
    """One prompt.

    Attributes:
        number: Unique in a run.
        word: The label that the probe `word` must give.
        is_abuse: Whether the probe `abuse` must flag it.
    """

    number: int
    word: str
    is_abuse: bool

    @property
    def text(self) -> str:
        """The text of the prompt."""
        sentences = _HARMFUL if self.is_abuse else _HARMLESS
        round_of_words = self.number // len(WORDS)
        return f"Ticket {self.word} {self.number}: {sentences[round_of_words % len(sentences)]}"


def tickets(first: int = 100_000) -> Iterator[Ticket]:
    """Endless tickets, numbered from ``first``."""
    for number in count(first):
        # 7 and 16 share no factor, so every word comes in turn and neighbours differ; in each turn,
        # abuse comes with other words.
        is_abuse = (number + number // len(WORDS)) % _BLOCKED_EVERY == 0
        yield Ticket(number, WORDS[number * 7 % len(WORDS)], is_abuse)


def prepare(backbone: TransformersBackbone, folder: Path) -> tuple[list[Path], Path]:
    """Trains the probes on tickets that are not asked later.

    Returns:
        The folders of the probes, and the file of a policy that blocks by them.

    Raises:
        SidelightError: A probe of the prompt is wrong about an unseen ticket.
    """
    # Half of them are abuse, with every word, so few tickets are enough.
    plain = islice(tickets(first=500_000), max(_TRAINING_TICKETS.values()))
    training = [Ticket(one.number, one.word, one.number // len(WORDS) % 2 == 0) for one in plain]
    checked = list(islice(tickets(first=900_000), _CHECKED_TICKETS))
    folders: list[Path] = []
    for name in PROBES:
        options = FitOptions(
            mechanisms=(mechanism_spec("readout", {"extremes": "pair"}),),
            reads=Reads("response" if name == "reply" else "prompt"),
            cache_root=folder / "activations",
        )
        examples = _examples(name, training[: _TRAINING_TICKETS[name]])
        made = fit(backbone, examples, None, name=name, options=options)
        folders.append(save_probe(made.best.probe, folder / name))
        if name != "reply":
            report = load(folders[-1], model=backbone).evaluate(_examples(name, checked))
            accuracy = report.metrics["accuracy"].value
            if accuracy != 1:
                raise SidelightError(
                    f"Got a probe '{name}' of accuracy {accuracy} on this model, wanted one that "
                    "is always right, since its verdicts must be known beforehand. Choose another "
                    "--model."
                )
    policy = folder / "policy.toml"
    policy.write_text(_POLICY, "utf-8")
    return folders, policy


def _examples(probe: str, some: Sequence[Ticket]) -> LabelledExamples:
    """The tickets as prompts, or as responses for the probe `reply`."""
    if probe == "reply":
        asked = [f"Write to number {ticket.number}." for ticket in some]
        items = [
            Example((Message("user", text),), ticket.text)
            for text, ticket in zip(asked, some, strict=True)
        ]
    else:
        items = [Example((Message("user", ticket.text),)) for ticket in some]
    labels = [
        WORDS.index(ticket.word) if probe == "word" else int(ticket.is_abuse) for ticket in some
    ]
    rows = ({},) * len(items)
    return LabelledExamples(tuple(items), rows, task=PROBES[probe], labels=np.array(labels))
