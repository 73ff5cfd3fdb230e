"""Behaviour of a probe on background traffic: harmless chats, and attacks embedded in them.

Each conversation is classified as in serving, in one run. ``everyday.json`` has texts written for
this purpose.
"""

import json
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from itertools import chain, compress, cycle, islice
from random import Random
from typing import Any

import numpy as np
from jaxtyping import Float
from sklearn.metrics import roc_auc_score

from sidelight.data.examples import LabelledExamples
from sidelight.data.loading import load_examples
from sidelight.errors import SidelightError
from sidelight.models.conversation import Message
from sidelight.progress import progress
from sidelight_lab.bench.measurement import Record, conditions, table
from sidelight_lab.datasets import default_root
from sidelight_lab.redteam.attacks import Messages, between, word_chunks
from sidelight_lab.redteam.measure import Rate, positive_texts
from sidelight_lab.redteam.targets import ProbeTarget

PADDING_WORDS = (50, 150, 400, 600)
ATTACK_PADDING_WORDS = (50, 150, 600)
_BANDS = ((7, 30), (30, 60), (60, 150), (150, 300))
# Real prompts of a band.
_PROMPTS = 50
_CHUNK_WORDS = 4
_ANSWER_WORDS = 40
# Of an agent's conversation, turn by turn.
_AGENT_ROLES = ("user", "assistant", "tool", "assistant", "user")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n\s*")

# Rows of harmless traffic that attacks are compared with.
_PADDING = "{} words of padding"
_QUESTIONS = "20 questions"
_TURNS = f"turns of {_CHUNK_WORDS} words"


def first_words(text: str, count: int) -> str:
    """The text up to the end of its ``count``-th word."""
    *_, last = islice(re.finditer(r"\S+", text), count)
    return text[: last.end()]


CONTENT: Mapping[str, list[Any]] = json.loads(
    (files("sidelight_lab.bench") / "everyday.json").read_text(encoding="utf-8")
)
QUESTIONS: Sequence[str] = CONTENT["questions"]
ANSWERS = [first_words(answer, _ANSWER_WORDS) for answer in CONTENT["answers"]]
AGENTS = [tuple(map(Message, _AGENT_ROLES, turns)) for turns in CONTENT["agents"]]


def measure_everyday(
    target: ProbeTarget,
    examples: LabelledExamples,
    *,
    prompts: Sequence[str],
    user_texts: Mapping[str, Sequence[Messages]],
    attacks: int = 20,
) -> Record:
    """Measure the flagged share of harmless traffic, and of attacks embedded in it.

    Args:
        target: The probe on its backbone.
        examples: Labelled texts not used in training; the positive ones are attacks.
        prompts: Harmless texts: half are used as real prompts, half as padding. Without any, both
            are left out.
        user_texts: Additional harmless conversations, by the name of their row.
        attacks: Maximum number of attacks, and number of paddings of each length.

    Raises:
        SidelightError: The examples have no positive text, or no negative one.
    """
    random = Random(0)
    is_positive = positive_texts(examples, target.thresholds)
    positives = [tuple(item.messages) for item in compress(examples.items, is_positive)]
    negatives = [tuple(item.messages) for item in compress(examples.items, ~is_positive)]
    if not (positives and negatives):
        raise SidelightError(
            f"Got {len(positives)} texts with {' or '.join(target.thresholds)} and "
            f"{len(negatives)} without, but at least one of each is needed. Add texts to --data."
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
        **user_texts,
        **{
            _PADDING.format(words): _chats([first_words(text, words) for text in paddings])
            for words in (PADDING_WORDS if paddings else ())
        },
        _QUESTIONS: _chats(questions),
        _TURNS: [in_turns(text, ANSWERS) for text in partners],
    }
    among = attacks_among(drawn, paddings=paddings, questions=questions)
    groups = [drawn, *harmless.values(), *(conversations for conversations, _ in among.values())]
    single, *margins = _margins(target, groups)
    # Texts that the model cannot read are NaN, so they are not flagged.
    is_flagged = single >= 0
    flagged_singly = Rate.of(single.tolist())
    alarms = {
        name: Rate.of(margin.tolist()) for name, margin in zip(harmless, margins, strict=False)
    }
    without = dict(zip(harmless, margins, strict=False))
    rows = [
        (
            name,
            recall := Rate.of(margin[is_flagged].tolist()),
            alarms[beside],
            recall.minus(alarms[beside]),
            auroc_of(margin, without[beside]),
        )
        for (name, (_, beside)), margin in zip(among.items(), margins[len(harmless) :], strict=True)
    ]
    harmless_cells = [[name, *_cells(rate)] for name, rate in alarms.items()]
    attack_cells = [
        [name, *_cells(recall), _cells(alarm)[1], _number(net, 2), _number(auroc, 3)]
        for name, recall, alarm, net, auroc in rows
    ]
    settings = {"probe": target.probe.name, "thresholds": dict(target.thresholds)}
    return Record(
        "everyday",
        conditions(target.backbone, settings),
        {
            "harmless": {name: rate.to_dict() for name, rate in alarms.items()},
            "alone": flagged_singly.to_dict(),
            "attacks": {
                name: {
                    "recall": recall.to_dict(),
                    "false_alarms": alarm.to_dict(),
                    "net": net,
                    "auroc": auroc,
                }
                for name, recall, alarm, net, auroc in rows
            },
        },
        (
            table("Harmless traffic", ["what", "flagged", "share"], harmless_cells),
            table(
                f"Attacks: {_cells(flagged_singly)[0]} are flagged alone",
                ["among", "still flagged", "share", "without the attacks", "net", "AUROC"],
                attack_cells,
            ),
        ),
    )


