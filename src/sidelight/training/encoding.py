"""Token ids of the texts of a training run, each encoded once.

The room next to a system prompt, the tokens that are read, the size of contexts and the characters
of each token all come from the same encoding.
"""

from collections.abc import Sequence
from dataclasses import replace

from sidelight.data.examples import Example, Examples, located, place_of
from sidelight.errors import SidelightError
from sidelight.models.conversation import Conversation, EncodedPrompt, Reads
from sidelight.models.encode import PromptEncoder


class TextEncoder:
    """Encodes texts of any length, and returns the same prompt for the same text.

    Args:
        encoder: Encoder of the backbone.
        with_places: Whether prompts contain the characters of their tokens.
    """

    def __init__(self, encoder: PromptEncoder, *, with_places: bool = False):
        self._encoder, self._with_places = encoder, with_places
        self._prompts: dict[tuple[Conversation, str | None], EncodedPrompt] = {}

    def __call__(self, conversation: Conversation, response: str | None = None) -> EncodedPrompt:
        """The prompt of a hashable conversation and its response, if any.

        Raises:
            SidelightError: As in ``PromptEncoder.encode_any_length``.
        """
        key = conversation, response
        if key not in self._prompts:
            self._prompts[key] = self._encoder.encode_any_length(
                conversation, response, with_places=self._with_places
            )
        return self._prompts[key]


def encode_shortened(
    encode: TextEncoder, examples: Examples, *, reads: Reads, limit: int
) -> list[EncodedPrompt]:
    """The token ids of each text, shortened to ``limit``.

    Raises:
        SidelightError: A text cannot be rendered, or has no token that is read.
    """
    prompts: list[EncodedPrompt] = []
    for index, item in enumerate(examples.items):
        with located(item, index):
            prompt = encode(item.messages, item.response).shortened(limit, reads)
            # Prompts are kept as long as the states; places take several times their memory.
            prompts.append(replace(prompt, texts=(), places=()) if prompt.places else prompt)
    unread = [index for index, prompt in enumerate(prompts) if not prompt.mask(reads).any()]
    if not unread:
        return prompts
    cut = sum(prompts[index].dropped > 0 for index in unread)
    remedy = (
        f"{cut} of them were cut to {limit} tokens: raise the limit (--set max_tokens=N)."
        if cut
        else "Name the column with the answers (--response COLUMN). In training use --set "
        "reads=prompt to read prompts instead."
    )
    raise SidelightError(
        f"{len(unread)} of {len(prompts)} texts have no token that the probe would read "
        f"({reads.side}), first {place_of(examples.items[unread[0]], unread[0])}. {remedy}"
    )


def span_places(
    examples: Sequence[Example], prompts: Sequence[EncodedPrompt], read: Sequence[int]
) -> list[list[tuple[int, int]]]:
    """The characters of the first tokens of each text.

    Args:
        examples: The texts.
        prompts: Their encodings, with places and of full length.
        read: Number of tokens of each text.

    Raises:
        SidelightError: The template rewrites a text.
    """
    places: list[list[tuple[int, int]]] = []
    for index, (example, prompt, count) in enumerate(zip(examples, prompts, read, strict=True)):
        message = len(example.messages) - (example.response is None)
        of_message = [
            place for place in prompt.places if place is not None and place.message == message
        ]
        with located(example, index):
            if len(of_message) < count:
                raise SidelightError(
                    "The chat template rewrites the text, so its tokens have no characters. Use "
                    "the raw prompt format for this model (--set format=raw)."
                )
        places.append([(place.start, place.end) for place in of_message[:count]])
    return places
