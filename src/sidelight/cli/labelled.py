"""The labelled texts that a command trains on, and how it reads them."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sidelight.data import Examples
    from sidelight.fitting import FitOptions


def load_labelled(given: dict[str, Any]) -> "tuple[Examples, Examples | None]":
    """Training texts, and validation texts where some are named.

    Args:
        given: The values of ``training_options``.
    """
    from sidelight.data import load_examples

    how = {
        "text": given["text"],
        "label": given["label"],
        "response": given["response"],
        "on_missing_label": given["missing_label"],
    }
    whole = load_examples(given["data"], **how, split=given["split"], positive=given["positive"])
    rows = whole.draw(given["limit"] or len(whole), seed=0)
    # What is doubtful about the file is so of some of its rows.
    training = replace(whole.select(rows), warnings=whole.warnings)
    if given["validation"] is None:
        return training, None
    return training, load_examples(
        given["validation"], **how, split=given["validation_split"], task=training.task
    )


def reading_options(given: dict[str, Any]) -> "FitOptions":
    """How the texts are read, and where their activations go.

    Args:
        given: The values of ``training_options``.
    """
    from sidelight.fitting import FitOptions
    from sidelight.prompts import Reads

    budget = given["cache_budget"]
    return FitOptions(
        reads=Reads(side="response" if given["response"] else "prompt"),
        max_tokens=given["max_tokens"],
        cache_root=given["cache"],
        cache_budget_bytes=None if budget is None else int(budget * 2**30),
        keep_cache=given["keep_cache"],
    )
