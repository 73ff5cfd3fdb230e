"""The settings in which training shows a text: alone, and as it may come in background traffic.

A probe that has only seen texts alone takes everything else for what is rarest among them: it
flags greetings, long prompts and what tools answer, and misses a text inside a long one. So each
text is also shown in a few contexts, made from background conversations (``background.py``), and
these are shown by themselves, without a label. A context stays on its text's side of every split,
and so does the background that it is made of.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Literal

import numpy as np
from jaxtyping import Int

from sidelight.data.examples import Example, LabelledExamples
from sidelight.errors import SidelightError
from sidelight.models.conversation import EncodedPrompt, Message, Reads, lengths_of_turns
from sidelight.models.encode import PromptEncoder
from sidelight.states.reader import Reader
from sidelight.training.background import Background, Messages
from sidelight.training.settings import FitOptions
from sidelight.types import Numbers

Kind = Literal["without_context", "inside", "turn", "plain", "background"]
# Some texts of a data set, and the background that their contexts are made of.
Group = tuple[Int[Numbers, " _"], Background]

# How often each context of a text is drawn; plain text, where a probe allows it.
_SHARES: dict[Kind, float] = {"inside": 0.8, "turn": 0.2}
# Words around a text, log-uniform.
_SURROUNDING_WORDS = (5, 400)
_JOINTS = ("\n\n", "\n", " ")
_SENTENCE_END = re.compile(r"(?<=[.!?\n])\s+")
# How often a text that is one turn of several is judged alone.
_ONE_TURN_SHARE = 0.5
# The tokens of contexts: relative to those of the texts, but at least so many; and the share of
# them that is background alone. A GPU reads as many in a few seconds.
_CONTEXT_TOKENS, _LEAST_CONTEXT_TOKENS, _LEAST_CONTEXT_TOKENS_ON_GPU = 0.6, 40_000, 400_000
_BACKGROUND_SHARE = 0.7
# No probe reads these turns where they lead.
_SYSTEM = ("system", "developer")
# A text gets so many contexts at most, and so many attempts at one.
_MOST_OF_A_TEXT, _ATTEMPTS = 3, 4


@dataclass(frozen=True)
class Context:
    """A setting of a text, or a conversation of the background.

    Attributes:
        kind: ``without_context``; ``inside`` other text; a ``turn`` of a conversation; as ``plain``
            text. Or ``background`` by itself.
        example: The conversation that is run.
        prompt: The same, encoded, without what is not classified.
        words: How many words stand around the text, or in the background.
        text: The labelled text, by its place in its data set; None for background.
        group: The group of texts that it was drawn for.
    """

    kind: Kind
    example: Example
    prompt: EncodedPrompt
    words: int
    text: int | None = None
    group: int = 0


def has_contexts(examples: LabelledExamples, options: FitOptions) -> bool:
    """Whether training shows texts in background: not responses, nor texts of labelled spans."""
    return not options.reads.includes_response and examples.spans is None


def draw_contexts(
    reader: Reader,
    examples: LabelledExamples,
    groups: Sequence[Group],
    options: FitOptions,
) -> tuple[Context, ...]:
    """Contexts of texts, and background alone; none without background, or of labelled spans.

    Args:
        reader: Encodes them.
        examples: The texts.
        groups: Those that contexts are drawn for.
        options: What is read, how many tokens of contexts, and the longest context.
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
    for group, (texts, background) in enumerate(groups):
        sampler = ContextSampler(
            encoder,
            options.reads,
            background.conversations,
            by_turn=by_turn,
            max_tokens=limit,
            seed=int(texts[0]),
        )
        lengths = (len(encoder.encode_any_length(examples.items[i].conversation)) for i in texts)
        of_texts = sum(min(length, limit) for length in lengths)
        tokens = context_budget(of_texts, least=least / len(groups))
        background_contexts: list[Context] = []
        if by_turn or task.abstains:
            background_contexts = sampler.background(tokens=round(tokens * _BACKGROUND_SHARE))
            tokens -= sum(len(context.prompt) for context in background_contexts)
        drawn = (*background_contexts, *sampler.of_texts(examples, texts, tokens=tokens))
        contexts += [replace(context, group=group) for context in drawn]
    return tuple(contexts)


def context_budget(tokens: int, *, least: float | None = None) -> int:
    """The tokens of the contexts of texts that have so many; ``least``: by default, on a CPU."""
    least = _LEAST_CONTEXT_TOKENS if least is None else least
    return round(max(least, _CONTEXT_TOKENS * tokens))


class ContextSampler:
    """Draws contexts for labelled texts.

    Args:
        encoder: Encodes conversations for the backbone.
        reads: What the probe reads.
        conversations: The background to draw from, the first ones first where it is shown alone;
            without any, there is plain text alone.
        by_turn: Whether a part of a text can have the labels. With several classes, a text is only
            shown as the last turn of a conversation.
        max_tokens: No context is longer.
        seed: Decides what is drawn.
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
        """Conversations as they are.

        Args:
            tokens: No more are taken once they have so many tokens.
        """
        contexts: list[Context] = []
        order = [*range(len(self._conversations))]
        if not self._by_turn:
            # A class needs many texts: short ones come first more often, but not always.
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
        """Contexts of some texts, each with one before any has two.

        Args:
            examples: The data set.
            texts: Which of its texts get contexts.
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
                    # Plain text is the same each time.
                    if context.kind != "plain":
                        again.append(text)
            order = again
        return contexts

    def _context(self, example: Example) -> Context | None:
        """One context; None for what has none, such as a conversation or a long text."""
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
        """A conversation with the text, and which of its turns is judged; None: all."""
        random = self._random
        if kind == "inside":
            return Example((Message("user", self._inside(text)),)), None
        if kind == "plain":
            return Example((Message("user", text),), is_plain=True), None
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
        """The text before, after or between sentences of the background."""
        shortest, longest = _SURROUNDING_WORDS
        words = round(shortest * (longest / shortest) ** self._random.random())
        sentences = self._sentences(words)
        place = self._random.choice([0, len(sentences), self._random.randint(0, len(sentences))])
        around = [" ".join(sentences[:place]), text, " ".join(sentences[place:])]
        return self._random.choice(_JOINTS).join(filter(None, around))

    def _sentences(self, words: int) -> list[str]:
        """Neighbouring sentences from random conversations, of about so many words in all."""
        chosen: list[str] = []
        while words > 0:
            turns = self._random.choice(self._conversations)
            # What a user asks for is what a request is made of; answers are longer.
            users = [turn for turn in turns if turn.role == "user"]
            content = self._random.choice(self._random.choice([users, turns]) or turns).content
            for sentence in filter(str.strip, _SENTENCE_END.split(content)):
                length = len(sentence.split())
                chosen.append(" ".join(sentence.split()[:words]) if length > words else sentence)
                words -= length
                if words <= 0:
                    break
            words -= 1  # Ends for a background without a word.
        return chosen

    def _encoded(self, example: Example) -> EncodedPrompt | None:
        """The conversation encoded; None if it is too long or the template refuses it."""
        try:
            prompt = self._encoder.encode_any_length(example.conversation)
        except SidelightError:
            return None
        fits = len(prompt) <= self._max_tokens and bool(prompt.mask(self._reads).any())
        return prompt if fits else None
