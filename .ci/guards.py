"""Trains the guards that ship in ``guards/``, accepts them on GGUF, and writes docs/guards.md.

    .venv/bin/python .ci/guards.py            what `make guards` runs; after a kill it goes on
    .venv/bin/python .ci/guards.py STEP ...   one step: build, accept, or tables

``build`` trains each guard by ``sidelight guard`` on the embedded model into ``build/guards``. It
packages the probe, ``figures.json`` (public tests) and ``build.json``, which says how the probe
was made. The probe does not read the last layer, whose states llama.cpp does not compute for every
token. ``accept`` packages a copy without that layer for the embedded GGUF file, if both agree on
the decisions that ``agreement`` counts. ``tables`` writes the tables of docs/guards.md.
"""

import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from sidelight.artifact import load_probe, save_probe
from sidelight.backbone import Backbone, load_backbone
from sidelight.bank import Bank
from sidelight.cli import app
from sidelight.data.examples import Example
from sidelight.data.guards import find_guard, guard_names
from sidelight.engines.llama.backbone import LlamaBackbone
from sidelight.fingerprint import Fingerprint
from sidelight.gguf_files import EMBEDDED_GGUF, find_gguf
from sidelight.manifest import PROBE, read_manifest
from sidelight.mechanisms.base import Geometry, build_mechanism
from sidelight.metrics import wilson
from sidelight.probe import Probe
from sidelight.smollm2 import EMBEDDED_NAME
from sidelight.standardisation import Standardisation
from sidelight.states.extraction import text_logits
from sidelight.storage import write_json
from sidelight.thresholds import OperatingPoint
from sidelight.training.background import load_background
from sidelight.training.judging import encode
from sidelight.training.ready import load_guard
from sidelight.training.traffic import Conversations

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "guards" / "src" / "sidelight_guards"
BUILD = ROOT / "build" / "guards"
PAGE = ROOT / "docs" / "guards.md"
# The share of decisions on which the copy must agree with the probe.
AGREEMENT, TEXTS = 0.99, 500
# Longer texts are compared where there are not enough others: it takes an hour as it is.
CHARACTERS = 240
# Parameters that a mechanism divides by the root of the number of layers.
_SCALED = {"readout": ("value", "last"), "spans": ("features",)}
_TABLE = re.compile(r"(<!-- table of guards: (\w+) -->\n).*?(?=<!-- end -->)", re.DOTALL)


def build() -> None:
    """Trains, measures, packages and documents every guard."""
    commit = _commit_of_build()
    app(["guard", "--model", EMBEDDED_NAME, "--out", str(BUILD)], standalone_mode=False)
    probes = {name: load_probe(BUILD / name) for name in guard_names()}
    for name, probe in probes.items():
        folder = PACKAGE / name
        for file in (PROBE, "figures.json"):
            shutil.copy(BUILD / name / file, folder / file)
        record = folder / "build.json"
        if not record.exists() or json.loads(record.read_bytes())["probe"] != probe.version:
            # A copy of an earlier probe would decide as that one did.
            shutil.rmtree(folder / EMBEDDED_GGUF, ignore_errors=True)
            write_json(record, _record(name, probe, commit))
    write_tables()


def accept() -> None:
    """Packages a copy of each probe for the embedded GGUF file, once decisions agree there."""
    probes = {name: load_probe(PACKAGE / name) for name in guard_names()}
    copies = _accepted_copies(probes)
    for name, copy in copies.items():
        save_probe(copy, PACKAGE / name / EMBEDDED_GGUF)
        record = _packaged(name, "build.json")
        figures = json.loads((BUILD / "agreement.json").read_bytes())[name]
        write_json(PACKAGE / name / "build.json", record | {"gguf": figures})
    write_tables()


def without_last_layers(probe: Probe, model: Fingerprint) -> Probe:
    """The probe for a copy of its model that has the first layers alone, with the same logits."""
    layers = model.layers
    scaling, scale = probe.standardisation, math.sqrt(layers / probe.fingerprint.layers)
    assert scaling.scale[layers:].isinf().all(), "the probe reads layers that the copy lacks"
    mechanism = build_mechanism(probe.spec, Geometry(layers, model.width, probe.task.outputs))
    state = {
        key: value[:layers].clone() if key in ("gate", *_SCALED[probe.spec.name]) else value
        for key, value in probe.mechanism.state_dict().items()
    }
    for key in _SCALED[probe.spec.name]:
        state[key] *= scale
    mechanism.load_state_dict(state)
    return replace(
        probe,
        mechanism=mechanism.eval().requires_grad_(False),
        standardisation=Standardisation(
            scaling.mean[:layers], scaling.scale[:layers], scaling.is_normalised
        ),
        fingerprint=model,
        record={**probe.record, "copy_of": probe.version},
    )


