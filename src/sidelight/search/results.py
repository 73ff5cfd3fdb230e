"""What a search leaves in its folder: a table of all trials, the best of them, and a picture."""

import csv
from collections.abc import Mapping
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import Any

from sidelight.plots import save_figure
from sidelight.search.picture import draw_sensitivity
from sidelight.search.trials import Best, Trial
from sidelight.storage import write_json, write_text

SETTINGS = ("learning_rate", "weight_decay", "epochs", "batch_size")


def write_search(found: Mapping[str, Best], directory: Path, *, score: str) -> None:
    """Writes ``trials.csv``, ``best.json`` and ``sensitivity.png``, replacing earlier ones.

    Args:
        found: The best of each mechanism, by its name.
        directory: Where to write; made if absent.
        score: What is compared, for the picture.
    """
    write_text(directory / "trials.csv", _table(found))
    write_json(directory / "best.json", describe(found))
    save_figure(draw_sensitivity(found, score=score), directory / "sensitivity.png")


def describe(found: Mapping[str, Best]) -> dict[str, Any]:
    """The best of each mechanism, and which mechanism is ahead, as JSON values."""
    return {
        "best": max(found, key=lambda name: found[name].score),
        "mechanisms": {
            name: {
                "score": best.score,
                "options": dict(best.spec.options),
                "settings": asdict(best.settings),
                "trials": len(best.trials),
                "importance": dict(best.importance),
            }
            for name, best in found.items()
        },
    }


def train_arguments(best: Best) -> list[str]:
    """The arguments of ``sidelight train`` that stand for a configuration."""
    name, settings = best.spec.name, asdict(best.settings)
    arguments = ["--mechanism", name]
    for option, value in best.spec.options.items():
        arguments += ["--set", f"{name}.{option}={value}"]
    for setting in SETTINGS:
        arguments += [f"--{setting.replace('_', '-')}", str(settings[setting])]
    return arguments


def _table(found: Mapping[str, Best]) -> str:
    text = StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["mechanism", "trial", "score", *SETTINGS, "options"])
    for name, best in found.items():
        table.writerows([name, *_cells(trial)] for trial in best.trials)
    return text.getvalue()


def _cells(trial: Trial) -> list[object]:
    settings = asdict(trial.settings)
    options = " ".join(f"{option}={value}" for option, value in trial.spec.options.items())
    score = "diverged" if trial.score is None else trial.score
    return [trial.number, score, *(settings[name] for name in SETTINGS), options]
