"""``sidelight background``: the ordinary conversations that training shows a probe."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from sidelight.cli import options
from sidelight.errors import SidelightError

if TYPE_CHECKING:
    from sidelight.backbone import TransformersBackbone
    from sidelight.training.classifier import Classifier
    from sidelight.training.settings import Background, Turns, own_set

_EXAMPLES = 4
_SUSPECTS = 20
_SHOWN_CHARACTERS = 300


@click.command(
    epilog=options.examples(
        "sidelight background --show",
        "sidelight background --model Qwen/Qwen3-4B --count 500",
        "sidelight background --probe probes/toxicity",
        "sidelight background --probe probes/toxicity --drop 0.9 --out traffic.jsonl",
    )
)
@options.backbone
@click.option(
    "--data",
    type=options.PATH,
    help="A file of your own with a column `text`. [default: the model's set]",
)
@click.option(
    "--count",
    type=options.AT_LEAST_ONE,
    help="Have the model write so many conversations. [default: 500 with --out]",
)
@click.option("--seed", type=int, default=0, help="Decides what the model writes.")
@click.option(
    "--out",
    type=options.PATH,
    callback=options.checked_file,
    help="File to write: by the model, or with --drop what is left. [default: the model's set]",
)
@click.option("--show", is_flag=True, help="Print a few conversations of each kind.")
@click.option(
    "--probe",
    type=options.PATH,
    help="List the conversations that this probe finds most like its positive class.",
)
@click.option(
    "--drop",
    type=click.FloatRange(0, 1),
    metavar="P",
    help="Leave out what --probe gives a higher probability.",
)
def background(
    runtime: options.Runtime,
    data: Path | None,
    count: int | None,
    seed: int,
    out: Path | None,
    show: bool,
    probe: Path | None,
    drop: float | None,
) -> None:
    """Look at background traffic, the ordinary conversations to train with, or have it written.

    With --count the model writes a set of its own to the user's cache, and training with this
    model takes it from then on. Until then it takes the packaged set of the embedded model.
    """
    if (drop is not None) != (probe is not None and out is not None):
        raise SidelightError(
            "--drop needs a probe that judges (--probe) and a file (--out), and so do these two "
            "need --drop. Add what is missing."
        )
    if probe is None and data is not None and out is not None:
        raise SidelightError(
            "--data is a set that exists. Leave it out, or add --probe and --drop."
        )
    from sidelight_lab import background as traffic

    if probe is None:
        backbone = runtime.load_backbone()
        if out is None and count is None:
            conversations = _chosen(data, backbone)
        else:
            path = out or own_set(backbone.fingerprint)
            count = count or traffic.CONVERSATIONS
            conversations = traffic.write_background(backbone, count, path, seed=seed)
        _tell(conversations, show=show)
        return
    from sidelight.training.classifier import load

    classifier = load(probe, model=runtime.model, dtype=runtime.dtype, device=runtime.device)
    conversations = _chosen(data, classifier.backbone)
    judged = zip(
        _probabilities(classifier, conversations), conversations.conversations, strict=True
    )
    ranked = sorted(judged, key=lambda pair: -pair[0])
    for probability, turns in ranked[:_SUSPECTS]:
        click.echo(f"{probability:.3f}  {_shown(turns)}")
    if drop is not None and out is not None:
        kept = [turns for probability, turns in ranked if probability <= drop]
        traffic.save_background(kept, out)
        click.echo(f"Wrote {len(kept)} of {len(ranked)} conversations to {out}.")


def _chosen(data: Path | None, backbone: "TransformersBackbone") -> "Background":
    """The file alone, or what training takes by default."""
    from sidelight.training.settings import default_background
    from sidelight_lab.background import read_background

    return default_background(backbone.fingerprint) if data is None else read_background(data)


def _probabilities(classifier: "Classifier", background: "Background") -> "list[float]":
    """The highest probability of a label that the probe flags, of each conversation."""
    from sidelight.data.examples import Example
    from sidelight.training.judging import require_responses

    flagged = [*classifier.probe.label_thresholds]
    if not flagged:
        raise SidelightError(
            f"Probe '{classifier.probe.name}' flags nothing: it has several classes and no "
            "positive one. Name a binary or multi-label probe with --probe."
        )
    examples = [Example(turns) for turns in background.conversations]
    require_responses(classifier.probe, examples)
    verdicts = classifier.predict(examples)
    return [max(verdict.probabilities[label] for label in flagged) for verdict in verdicts]


def _tell(background: "Background", *, show: bool) -> None:
    """The number of conversations of each kind, and their lengths in words."""
    kinds: dict[str, list[Turns]] = {}
    for turns in background.conversations:
        kinds.setdefault(_kind(turns), []).append(turns)
    click.echo(f"{len(background.conversations)} conversations")
    for kind, conversations in sorted(kinds.items()):
        lengths = sorted(map(_words, conversations))
        low, middle, high = (lengths[len(lengths) * share // 10] for share in (1, 5, 9))
        click.echo(
            f"{kind:<14}{len(lengths):>5}, of {middle} words ({low} to {high} for the middle 80 %)"
        )
        for turns in conversations[:: -(-len(conversations) // _EXAMPLES)] if show else ():
            click.echo(f"    {_shown(turns)}")


def _kind(turns: "Turns") -> str:
    if any(turn.role == "tool" for turn in turns):
        return "agents"
    if len(turns) > 1:
        return "conversations"
    return "single turns"


def _words(turns: "Turns") -> int:
    return sum(len(turn.content.split()) for turn in turns)


def _shown(turns: "Turns") -> str:
    """A conversation on one line, shortened."""
    text = " | ".join(f"{turn.role}: {' '.join(turn.content.split())}" for turn in turns)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]} ..."
