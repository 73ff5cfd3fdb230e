"""What each read token is: the first, the last, the chat template's, the opening of the input."""

import torch
from jaxtyping import Bool
from torch import Tensor

from sidelight.prompts import EncodedPrompt, Part, Reads

# Columns of a token's marks; a token can have several.
FIRST, LAST, TEMPLATE, OPENING = range(4)
# A token is in the first of these that applies.
GROUPS = ("first", "last", "template", "content")


def mark_tokens(prompt: EncodedPrompt, reads: Reads) -> Bool[Tensor, "token mark"]:
    """The marks of the tokens that a probe reads.

    The first one is an attention sink where it opens the input; after a system turn, which is not
    read, it does not.
    """
    at = prompt.mask(reads).nonzero()[:, 0]
    order = torch.arange(len(at))
    template = torch.tensor([part == Part.TEMPLATE for part in prompt.parts])[at]
    return torch.stack([order == 0, order == len(at) - 1, template, at == 0], 1)


def grouped(marks: Bool[Tensor, "token mark"]) -> Bool[Tensor, "token group"]:
    """Each token in one of ``GROUPS``."""
    first, last, template, _ = marks.unbind(1)
    last = last & ~first
    template = template & ~first & ~last
    return torch.stack([first, last, template, ~(first | last | template)], 1)


def token_views(marks: Bool[Tensor, "token mark"]) -> dict[str, Bool[Tensor, " token"]]:
    """The tokens that are kept, by what is done."""
    first, last, template, _ = marks.unbind(1)
    return {
        "without template tokens": ~template,
        "without content": template,
        "without the first token": ~first,
        "without the last token": ~last,
        "the last token only": last,
    }
