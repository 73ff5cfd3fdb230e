"""Whether a probe is right in front of ordinary traffic: harmless chats, and attacks among them.

Each conversation is judged as it is served, in one run. ``everyday.json`` has texts that were
written for this.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from itertools import chain, compress, cycle, islice
from random import Random
from typing import Any

import numpy as np
from jaxtyping import Float

from sidelight.data.examples import LabelledExamples
from sidelight.data.loading import load_examples
from sidelight.errors import SidelightError
from sidelight.progress import progress
from sidelight.prompts import Message
from sidelight_lab.bench.measurement import Record, conditions, table
from sidelight_lab.datasets import default_root
from sidelight_lab.redteam.attacks import Messages
from sidelight_lab.redteam.measure import Rate
from sidelight_lab.redteam.subjects import ProbeTarget, positive_texts

Margins = Float[np.ndarray, " conversation"]

PADDING_WORDS = (50, 150, 400, 600)
ATTACK_PADDING_WORDS = (50, 150, 600)
_BANDS = ((7, 30), (30, 60), (60, 150), (150, 300))
# Real prompts of a band.
_PROMPTS = 50
_STORY_WORDS = 150
_PIECE_WORDS = 4
_ANSWER_WORDS = 40
# Of an agent's conversation, turn by turn.
_AGENT_ROLES = ("user", "assistant", "tool", "assistant", "user")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n\s*")

# Rows of harmless traffic that attacks are compared with.
_PADDING = "{} words of padding"
_QUESTIONS = "20 questions"
_STORY = f"{_STORY_WORDS} words of a story"
_TURNS = f"turns of {_PIECE_WORDS} words"


def first_words(text: str, count: int) -> str:
    """The text up to the end of its ``count``-th word."""
    *_, last = islice(re.finditer(r"\S+", text), count)
    return text[: last.end()]


CONTENT: Mapping[str, list[Any]] = json.loads(
    (files("sidelight_lab.bench") / "everyday.json").read_text(encoding="utf-8")
)
QUESTIONS: Sequence[str] = CONTENT["questions"]
STORIES = [first_words(story, _STORY_WORDS) for story in CONTENT["stories"]]
ANSWERS = [first_words(answer, _ANSWER_WORDS) for answer in CONTENT["answers"]]
AGENTS = [tuple(map(Message, _AGENT_ROLES, turns)) for turns in CONTENT["agents"]]


@dataclass(frozen=True)
class AttackRow:
    """Attacks among harmless texts; ``harmless`` is the row of those texts alone."""

    name: str
    conversations: Sequence[Messages]
    harmless: str


@dataclass(frozen=True)
class Count(Rate):
    """How many of some conversations are flagged, and how many the model cannot read."""

    left_out: int

    @staticmethod
    def of(margins: Margins) -> "Count":
        left_out = int(np.isnan(margins).sum())
        return Count(int((margins >= 0).sum()), len(margins) - left_out, left_out)

    def minus(self, alarms: "Count") -> float | None:
        if self.share is None or alarms.share is None:
            return None
        return self.share - alarms.share

    def cells(self) -> tuple[str, str]:
        left_out = f" ({self.left_out} left out)" if self.left_out else ""
        share = "-" if self.share is None else f"{self.share:.2f}"
        interval = "" if self.interval is None else " [{:.2f}, {:.2f}]".format(*self.interval)
        return f"{self.flagged} of {self.texts}{left_out}", share + interval

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "share": self.share, "interval": self.interval}


def measure_everyday(
    target: ProbeTarget,
    examples: LabelledExamples,
    *,
    prompts: Sequence[str],
    own: Mapping[str, Sequence[Messages]],
    attacks: int,
    seed: int,
) -> Record:
    """The share of harmless traffic that is flagged, and of attacks among harmless texts.

    Args:
        target: The probe on its backbone.
        examples: Labelled texts that training has not seen; the positive ones are attacks.
        prompts: Harmless texts: one half are the real prompts, the other half is padding. Without
            any, both are left out.
        own: More harmless conversations, by the name of their row.
        attacks: The most attacks, and the number of paddings of each length.
        seed: Draws attacks, prompts, paddings, and the order of the questions.

    Raises:
        SidelightError: The examples have no positive text, or no other.
    """
    random = Random(seed)
    is_positive = positive_texts(examples, target.thresholds)
    positives = [item.messages for item in compress(examples.items, is_positive)]
    negatives = [item.messages for item in compress(examples.items, ~is_positive)]
    if not (positives and negatives):
        raise SidelightError(
            f"Got {len(positives)} texts with {' or '.join(target.thresholds)} and "
            f"{len(negatives)} without; wanted at least one of each. Add texts to --data."
        )
    drawn = random.sample(positives, min(attacks, len(positives)))
    order = random.sample(prompts, len(prompts))
    paddings = long_texts(order[::2], attacks, words=max(PADDING_WORDS))
    questions = ["\n".join(random.sample(QUESTIONS, len(QUESTIONS))) for _ in drawn]
    partners = [min(negatives, key=lambda text: abs(_size(text) - _size(one))) for one in drawn]
    harmless = {
        "small talk": _chats(CONTENT["small talk"]),
        "agent conversations": AGENTS,
        "their first turn alone": [turns[:1] for turns in AGENTS],
        **{
            f"real prompts of {low} to {high} words": _chats(
                [text for text in order[1::2] if low <= len(text.split()) < high][:_PROMPTS]
            )
            for low, high in (_BANDS if prompts else ())
        },
        **own,
        **{
            _PADDING.format(words): _chats([first_words(text, words) for text in paddings])
            for words in (PADDING_WORDS if paddings else ())
        },
        _QUESTIONS: _chats(questions),
        _STORY: _chats(STORIES),
        _TURNS: [in_turns(text, ANSWERS) for text in partners],
    }
    rows = attack_rows(drawn, paddings=paddings, questions=questions)
    groups = [drawn, *harmless.values(), *(row.conversations for row in rows)]
    alone, *margins = _margins(target, groups)
    # What the model cannot read is NaN, so it is not flagged.
    is_flagged = alone >= 0
    alarms = {name: Count.of(each) for name, each in zip(harmless, margins, strict=False)}
    recalls = [Count.of(own[is_flagged]) for own in margins[len(harmless) :]]
    beside = [alarms[row.harmless] for row in rows]
    figures = [
        (row.name, recall, alarm, recall.minus(alarm))
        for row, recall, alarm in zip(rows, recalls, beside, strict=True)
    ]
    harmless_cells = [[name, *count.cells()] for name, count in alarms.items()]
    attack_cells = [
        [name, *recall.cells(), alarm.cells()[1], "-" if net is None else f"{net:.2f}"]
        for name, recall, alarm, net in figures
    ]
    settings = {"probe": target.probe.name, "thresholds": dict(target.thresholds), "seed": seed}
    return Record(
        "everyday",
        conditions(target.backbone, settings),
        {
            "harmless": {name: count.to_dict() for name, count in alarms.items()},
            "alone": Count.of(alone).to_dict(),
            "attacks": {
                name: {"recall": recall.to_dict(), "false_alarms": alarm.to_dict(), "net": net}
                for name, recall, alarm, net in figures
            },
        },
        (
            table("Harmless traffic", ["what", "flagged", "share"], harmless_cells),
            table(
                f"Attacks: {Count.of(alone).cells()[0]} are flagged alone",
                ["among", "still flagged", "share", "without the attacks", "net"],
                attack_cells,
            ),
        ),
    )


def attack_rows(
    attacks: Sequence[Messages], *, paddings: Sequence[str], questions: Sequence[str]
) -> list[AttackRow]:
    """Each attack in padding of each length, beside questions and stories, and in short turns."""
    rows: list[AttackRow] = []
    for words in ATTACK_PADDING_WORDS if paddings else ():
        texts = [first_words(text, words) for text in paddings]
        places = {
            "before": [(text, "") for text in texts],
            "after": [("", text) for text in texts],
            "around": [halves(text) for text in texts],
        }
        rows += [
            AttackRow(f"{words} words {place}", _between(attacks, sides), _PADDING.format(words))
            for place, sides in places.items()
        ]
    asked = _between(attacks, [("", text) for text in questions])
    return [
        *rows,
        AttackRow(f"{_QUESTIONS} after", asked, _QUESTIONS),
        AttackRow(f"{_STORY} before", _between(attacks, [(s, "") for s in STORIES]), _STORY),
        AttackRow(f"{_STORY} after", _between(attacks, [("", s) for s in STORIES]), _STORY),
        AttackRow(_TURNS, [in_turns(attack, ANSWERS) for attack in attacks], _TURNS),
    ]


def toxicchat_prompts() -> list[str]:
    """ToxicChat's training prompts that are neither toxic nor jailbreaking.

    Raises:
        SidelightError: They are not here.
    """
    file = default_root() / "toxicchat0124" / "train.jsonl.gz"
    if not file.is_file():
        raise SidelightError(
            f"There is no {file}. Put ToxicChat there (SIDELIGHT_DATA names the folder above), or "
            "name a file of harmless prompts with --padding."
        )
    examples = load_examples(file, label="toxicity,jailbreaking")
    return [item.text for item in compress(examples.items, ~np.any(examples.labels, axis=1))]


def long_texts(prompts: Sequence[str], count: int, *, words: int) -> list[str]:
    """Texts of at least so many words, each of other prompts as far as these suffice."""
    endless = cycle(prompts)
    texts = [""] * (count if prompts else 0)
    for number in range(len(texts)):
        while len(texts[number].split()) < words:
            texts[number] += next(endless) + "\n\n"
    return texts


def halves(text: str) -> tuple[str, str]:
    """The text cut after the sentence that ends nearest to its middle, or between two words."""
    cuts = [*_SENTENCE_END.finditer(text)] or [*re.finditer(r"\s+", text)]
    cut = min(cuts, key=lambda cut: abs(cut.start() - len(text) / 2))
    return text[: cut.start()], text[cut.end() :]


def in_turns(messages: Messages, answers: Sequence[str]) -> Messages:
    """The last message in pieces of four words, each a turn, with answers between them."""
    *before, last = messages
    words = last.content.split()
    pieces = [
        Message(last.role, " ".join(words[start : start + _PIECE_WORDS]))
        for start in range(0, len(words), _PIECE_WORDS)
    ]
    turns = zip(pieces, (Message("assistant", answer) for answer in cycle(answers)), strict=False)
    return (*before, *chain.from_iterable(turns))[:-1]


def _between(attacks: Sequence[Messages], sides: Sequence[tuple[str, str]]) -> list[Messages]:
    """Each attack's last message between two texts."""
    return [
        (*before, Message(last.role, "\n\n".join(filter(None, (left, last.content, right)))))
        for (*before, last), (left, right) in zip(attacks, cycle(sides), strict=False)
    ]


def _chats(texts: Sequence[str]) -> list[Messages]:
    return [(Message("user", text),) for text in texts]


def _size(messages: Messages) -> int:
    return len(messages[-1].content.split())


def _margins(target: ProbeTarget, groups: Sequence[Sequence[Messages]]) -> list[Margins]:
    """The margin of each conversation, group by group; NaN: the model cannot read it."""
    conversations = [conversation for group in groups for conversation in group]
    lengths = [_tokens(target, conversation) for conversation in conversations]
    readable = [row for row, length in enumerate(lengths) if length]
    margins = np.full(len(conversations), np.nan)
    with progress("Judging", sum(lengths), unit="tokens") as shown:
        margins[readable] = target.margins([conversations[row] for row in readable], shown)
    return np.split(margins, np.cumsum([len(group) for group in groups])[:-1])


def _tokens(target: ProbeTarget, conversation: Messages) -> int:
    """The length of a conversation; 0 if it is too long, or if the template refuses its roles."""
    try:
        return target.tokens(conversation)
    except SidelightError:
        return 0
