"""Contexts of training texts: alone, and embedded in background traffic.

A probe trained only on isolated texts treats everything else as its rarest class: it flags
greetings, long prompts and tool results, and misses a text embedded in a long one. Each text is
therefore also shown in a few contexts built from background conversations (``background.py``),
which are also shown alone as unlabelled texts. A context, and the background that it is built from,
stays on the same side of every split as its text.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Literal

import numpy as np
from jaxtyping import Int

from sidelight.data.examples import Example, LabelledExamples, located
from sidelight.errors import SidelightError
from sidelight.models.conversation import (
    EncodedPrompt,
    Message,
    PlainText,
    Reads,
    lengths_of_turns,
)
from sidelight.models.encode import PromptEncoder
from sidelight.states.reader import Reader
from sidelight.training.background import Background, Messages
from sidelight.training.encoding import TextEncoder
from sidelight.training.settings import FitOptions
from sidelight.types import Numbers

Kind = Literal["without_context", "inside", "turn", "plain", "background"]
# Some texts of a data set, and the background for their contexts.
Group = tuple[Int[Numbers, " _"], Background]

# Probability of each kind of context; plain text only if the probe allows it.
_SHARES: dict[Kind, float] = {"inside": 0.8, "turn": 0.2}
# Number of words around a text, log-uniform.
_SURROUNDING_WORDS = (5, 400)
_JOINTS = ("\n\n", "\n", " ")
_SENTENCE_END = re.compile(r"(?<=[.!?\n])\s+")
# Probability that a text that is one of several turns is classified alone.
_ONE_TURN_SHARE = 0.5
# Tokens of contexts relative to those of the texts, the minimum, and the share of background alone.
# A GPU reads this many in a few seconds.
_CONTEXT_TOKENS, _LEAST_CONTEXT_TOKENS, _LEAST_CONTEXT_TOKENS_ON_GPU = 0.6, 40_000, 400_000
_BACKGROUND_SHARE = 0.7
# No probe reads these turns at the beginning.
_SYSTEM = ("system", "developer")
# Maximum number of contexts per text, and of attempts per context.
_MOST_OF_A_TEXT, _ATTEMPTS = 3, 4


@dataclass(frozen=True)
class Context:
    """A text in its context, or a background conversation.

    Attributes:
        kind: ``without_context``, ``inside`` other text, a ``turn`` of a conversation, ``plain``
            text, or ``background`` alone.
        example: The conversation to run.
        prompt: The encoded conversation, restricted to what is classified.
        words: Number of words around the text, or in the background.
        text: Row of the labelled text in its data set; None for background.
        group: Index of the group of texts that it was drawn for.
    """

    kind: Kind
    example: Example
    prompt: EncodedPrompt
    words: int
    text: int | None = None
    group: int = 0


def has_contexts(examples: LabelledExamples, options: FitOptions) -> bool:
    """Whether training uses contexts, as it does except for responses and labelled spans."""
    return examples.takes_contexts and not options.reads.includes_response


def draw_contexts(
    reader: Reader,
    examples: LabelledExamples,
    groups: Sequence[Group],
    options: FitOptions,
    encode: TextEncoder,
    *,
    first: int = 0,
) -> tuple[Context, ...]:
    """Draw contexts of texts, and background alone; empty without background or for labelled spans.

    Args:
        reader: Reader that encodes them.
        examples: The texts.
        groups: Groups of texts to draw contexts for.
        options: Options that set what is read, the tokens of contexts, and the longest context.
        encode: Encodes the texts.
        first: Index of the first group.
    """
    task, encoder = examples.task, reader.encoder
    is_available = (
        any(len(background) for _, background in groups) or encoder.prompt_format == "both"
    )
    if not is_available or not has_contexts(examples, options):
        return ()
    by_turn = options.reads_of(task).scope == "each_turn"
    limit = min(options.max_tokens, encoder.max_tokens)
    least = options.context_tokens
    if least is None:
        is_slow = reader.device.type == "cpu"
        least = _LEAST_CONTEXT_TOKENS if is_slow else _LEAST_CONTEXT_TOKENS_ON_GPU
    contexts: list[Context] = []
    for group, (texts, background) in enumerate(groups, start=first):
        sampler = ContextSampler(
            encoder,
            options.reads,
            background.conversations,
            by_turn=by_turn,
            max_tokens=limit,
            seed=int(texts[0]),
        )
        of_texts = 0
        for row in texts.tolist():
            with located(examples.items[row], row):
                of_texts += min(len(encode(examples.items[row].messages)), limit)
        tokens = context_budget(of_texts, least=least / len(groups))
        background_contexts: list[Context] = []
        if by_turn or task.abstains:
            background_contexts = sampler.background(tokens=round(tokens * _BACKGROUND_SHARE))
            tokens -= sum(len(context.prompt) for context in background_contexts)
        drawn = (*background_contexts, *sampler.of_texts(examples, texts, tokens=tokens))
        contexts += [replace(context, group=group) for context in drawn]
    return tuple(contexts)


def context_budget(tokens: int, *, least: float | None = None) -> int:
    """Number of tokens of contexts for texts of this total length; ``least`` defaults to that on a
    CPU.
    """
    least = _LEAST_CONTEXT_TOKENS if least is None else least
    return round(max(least, _CONTEXT_TOKENS * tokens))


class ContextSampler:
    """Draws contexts for labelled texts.

    Args:
        encoder: Encoder of conversations for the backbone.
        reads: Tokens that the probe reads.
        conversations: The background to draw from, in this order if shown alone; without any, only
            plain text is drawn.
        by_turn: Whether labels can apply to part of a text. For multi-class tasks, a text is only
            shown as the last turn of a conversation.
        max_tokens: Maximum length of a context.
        seed: Seed of the draw.
    """

    def __init__(
        self,
        encoder: PromptEncoder,
        reads: Reads,
        conversations: Sequence[Messages],
        *,
        by_turn: bool,
        max_tokens: int,
        seed: int = 0,
    ):
        self._encoder = encoder
        self._reads = reads
        self._max_tokens = max_tokens
        self._random = Random(seed)
        self._by_turn = by_turn
        self._conversations = conversations
        self._shares: dict[Kind, float] = {}
        if conversations:
            self._shares = dict(_SHARES) if by_turn else {"turn": 1.0}
        if encoder.prompt_format == "both":
            self._shares["plain"] = 1.0

    def background(self, *, tokens: int) -> list[Context]:
        """Draw conversations without changes.

        Args:
            tokens: Stop once this total number of tokens is reached.
        """
        contexts: list[Context] = []
        order = [*range(len(self._conversations))]
        if not self._by_turn:
            # A class needs many texts, so short ones are more likely to come first.
            sizes = [sum(len(turn.content) for turn in turns) for turns in self._conversations]
            order.sort(key=lambda place: self._random.expovariate(1 / max(1, sizes[place])))
        for place in order:
            if tokens <= 0:
                break
            example = Example(tuple(self._conversations[place]))
            prompt = self._encoded(example)
            if prompt is not None:
                contexts.append(Context("background", example, prompt, len(example.text.split())))
                tokens -= len(prompt)
        return contexts

    def of_texts(
        self,
        examples: LabelledExamples,
        texts: Int[Numbers, " _"],
        *,
        tokens: int,
    ) -> list[Context]:
        """Draw contexts of some texts; each text gets one before any gets two.

        Args:
            examples: The data set.
            texts: Rows of the texts that get contexts.
            tokens: No more are drawn once they have so many tokens.
        """
        contexts: list[Context] = []
        order = np.random.default_rng(self._random.randrange(2**32)).permutation(texts).tolist()
        for _ in range(_MOST_OF_A_TEXT):
            again: list[int] = []
            for text in order:
                if tokens <= 0:
                    return contexts
                context = self._context(examples.items[text])
                if context is not None:
                    contexts.append(replace(context, text=text))
                    tokens -= len(context.prompt)
                    # The plain text of a text is always the same.
                    if context.kind != "plain":
                        again.append(text)
            order = again
        return contexts

    def _context(self, example: Example) -> Context | None:
        """Draw a context; None if the text has none, such as a conversation or a long text."""
        if [message.role for message in example.messages] != ["user"] or example.response:
            return None
        # A word has at least one token.
        if not self._shares or len(example.text.split()) > self._max_tokens:
            return None
        for _ in range(_ATTEMPTS):
            kinds: list[Kind] = [*self._shares]
            (kind,) = self._random.choices(kinds, [*self._shares.values()])
            conversation, turn = self._placed(kind, example.text)
            prompt = self._encoded(conversation)
            if prompt is None:
                continue
            turn_lengths = lengths_of_turns(bytes(prompt.token_roles))
            if turn is not None and len(turn_lengths) != len(conversation.messages):
                # A template may join turns, or strip one to nothing.
                continue
            if turn is not None:
                owners = np.repeat(range(len(turn_lengths)), turn_lengths)
                prompt = prompt.only(np.flatnonzero(owners == turn))
            words = max(0, len(conversation.text.split()) - len(example.text.split()))
            return Context(kind, conversation, prompt, words)
        return None

    def _placed(self, kind: Kind, text: str) -> tuple[Example, int | None]:
        """A conversation with the text, and the turn to classify; None classifies all."""
        random = self._random
        if kind == "inside":
            return Example((Message("user", self._inside(text)),)), None
        if kind == "plain":
            return Example(PlainText(text)), None
        turns = [turn for turn in random.choice(self._conversations) if turn.role not in _SYSTEM]
        turns = turns or [Message("user", text)]
        users = [i for i, turn in enumerate(turns) if turn.role == "user"] or [0]
        if not self._by_turn:
            return Example((*turns[: users[-1]], Message("user", text))), None
        # Clients can forge the other turns.
        place = random.choice([*users, random.randrange(len(turns))])
        turns[place] = Message(turns[place].role, text)
        turns = turns[: random.randrange(place, len(turns)) + 1]
        return Example(tuple(turns)), place if random.random() < _ONE_TURN_SHARE else None

    def _inside(self, text: str) -> str:
        """Place the text before, after or between sentences of the background."""
        shortest, longest = _SURROUNDING_WORDS
        words = round(shortest * (longest / shortest) ** self._random.random())
        sentences = self._sentences(words)
        place = self._random.choice([0, len(sentences), self._random.randint(0, len(sentences))])
        around = [" ".join(sentences[:place]), text, " ".join(sentences[place:])]
        return self._random.choice(_JOINTS).join(filter(None, around))

    def _sentences(self, words: int) -> list[str]:
        """Adjacent sentences from random conversations, with about this many words in all."""
        chosen: list[str] = []
        while words > 0:
            turns = self._random.choice(self._conversations)
            # Requests consist of what users write; responses are longer.
            users = [turn for turn in turns if turn.role == "user"]
            content = self._random.choice(self._random.choice([users, turns]) or turns).content
            for sentence in filter(str.strip, _SENTENCE_END.split(content)):
                length = len(sentence.split())
                chosen.append(" ".join(sentence.split()[:words]) if length > words else sentence)
                words -= length
                if words <= 0:
                    break
            words -= 1  # Terminates even if the background has no words.
        return chosen

    def _encoded(self, example: Example) -> EncodedPrompt | None:
        """Encode the conversation; None if it is too long or the template refuses it."""
        try:
            prompt = self._encoder.encode_any_length(example.messages)
        except SidelightError:
            return None
        fits = len(prompt) <= self._max_tokens and bool(prompt.mask(self._reads).any())
        return prompt if fits else None
