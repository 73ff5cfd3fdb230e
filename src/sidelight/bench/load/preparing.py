"""Trains the probes of a load test and writes the policy that blocks by them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from sidelight.artifact import save_probe
from sidelight.backbones import TransformersBackbone
from sidelight.bench.load.tickets import (
    WORDS,
    Ticket,
    abuse_examples,
    reply_examples,
    tickets,
    word_examples,
)
from sidelight.classifier import load
from sidelight.data import Examples
from sidelight.errors import SidelightError
from sidelight.fitting import FitOptions, fit
from sidelight.mechanisms import mechanism_spec
from sidelight.prompts import Reads

PROMPT_PROBES = ("word", "abuse")
RESPONSE_PROBES = ("reply",)
# The rule on the output is worked out after every token, but holds for none: answers keep their
# length.
_POLICY = """[input.abuse]
mode = "block"

[output.reply]
mode = "block"
threshold = 1.0
"""
# Enough for words as plain as these; more would only take longer.
_TRAINING_TICKETS = {"word": 320, "abuse": 96, "reply": 96}
_CHECKED_TICKETS = 64


@dataclass(frozen=True)
class Prepared:
    """What a server is started with.

    Attributes:
        probes: Their folders.
        policy: File of the policies.
    """

    probes: tuple[Path, ...]
    policy: Path


def prepare(backbone: TransformersBackbone, directory: Path) -> Prepared:
    """Trains `word`, `abuse` and `reply`, on tickets that are not asked later.

    Args:
        backbone: The served LLM.
        directory: Where probes, policy and activations go.
    """
    # Half of them are abuse, with every word, so that few tickets are enough.
    plain = islice(tickets(first=500_000), max(_TRAINING_TICKETS.values()))
    some = [Ticket(one.number, one.word, one.number // len(WORDS) % 2 == 0) for one in plain]
    makers: dict[str, Callable[[list[Ticket]], Examples]] = {
        "word": word_examples,
        "abuse": abuse_examples,
        "reply": reply_examples,
    }
    folders = [
        _train(backbone, name, make(some[: _TRAINING_TICKETS[name]]), directory=directory)
        for name, make in makers.items()
    ]
    _require_known(backbone, folders)
    policy = directory / "policy.toml"
    policy.write_text(_POLICY, "utf-8")
    return Prepared(tuple(folders), policy)


def _require_known(backbone: TransformersBackbone, folders: Sequence[Path]) -> None:
    """Checks that the probes of the prompt are right on tickets that they have not seen."""
    some = list(islice(tickets(first=900_000), _CHECKED_TICKETS))
    for folder, make in zip(folders, (word_examples, abuse_examples), strict=False):
        report = load(folder, model=backbone).evaluate(make(some))
        if report.metrics["accuracy"].value != 1:
            raise SidelightError(
                f"The probe '{folder.name}' is not always right on this model "
                f"(accuracy {report.metrics['accuracy'].value}), so nothing is known beforehand. "
                "Test another model."
            )


def _train(
    backbone: TransformersBackbone, name: str, examples: Examples, *, directory: Path
) -> Path:
    options = FitOptions(
        mechanisms=(mechanism_spec("readout", {"extremes": "pair"}),),
        reads=Reads("response" if name in RESPONSE_PROBES else "prompt"),
        cache_root=directory / "activations",
    )
    made = fit(backbone, examples, None, name=name, options=options)
    return save_probe(made.best.probe, directory / name)