def _accepted_copies(probes: dict[str, Probe]) -> dict[str, Probe]:
    """A copy of each probe for the embedded GGUF file, whose decisions were compared."""
    gguf = LlamaBackbone(find_gguf(EMBEDDED_GGUF), name=EMBEDDED_GGUF)
    copies = {name: without_last_layers(probe, gguf.fingerprint) for name, probe in probes.items()}
    path = BUILD / "agreement.json"
    known = json.loads(path.read_bytes()) if path.exists() else {}
    new = {
        name: probe
        for name, probe in probes.items()
        if known.get(name, {}).get("probe") != probe.version
    }
    if new:
        original = load_backbone(EMBEDDED_NAME, for_reading=True)
        known |= agreement(new, copies, original, gguf)
        write_json(path, known)
    for name in probes:
        figures = known[name]
        print(f"{name}: {figures['agreeing']} of {figures['texts']} decisions agree on GGUF")
        if figures["agreeing"] < AGREEMENT * figures["texts"]:
            sys.exit(
                f"{name} decides differently on {EMBEDDED_GGUF}. Train it there: sidelight guard "
                f"--model {EMBEDDED_GGUF} --only {name} --out FOLDER"
            )
    return copies


def agreement(
    probes: dict[str, Probe], copies: dict[str, Probe], original: Backbone, gguf: Backbone
) -> dict[str, Any]:
    """How many decisions on 500 positive and 500 background texts are the same on both engines."""
    conversations = map(Example, load_background("packaged").conversations)
    background = [*filter(_is_short, conversations)][:TEXTS]
    figures: dict[str, Any] = {}
    for reads in ("prompt", "response"):
        names = [name for name, probe in probes.items() if probe.reads.side == reads]
        positives = {name: _drawn(name, holds=True) for name in names}
        # There is no background of answers: those without the label stand for it.
        negatives = {n: background if reads == "prompt" else _drawn(n, holds=False) for n in names}
        shared = background if reads == "prompt" else [text for n in names for text in negatives[n]]
        texts = [*shared, *(text for name in names for text in positives[name])]
        flags = [
            _flags([own[name] for name in names], backbone, texts) if names else []
            for own, backbone in ((probes, original), (copies, gguf))
        ]
        start = len(shared)
        for row, name in enumerate(names):
            stop = start + len(positives[name])
            rows = [*range(len(shared)), *range(start, stop)]
            ours, theirs = (side[row][rows] for side in flags)
            figures[name] = {
                "probe": probes[name].version,
                "texts": len(rows),
                "agreeing": int((ours == theirs).sum()),
                "flagged": [int(ours.sum()), int(theirs.sum())],
            }
            start = stop
    return figures


def _length(example: Example) -> int:
    return sum(map(len, (example.response or "", *(turn.content for turn in example.messages))))


def _is_short(example: Example) -> bool:
    return _length(example) <= CHARACTERS


def _drawn(name: str, *, holds: bool) -> list[Example]:
    """Texts of a guard that have a label, or none: short ones at random, then the shortest."""
    texts = load_guard(name)
    has = texts.labels.reshape(len(texts), -1).any(1)
    order = np.random.default_rng(0).permutation(len(texts))
    chosen = [texts.items[row] for row in order if has[row] == holds]
    long = sorted((text for text in chosen if not _is_short(text)), key=_length)
    return [*filter(_is_short, chosen), *long][:TEXTS]


def _flags(probes: list[Probe], backbone: Backbone, texts: list[Example]) -> list[np.ndarray]:
    bank = Bank(probes, device=backbone.device)
    judged = text_logits(backbone, bank, encode(backbone.encoder, texts))
    return [
        np.array([probe.verdict(text.logits).flagged for text in outputs])
        for probe, outputs in zip(probes, judged, strict=True)
    ]