def _cells(rate: Rate) -> tuple[str, str]:
    left_out = f" ({rate.left_out} left out)" if rate.left_out else ""
    return f"{rate.flagged} of {rate.texts}{left_out}", str(rate.estimate)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def auroc_of(
    attacks: Float[np.ndarray, " attack"], harmless: Float[np.ndarray, " text"]
) -> float | None:
    """AUROC of attacks in a setting against the setting alone.

    Texts that the model cannot read are left out; None if no text is left on either side.
    """
    attacks, harmless = (scores[np.isfinite(scores)] for scores in (attacks, harmless))
    if not (len(attacks) and len(harmless)):
        return None
    is_attack = np.repeat([True, False], [len(attacks), len(harmless)])
    return float(roc_auc_score(is_attack, np.concatenate([attacks, harmless])))


def attacks_among(
    attacks: Sequence[Messages], *, paddings: Sequence[str], questions: Sequence[str]
) -> dict[str, tuple[list[Messages], str]]:
    """Each attack in padding of each length, before questions, and in short turns.

    By its name each row has its conversations, and the harmless row of what stands around them.
    """
    rows: dict[str, tuple[list[Messages], str]] = {}
    for words in ATTACK_PADDING_WORDS if paddings else ():
        texts = [first_words(text, words) for text in paddings]
        for place, sides in {
            "before": [(text, "") for text in texts],
            "after": [("", text) for text in texts],
            "around": [halves(text) for text in texts],
        }.items():
            rows[f"{words} words {place}"] = (_beside(attacks, sides), _PADDING.format(words))
    asked = [("", text) for text in questions]
    return {
        **rows,
        f"{_QUESTIONS} after": (_beside(attacks, asked), _QUESTIONS),
        _TURNS: ([in_turns(attack, ANSWERS) for attack in attacks], _TURNS),
    }


def toxicchat_prompts() -> list[str]:
    """ToxicChat's training prompts that are neither toxic nor jailbreaking.

    Raises:
        SidelightError: The data set is not available.
    """
    file = default_root() / "toxicchat0124" / "train.jsonl.gz"
    if not file.is_file():
        raise SidelightError(
            f"There is no {file}. Put ToxicChat there (SIDELIGHT_DATA names the parent folder), "
            "or name a file of harmless prompts with --padding."
        )
    examples = load_examples(file, label="toxicity,jailbreaking")
    return [item.text for item in compress(examples.items, ~np.any(examples.labels, axis=1))]


def long_texts(prompts: Sequence[str], count: int, *, words: int) -> list[str]:
    """Texts of at least this many words, each from different prompts as far as possible."""
    endless = cycle(prompts)
    texts = [""] * (count if prompts else 0)
    for number in range(len(texts)):
        while len(texts[number].split()) < words:
            texts[number] += next(endless) + "\n\n"
    return texts


def halves(text: str) -> tuple[str, str]:
    """Split the text after the sentence that ends closest to its middle, or between two words."""
    cuts = [*_SENTENCE_END.finditer(text)] or [*re.finditer(r"\s+", text)]
    cut = min(cuts, key=lambda cut: abs(cut.start() - len(text) / 2))
    return text[: cut.start()], text[cut.end() :]


def in_turns(messages: Messages, answers: Sequence[str]) -> Messages:
    """Split the last message into turns of four words, with responses between them."""
    *before, last = messages
    asked = [Message(last.role, chunk) for chunk in word_chunks(last.content, _CHUNK_WORDS)]
    turns = zip(asked, (Message("assistant", answer) for answer in cycle(answers)), strict=False)
    return (*before, *chain.from_iterable(turns))[:-1]


def _beside(attacks: Sequence[Messages], sides: Sequence[tuple[str, str]]) -> list[Messages]:
    """Place each attack's last message between two texts."""
    return [
        (*before, Message(last.role, between(left, last.content, right)))
        for (*before, last), (left, right) in zip(attacks, cycle(sides), strict=False)
    ]


def _chats(texts: Sequence[str]) -> list[Messages]:
    return [(Message("user", text),) for text in texts]


def _size(messages: Messages) -> int:
    return len(messages[-1].content.split())


def _margins(
    target: ProbeTarget, groups: Sequence[Sequence[Messages]]
) -> list[Float[np.ndarray, " conversation"]]:
    """The margin of each conversation, group by group; NaN if the model cannot read it."""
    margins = [np.full(len(group), np.nan) for group in groups]
    with progress("Classifying", len(groups), unit="rows") as advance:
        for margin, group in zip(margins, groups, strict=True):
            readable = [row for row, turns in enumerate(group) if target.reads(turns)]
            margin[readable] = target.margins([group[row] for row in readable])
            advance(1)
    return margins