def _commit_of_build() -> str:
    """The commit that the build began at, which is the present one, without changes to it."""
    path, head = BUILD / "commit", _git("rev-parse", "HEAD")
    if not path.exists():
        if any(BUILD.glob("*/")):
            sys.exit(f"{BUILD} says of no commit that it was begun at. Remove the folder.")
        if changed := _git("status", "--porcelain", "--", "src", "guards"):
            sys.exit(f"Commit these changes first, so that build.json can name them:\n{changed}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(head)
    if (begun := path.read_text()) != head:
        sys.exit(f"{BUILD} was begun at {begun}. Check that out, or remove the folder.")
    return begun


def _git(*words: str) -> str:
    command = ["git", *words]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


def _record(name: str, probe: Probe, commit: str) -> dict[str, Any]:
    """How a packaged probe was made."""
    history = probe.history
    return {
        "guard": name,
        "version": find_guard(name).card.version,
        "probe": probe.version,
        "command": f"sidelight guard --model {EMBEDDED_NAME}",
        "commit": commit,
        "date": date.today().isoformat(),
        "texts_sha256": load_guard(name).content_hash,
        "texts": [history.training.rows, len(load_guard(name))],
        "training_sha256": history.training_sha256,
        "threshold_rule": history.threshold_rule,
        "seed": history.seed,
        "dtype": probe.fingerprint.dtype,
        "packages": {package: version(package) for package in ("torch", "transformers", "numpy")},
    }


def with_tables(page: str) -> str:
    """The page with the tables as the packaged files have them."""
    tables = {"probes": _probes_table, "tests": _tests_table, "thresholds": _thresholds_table}
    return _TABLE.sub(lambda match: match[1] + tables[match[2]](), page)


def write_tables() -> None:
    PAGE.write_text(with_tables(PAGE.read_text("utf-8")), "utf-8")


def _packaged(name: str, file: str) -> Any:
    return json.loads((PACKAGE / name / file).read_bytes())


def _probes_table() -> str:
    lines = [
        "| guard | version | texts trained on | threshold | held-out texts found | other texts "
        "flagged | background flagged (95 % CI) | agrees on GGUF |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in guard_names():
        made, manifest = _packaged(name, "build.json"), read_manifest(PACKAGE / name)
        history, traffic = manifest.history, manifest.history.traffic
        used, available = made["texts"]
        texts = f"{used:,}" if used == available else f"{used:,} of {available:,}"
        cells = ["", "", ""]
        if manifest.spans is None and len(manifest.thresholds) == 1:
            (curve,) = history.curves.values()
            hits, alarms = curve.at(manifest.thresholds[0])
            cells[:2] = [f"{hits} of {curve.positives}", f"{alarms} of {curve.negatives}"]
            cells[2] = _share(traffic.flagged, traffic.conversations)
        threshold = f"{manifest.thresholds[0]:.3f}" if len(manifest.thresholds) == 1 else "by label"
        gguf = made.get("gguf")
        agrees = f"{gguf['agreeing']} of {gguf['texts']}" if gguf else "not compared"
        row = [f"`{name}`", str(made["version"]), texts, threshold, *cells, agrees]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join([*lines, ""])


def _thresholds_table() -> str:
    lines = [
        "| guard | threshold | held-out texts found | other texts flagged | background flagged |",
        "|---|---|---|---|---|",
    ]
    for name in guard_names():
        probe = load_probe(PACKAGE / name)
        if probe.task.kind != "binary" or probe.spans is not None:
            continue
        (curve,), (own,) = probe.history.curves.values(), probe.thresholds
        scores = probe.calibration.apply(Conversations.kept(probe).logits)[:, 0]
        points = [*curve.operating_points(), OperatingPoint(own, *curve.at(own))]
        for threshold, found, flagged in sorted({*points}, reverse=True):
            mark = " (packaged)" if threshold == own else ""
            cells = [f"`{name}`", f"{threshold:.3f}{mark}"]
            cells += [f"{found} of {curve.positives}", f"{flagged} of {curve.negatives}"]
            count = int((scores >= threshold).sum())
            cells.append(f"{count} of {len(scores)}" if len(scores) else "")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _share(flagged: int, count: int) -> str:
    if not count:
        return ""
    (low,), (high,) = wilson(np.array([flagged / count]), np.array([count]))
    return f"{flagged / count:.1%} of {count} ({low:.1%} to {high:.1%})"


def _tests_table() -> str:
    lines = [
        "| guard | test | AUROC (95 % CI) | TF-IDF | found | TF-IDF | false positives |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in guard_names():
        for test, figures in _packaged(name, "figures.json").items():
            lines.append(f"| `{name}` | `{test}` | {' | '.join(_cells(figures))} |")
    return "\n".join([*lines, ""])


def _cells(test: dict[str, Any]) -> list[str]:
    if "positives" not in test:
        f1, exact = (test[key]["value"] for key in ("character_f1", "f1"))
        return [f"character F1 {f1:.3f}", "", f"F1 of exact spans {exact:.3f}", "", ""]
    auroc, words, found = "", "", ""
    if test["auroc"]["value"] is not None:
        low, high = test["auroc"]["ci"]
        auroc = f"{test['auroc']['value']:.3f} ({low:.3f} to {high:.3f})"
        words, found = f"{test['tfidf_auroc']:.3f}", str(test["tfidf_found"])
    others = test["rows"] - test["positives"]
    return [
        auroc,
        words,
        f"{test['found']} of {test['positives']}" if test["positives"] else "",
        found,
        f"{test['false_positives']} of {others}" if others else "",
    ]


_STEPS = {"build": build, "accept": accept, "tables": write_tables}

if __name__ == "__main__":
    for step in sys.argv[1:] or ("build", "accept"):
        _STEPS[step]()
