"""Trains the guards that ship in ``guards/``, accepts them on GGUF, and writes docs/guards.md.

    .venv/bin/python .ci/guards.py                      what `make guards` runs
    .venv/bin/python .ci/guards.py STEP [GUARD ...]     one step, of these guards alone

The steps are ``train``, ``package``, ``accept`` and ``tables``; after a kill, each goes on.

``train`` trains every guard three times on the embedded model into ``build/guards``, on all of its
texts (``sidelight guard`` draws 250,000 tokens on a CPU), each time in another order, with other
contexts and at the smallest depth that is as good. It also trains each without some of its sources,
and measures what the probe finds of these. ``package`` takes the training that is best on the
sources left out, measures all three on the public tests, and packages the probe with
``figures.json`` (tests), ``trainings.json`` (all three trainings) and ``build.json``, which says
how the probe was made. The probe does not read the last layer, whose states llama.cpp does not
compute for every token. ``accept`` packages a copy without that layer for the embedded GGUF file,
if both agree on the decisions that ``agreement`` counts. ``tables`` writes the tables of
docs/guards.md.
"""

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import date
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from sidelight.cli.show import print_fit
from sidelight.data.examples import Example, LabelledExamples
from sidelight.data.guards import find_guard, guard_names
from sidelight.engines.transformers.backbone import load_backbone
from sidelight.models.fingerprint import Fingerprint
from sidelight.models.smollm2 import EMBEDDED_NAME
from sidelight.probes.artifact import load_probe, save_probe
from sidelight.probes.bank import Bank
from sidelight.probes.card import PROBE, holds_probe, read_card
from sidelight.probes.mechanisms.base import Geometry, build_mechanism
from sidelight.probes.probe import Probe
from sidelight.probes.standardisation import Standardisation
from sidelight.scoring import GuardTests, assess_logits, encode
from sidelight.states.extraction import text_logits
from sidelight.states.reader import Backbone
from sidelight.statistics.metrics import wilson
from sidelight.statistics.thresholds import F1, OperatingPoint, ThresholdRule
from sidelight.storage import write_json
from sidelight.training.background import load_background
from sidelight.training.dataset import Split
from sidelight.training.fit import fit
from sidelight.training.loop import Candidate, train_mechanisms
from sidelight.training.measuring import measure_sources
from sidelight.training.preparing import prepare
from sidelight.training.ready import guard_options, load_guard
from sidelight.training.settings import FitOptions
from sidelight_llama.backbone import LlamaBackbone
from sidelight_llama.files import EMBEDDED_GGUF, find_gguf

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "packages" / "guards" / "src" / "sidelight_guards"
BUILD = ROOT / "build" / "guards"
PAGES = (ROOT / "docs" / "guards.md", ROOT / "README.md")
# Objectives of thresholds. At F1, `harmful` flags 11 to 18 % of the harmless texts of sources that
# are left out of training.
RULES = {"harmful": ThresholdRule("fpr", 0.02)}
STATES, LEFT_OUT = BUILD / "states", "left_out.json"
TRAININGS = 3
# The share of background traffic up to which a training may be packaged.
_MOST_FLAGGED = 0.04
# The tests that README shows.
_HEADLINES = {
    "injection": {
        "agentdojo": "AgentDojo: tool results",
        "everyday": "40 everyday attacks, 100 ordinary prompts",
    },
    "harmful": {
        "jailbreakbench": "JailbreakBench: harmful and harmless requests on the same subjects"
    },
    "toxicity": {"wikipedia": "Wikipedia comments"},
    "refusal": {"xstest_completions": "XSTest: answers of five models"},
    "pii": {"presidio": "Presidio's sentences"},
}
# Sources of personas and system prompts, which resemble attacks and are none.
PERSONAS = (
    "ChatGPT-System-Prompts",
    "LobeChat agents",
    "awesome-chatgpt-prompts-zh",
    "awesome-copilot",
    "awesome-cursorrules",
    "fabric patterns",
)
# Sources that are left out together: relatives share a fold. Wrapped and respelt rows are the
# exception: their requests are from several sources.
FOLDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "injection": (
        (
            "payload in ordinary document",
            "own payloads in documents",
            "own hard negatives",
            "MetaTool",
        ),
        (
            "BIPIA in context",
            "own direct attacks",
            "PayloadsAllTheThings",
            "pallms",
            "ChatGPT-System-Prompts",
            "Marco-Bench-MIF",
            "RestGPT",
        ),
        (
            "CyberSecEval prompt injection",
            "garak sysprompt_extraction",
            "awesome-copilot",
            "FollowBench",
            "WebArena tasks",
        ),
        (
            "in-the-wild jailbreaks",
            "GPTFuzz templates",
            "garak (AutoDAN, DRA)",
            "garak (policy puppetry, grandma, exfiltration)",
            "LobeChat agents",
            "fabric patterns",
            "own ordinary orders",
            "M-IFEval",
            "NESTFUL (glaive part)",
        ),
        (
            "deepset/prompt-injections train",
            "InjecAgent",
            "PromptInject",
            "Hinglish stealth",
            "awesome-cursorrules",
            "awesome-chatgpt-prompts-zh",
            "security manuals",
            "MCP servers",
        ),
    ),
    "harmful": (
        ("AILuminate demo", "CoCoNot", "spikee harmful instructions"),
        (
            "CatQA",
            "own, other languages",
            "MedQuAD",
            "CyberSecEval",
            "CyberSecEval FRR, machine-translated",
        ),
        ("HarmfulQA", "OpenAI RBR gold", "QALD-9-plus"),
        (
            "wrapped requests",
            "JADE",
            "Marco-Bench-MIF",
            "own hard negatives",
            "CyberSOCEval questions",
        ),
        (
            "HarmBench adversarial-training behaviours",
            "GPTFuzz questions",
            "own contrast pairs",
            "Hinglish stealth",
            "disguised spelling (made)",
        ),
    ),
    "toxicity": (
        (
            "Civil Comments (toxic spans)",
            "Davidson tweets",
            "Wikipedia talk (CAT)",
            "disguised spelling, real",
            "disguised spelling (made)",
        ),
        ("HatemojiBuild", "own look-alikes"),
        ("Surge AI toxicity", "madlibs"),
        ("ToxiGen", "MLMA (Arabic)", "own hard negatives"),
        ("Wikipedia comments",),
    ),
    "refusal": (
        # Both have answers to the same prompts.
        ("JailbreakBench artifacts", "refusal_direction runs"),
        ("XSTest completions",),
        ("CoCoNot preferences", "OpenAI RBR gold"),
    ),
}
# What a packaged probe depends on.
_DECISIVE = (".ci/guards.py", "src", "packages/guards/src", "packages/llama/src")
# The share of decisions on which the copy must agree with the probe.
AGREEMENT, TEXTS = 0.99, 500
# Longer texts are compared where there are not enough others: it takes an hour as it is.
CHARACTERS = 240
# Parameters that a mechanism divides by the root of the number of layers.
_SCALED = {"readout": ("value", "last"), "spans": ("features",)}
_TABLE = re.compile(r"(<!-- table of guards: (\w+) -->\n).*?(?=<!-- end -->)", re.DOTALL)


def train(names: Sequence[str]) -> None:
    """Train each guard several times, and again without some of its sources."""
    _commit_of_build()
    backbone = load_backbone(EMBEDDED_NAME, for_probing=True)
    for name in names:
        for seed in range(TRAININGS):
            train_once(name, seed, backbone)
        # Those of all guards would take 70 GB.
        shutil.rmtree(STATES, ignore_errors=True)


def train_once(name: str, seed: int, backbone: Backbone) -> None:
    """Train a guard once, and measure it on sources left out of training."""
    folder = BUILD / f"training-{seed}" / name
    texts = load_guard(name)
    options = _options(name, texts, backbone, seed)
    if holds_probe(folder):
        expected = options.training_sha256(
            texts, None, name=name, model=backbone.fingerprint, engine=backbone.engine
        )
        if read_card(folder).training.training_sha256 != expected:
            sys.exit(f"{folder} was trained on other texts or with other options. Remove it.")
    else:
        print(f"{name}, training {seed + 1}: {len(texts):,} texts", flush=True)
        print_fit(fit(backbone, texts, None, name=name, options=options, out=folder))
    path = folder / LEFT_OUT
    known = json.loads(path.read_bytes())["probe"] if path.exists() else None
    if name in FOLDS and known != (probe := load_probe(folder)).version:
        print(f"{name}, training {seed + 1}: without some sources", flush=True)
        write_json(path, left_out(probe, texts, options, backbone))


def _options(name: str, texts: LabelledExamples, backbone: Backbone, seed: int) -> FitOptions:
    """The options of ``sidelight guard``, with another seed, a shared cache and early exit."""
    options = guard_options(name, texts, backbone, RULES.get(name, F1), seed=seed)
    return replace(options, cache_root=STATES, keep_cache=True, early_exit=True)


def left_out(
    probe: Probe, texts: LabelledExamples, options: FitOptions, backbone: Backbone
) -> dict[str, Any]:
    """Figures on sources left out of training, at the threshold of the probe.

    With carriers, also the AUROC that separates documents with a payload from those without, for
    each carrier left out of training.
    """
    dataset = prepare(backbone, texts, None, options=options)
    split, folds = dataset.training, FOLDS[probe.name]
    assert options.settings is not None
    (*_, depth) = (trial.layers for trial in probe.card.training.depths if trial.is_accepted)
    candidate = (probe.card.mechanism, replace(options.settings, layers=depth))
    # A labelled text and its contexts; conversations of the background have no source.
    sources = np.array(split.examples.sources, dtype=object)
    for row, context in enumerate(split.contexts):
        if context.kind == "background":
            sources[row] = ""
    fold_of = np.zeros(len(split), dtype=int)
    # Background, labelled or not, is left out by its groups.
    for fold, rows in enumerate(split.folds(len(folds))):
        fold_of[rows] = fold
    for fold, names in enumerate(folds):
        fold_of[np.isin(sources, names)] = fold
    if unlisted := {*sources} - {"", "background", *chain(*folds)}:
        sys.exit(f"No fold of {probe.name} leaves out {', '.join(sorted(unlisted))}: see FOLDS.")
    without_context = split.without_context
    examples = split.examples.select(without_context)
    logits = _without(candidate, split, fold_of)
    probabilities = probe.calibration.apply(logits)
    flags = probabilities[:, 0] >= probe.thresholds[0]
    is_background = sources == ""
    sources_found = measure_sources(examples, probabilities[without_context], probe.thresholds)
    assert sources_found, "no source is measured, as there are too many"
    metrics: dict[str, Any] = {
        "probe": probe.version,
        "threshold": probe.thresholds[0],
        "sources": {source: asdict(counts) for source, counts in sources_found.items()},
        "auroc": _auroc(logits[without_context, 0], examples.labels),
        "conversations": int(is_background.sum()),
        "flagged": int(flags[is_background].sum()),
    }
    carriers = np.array([str(cells.get("carrier", "")) for cells in split.examples.rows])
    carriers[is_background] = ""
    if carriers.any():
        numbers = np.unique(carriers, return_inverse=True)[1]
        logits = _without(candidate, split, np.where(carriers == "", -1, numbers))
        for carrier in sorted({*carriers[without_context]} - {""}):
            rows = without_context[carriers[without_context] == carrier]
            if len(np.unique(split.labels[rows])) == 2:
                area = _auroc(logits[rows, 0], split.labels[rows])
                metrics.setdefault("carriers", {})[carrier] = {"texts": len(rows), "auroc": area}
    return metrics


def _without(candidate: Candidate, split: Split, fold_of: np.ndarray) -> np.ndarray:
    """The logits of each part by a probe of the others; NaN for texts in no part (below 0)."""
    folds = tuple(np.flatnonzero(fold_of == fold) for fold in np.unique(fold_of[fold_of >= 0]))
    assert len(folds) > 1, "a single part would decide on early stopping"
    (run,) = train_mechanisms([candidate], split=split, left_out=folds, shares_matmuls=True)
    assert run is not None, "the training diverged"
    logits = np.full((len(split), split.task.outputs), np.nan)
    logits[fold_of >= 0] = run.logits
    return logits


def _auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    return float(roc_auc_score(labels == 1, scores))


def package(names: Sequence[str]) -> None:
    """Measure all trainings of each guard on its tests, and package the best."""
    commit = _commit_of_build()
    backbone = load_backbone(EMBEDDED_NAME, for_probing=True)
    for name in names:
        folders = [BUILD / f"training-{seed}" / name for seed in range(TRAININGS)]
        probes = [*map(load_probe, folders)]
        measured = _measure_tests(name, probes, folders[0].parent.parent / name, backbone)
        trainings = [
            {"seed": p.card.training.seed, "tests": results}
            for p, results in zip(probes, measured, strict=True)
        ]
        for training, folder in zip(trainings, folders, strict=True):
            if (folder / LEFT_OUT).exists():
                training["left_out"] = json.loads((folder / LEFT_OUT).read_bytes())
        best = max(range(TRAININGS), key=lambda row: _rank(trainings[row], probes[row]))
        probe, folder = probes[best], PACKAGE / name
        shutil.copy(folders[best] / PROBE, folder / PROBE)
        write_json(folder / "figures.json", measured[best])
        write_json(folder / "trainings.json", {"packaged": best, "trainings": trainings})
        record = folder / "build.json"
        if not record.exists() or json.loads(record.read_bytes())["probe"] != probe.version:
            # A copy of an earlier probe would decide as that one did.
            shutil.rmtree(folder / EMBEDDED_GGUF, ignore_errors=True)
            write_json(record, _record(name, probe, commit))
    write_tables()


def _rank(training: dict[str, Any], probe: Probe) -> tuple[bool, float]:
    """Rank a training by its recall on left-out sources; those that flag background come last.

    Tests play no part.
    """
    if left := training.get("left_out"):
        is_quiet = left["flagged"] <= _MOST_FLAGGED * left["conversations"]
        return is_quiet, float(np.mean(_recalls(left["sources"])))
    return True, max(probe.card.training.epochs.scores)


def _recalls(sources: dict[str, dict[str, int]]) -> list[float]:
    return [
        source["found"] / source["positives"] for source in sources.values() if source["positives"]
    ]


def _measure_tests(
    name: str, probes: Sequence[Probe], folder: Path, backbone: Backbone
) -> list[dict[str, Any]]:
    """Figures of several probes on each test, from one forward pass; each test is saved."""
    tests = {
        test: load_guard(name, f":{test}", probes[0].task) for test in find_guard(name).card.tests
    }
    trained = GuardTests(load_guard(name), tests)
    metrics: list[dict[str, Any]] = [{} for _ in probes]
    for test, examples in tests.items():
        path = folder / f"{test}.json"
        wanted = [[probe.version, examples.content_hash] for probe in probes]
        known = json.loads(path.read_bytes()) if path.exists() else []
        if [[each["probe"], each["texts_sha256"]] for each in known] != wanted:
            print(f"{name}: test {test}, {len(examples)} texts", flush=True)
            if probes[0].spans is not None:
                known = [trained.measure(backbone, probe, test) for probe in probes]
            else:
                # A bank wants names that differ.
                named = [p.changed(name=f"{name}-{p.card.training.seed}") for p in probes]
                bank = Bank(named, device=backbone.device)
                outputs = text_logits(backbone, bank, encode(backbone.encoder, examples.items))
                known = [
                    trained.results(
                        assess_logits(probe, examples, np.array([x.logits for x in outputs])), test
                    )
                    for probe, outputs in zip(probes, outputs, strict=True)
                ]
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, known)
        for each, of_test in zip(metrics, known, strict=True):
            each[test] = of_test
    return metrics


def accept(names: Sequence[str]) -> None:
    """Packages a copy of each probe for the embedded GGUF file, once decisions agree there."""
    probes = {name: load_probe(PACKAGE / name) for name in names}
    copies = _accepted_copies(probes)
    for name, copy in copies.items():
        save_probe(copy, PACKAGE / name / EMBEDDED_GGUF)
        (PACKAGE / name / EMBEDDED_GGUF / "README.md").unlink()
        record = _packaged(name, "build.json")
        agreement_of_guard = json.loads((BUILD / "agreement.json").read_bytes())[name]
        write_json(PACKAGE / name / "build.json", record | {"gguf": agreement_of_guard})
    write_tables()


def without_last_layers(probe: Probe, model: Fingerprint) -> Probe:
    """The probe for a copy of its model that has the first layers alone, with the same logits."""
    layers = model.layers
    scaling, scale = probe.standardisation, math.sqrt(layers / probe.card.backbone.layers)
    assert scaling.scale[layers:].isinf().all(), "the probe reads layers that the copy lacks"
    spec = probe.card.mechanism
    mechanism = build_mechanism(spec, Geometry(layers, model.width, probe.task.outputs))
    state = {
        key: value[:layers].clone() if key in ("gate", *_SCALED[spec.name]) else value
        for key, value in probe.mechanism.state_dict().items()
    }
    for key in _SCALED[spec.name]:
        state[key] *= scale
    mechanism.load_state_dict(state)
    training = probe.card.training.model_copy(update={"copy_of": probe.version})
    return Probe(
        probe.card.changed(backbone=model, training=training),
        mechanism.eval().requires_grad_(False),
        Standardisation(scaling.mean[:layers], scaling.scale[:layers], scaling.is_normalised),
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
        original = load_backbone(EMBEDDED_NAME, for_probing=True)
        known |= agreement(new, copies, original, gguf)
        write_json(path, known)
    for name in probes:
        counts = known[name]
        print(f"{name}: {counts['agreeing']} of {counts['texts']} decisions agree on GGUF")
        if counts["agreeing"] < AGREEMENT * counts["texts"]:
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
    agreements: dict[str, Any] = {}
    for reads in ("prompt", "response"):
        names = [name for name, probe in probes.items() if probe.reads.side == reads]
        positives = {name: _drawn(name, holds=True) for name in names}
        # There is no background of answers: those without the label stand for it.
        negatives = {n: background if reads == "prompt" else _drawn(n, holds=False) for n in names}
        shared = background if reads == "prompt" else [text for n in names for text in negatives[n]]
        texts = [*shared, *(text for name in names for text in positives[name])]
        flags = [
            _flags([probes_by_name[name] for name in names], backbone, texts) if names else []
            for probes_by_name, backbone in ((probes, original), (copies, gguf))
        ]
        start = len(shared)
        for row, name in enumerate(names):
            stop = start + len(positives[name])
            rows = [*range(len(shared)), *range(start, stop)]
            ours, theirs = (side[row][rows] for side in flags)
            agreements[name] = {
                "probe": probes[name].version,
                "texts": len(rows),
                "agreeing": int((ours == theirs).sum()),
                "flagged": [int(ours.sum()), int(theirs.sum())],
            }
            start = stop
    return agreements


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
    outputs = text_logits(backbone, bank, encode(backbone.encoder, texts))
    return [
        np.array([probe.verdict(text.logits).flagged for text in outputs])
        for probe, outputs in zip(probes, outputs, strict=True)
    ]


def _commit_of_build() -> str:
    """The commit that the build began at, which is the present one, without changes to it."""
    path, head = BUILD / "commit", _git("rev-parse", "HEAD")
    if not path.exists():
        if any(BUILD.glob("*/")):
            sys.exit(f"{BUILD} says of no commit that it was begun at. Remove the folder.")
        if changed := _git("status", "--porcelain", "--", *_DECISIVE):
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
    training = probe.card.training
    return {
        "guard": name,
        "version": find_guard(name).card.version,
        "probe": probe.version,
        "command": "make guards",
        "commit": commit,
        "date": date.today().isoformat(),
        "texts_sha256": load_guard(name).content_hash,
        "texts": [training.training.rows, len(load_guard(name))],
        "training_sha256": training.training_sha256,
        "threshold_rule": training.threshold_rule,
        "seed": training.seed,
        "dtype": probe.card.backbone.dtype,
        "packages": {package: version(package) for package in ("torch", "transformers", "numpy")},
    }


def with_tables(page: str) -> str:
    """The page with the tables as the packaged files have them."""
    tables = {
        "probes": _probes_table,
        "tests": _tests_table,
        "floors": _floors_table,
        "sources": _left_out_table,
        "thresholds": _thresholds_table,
        "headlines": _headlines_table,
    }
    return _TABLE.sub(lambda match: match[1] + tables[match[2]](), page)


def write_tables() -> None:
    for page in PAGES:
        page.write_text(with_tables(page.read_text("utf-8")), "utf-8")


def _packaged(name: str, file: str) -> Any:
    return json.loads((PACKAGE / name / file).read_bytes())


def _probes_table() -> str:
    titles = (
        "guard",
        "version",
        "texts trained on",
        "threshold",
        "held-out texts found",
        "other texts flagged",
        "background flagged (95 % CI)",
        "agrees on GGUF",
    )
    rows: list[list[str]] = []
    for name in guard_names():
        build, card = _packaged(name, "build.json"), read_card(PACKAGE / name)
        used, available = build["texts"]
        texts = f"{used:,}" if used == available else f"{used:,} of {available:,}"
        cells = ["", "", ""]
        if card.spans is None and len(card.thresholds) == 1:
            (curve,) = card.training.curves.values()
            hits, alarms = curve.at(card.thresholds[0])
            cells[:2] = [f"{hits} of {curve.positives}", f"{alarms} of {curve.negatives}"]
            cells[2] = _share(*card.training.flagged)
        threshold = f"{card.thresholds[0]:.3f}" if len(card.thresholds) == 1 else "by label"
        gguf = build.get("gguf")
        agrees = f"{gguf['agreeing']} of {gguf['texts']}" if gguf else "not compared"
        rows.append([f"`{name}`", str(build["version"]), texts, threshold, *cells, agrees])
    return _table(titles, rows)


def _thresholds_table() -> str:
    titles = (
        "guard",
        "threshold",
        "held-out texts found",
        "other texts flagged",
        "background flagged",
    )
    rows: list[list[str]] = []
    for name in guard_names():
        probe = load_probe(PACKAGE / name)
        if probe.task.kind != "binary" or probe.spans is not None:
            continue
        (curve,), (packaged,) = probe.card.training.curves.values(), probe.thresholds
        scores = probe.calibration.apply(probe.card.background.logits)[:, 0]
        points = [*curve.operating_points(), OperatingPoint(packaged, *curve.at(packaged))]
        for threshold, found, flagged in sorted({*points}, reverse=True):
            suffix = " (packaged)" if threshold == packaged else ""
            cells = [f"`{name}`", f"{threshold:.3f}{suffix}"]
            cells += [f"{found} of {curve.positives}", f"{flagged} of {curve.negatives}"]
            count = int((scores >= threshold).sum())
            cells.append(f"{count} of {len(scores)}" if len(scores) else "")
            rows.append(cells)
    return _table(titles, rows)


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    head, *body = (f"| {' | '.join(cells)} |" for cells in (titles, *rows))
    return "\n".join([head, f"|{'---|' * len(titles)}", *body, ""])


def _share(flagged: int, count: int) -> str:
    if not count:
        return ""
    (low,), (high,) = wilson(np.array([flagged / count]), np.array([count]))
    return f"{flagged / count:.1%} of {count} ({low:.1%} to {high:.1%})"


def _tests_table() -> str:
    trainings = {name: _trainings(name) for name in guard_names()}
    titles = ["guard", "test", "AUROC (95 % CI)", "TF-IDF", "found", "TF-IDF", "false positives"]
    if any(trainings.values()):
        titles.append("three trainings")
    rows: list[list[str]] = []
    for name, trained in trainings.items():
        for test, metrics in _packaged(name, "figures.json").items():
            cells = [*_cells(metrics), _of_trainings([each["tests"][test] for each in trained])]
            rows.append([f"`{name}`", f"`{test}`", *cells][: len(titles)])
    return _table(titles, rows)


def _headlines_table() -> str:
    """The tests in README."""
    titles = ("guard", "public test", "AUROC (95 % CI)", "TF-IDF", "found", "false positives")
    rows: list[list[str]] = []
    for name, tests in _HEADLINES.items():
        for test, title in tests.items():
            metrics = _packaged(name, "figures.json")[test]
            auroc, words, found, _, alarms = _cells(metrics)
            # The column counts texts, and a test of spans has none to count.
            found = found if "positives" in metrics else ""
            rows.append([f"`{name}`", title, auroc, words, found, alarms])
    return _table(titles, rows)


def _trainings(name: str) -> list[dict[str, Any]]:
    """The record of each training of a guard; none of one that was trained once."""
    path = PACKAGE / name / "trainings.json"
    return json.loads(path.read_bytes())["trainings"] if path.exists() else []


def _of_trainings(results: Sequence[dict[str, Any]]) -> str:
    """Mean and standard deviation of what several trainings have on a test."""
    if not results:
        return ""
    if "positives" not in results[0]:
        return ", ".join(
            f"{title} {_spread([result[key]['value'] for result in results], digits=3)}"
            for key, title in (("character_f1", "character F1"), ("f1", "F1"))
        )
    cells: list[str] = []
    if results[0]["auroc"]["value"] is not None:
        areas = _spread([result["auroc"]["value"] for result in results], digits=3)
        cells.append(f"AUROC {areas}")
    if results[0]["positives"]:
        cells.append(f"found {_spread([result['found'] for result in results])}")
    if results[0]["rows"] > results[0]["positives"]:
        flagged = _spread([result["false_positives"] for result in results])
        cells.append(f"false positives {flagged}")
    return ", ".join(cells)


def _spread(values: Sequence[float], digits: int = 0) -> str:
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"


def _left_out_table() -> str:
    """Recall and false positives of each left-out source, over all trainings."""
    titles = ("guard", "source left out of training", "texts per training", "found", "flagged")
    table: list[list[str]] = []
    for name in guard_names():
        records = [training["left_out"] for training in _trainings(name) if "left_out" in training]
        if not records:
            continue
        sources = {name: None for record in records for name in record["sources"]}
        rows: list[tuple[float, list[str]]] = []
        for source in sources:
            records_of_source = [
                record["sources"][source] for record in records if source in record["sources"]
            ]
            found, flagged = (
                [each[hits] / each[texts] for each in records_of_source if each[texts]]
                for hits, texts in (("found", "positives"), ("flagged", "negatives"))
            )
            count = np.mean([each["positives"] + each["negatives"] for each in records_of_source])
            cells = [_share_of(found), _share_of(flagged)]
            order = -np.mean(found) if found else 1 + np.mean(flagged)
            rows.append((order, [f"`{name}`", source, f"{count:.0f}", *cells]))
        table += [row for _, row in sorted(rows)]
    return _table(titles, table)


def _share_of(rates: Sequence[float]) -> str:
    return f"{np.mean(rates):.2f} ± {np.std(rates, ddof=1):.2f}" if len(rates) > 1 else ""


def _percent_of(rates: Sequence[float]) -> str:
    return f"{np.mean(rates):.1%} ± {np.std(rates, ddof=1):.1%}" if len(rates) > 1 else ""


def _floors_table() -> str:
    titles = (
        "guard",
        "recall, mean of left-out sources",
        "flagged, mean of left-out sources",
        "personas and system prompts flagged",
        "background flagged",
        "AUROC, all left-out sources",
        "AUROC of documents, by carrier",
    )
    rows: list[list[str]] = []
    for name in guard_names():
        records = [training["left_out"] for training in _trainings(name) if "left_out" in training]
        if not records:
            continue
        recalls, alarms, areas, background, personas = ([] for _ in range(5))
        carriers: list[float] = []
        for record in records:
            of_sources = record["sources"].values()
            recalls.append(np.mean(_recalls(record["sources"])))
            alarms.append(
                np.mean([x["flagged"] / x["negatives"] for x in of_sources if x["negatives"]])
            )
            # No background conversation stands beside the texts of a guard of answers.
            if record["conversations"]:
                background.append(record["flagged"] / record["conversations"])
            areas.append(record["auroc"])
            personas_found = [
                record["sources"][source] for source in PERSONAS if source in record["sources"]
            ]
            if personas_found:
                flagged, negatives = (
                    sum(x[key] for x in personas_found) for key in ("flagged", "negatives")
                )
                personas.append(flagged / negatives)
            carriers += [each["auroc"] for each in record.get("carriers", {}).values()]
        cells = [f"`{name}`", *map(_share_of, (recalls, alarms, personas))]
        cells += [_percent_of(background)]
        cells += [_spread(areas, digits=3), _spread(carriers, digits=3) if carriers else ""]
        rows.append(cells)
    return _table(titles, rows)


def _cells(test: dict[str, Any]) -> list[str]:
    if "positives" not in test:
        f1, exact = (test[key]["value"] for key in ("character_f1", "f1"))
        return [f"character F1 {f1:.3f}", "", f"F1 of exact spans {exact:.3f}", "", ""]
    auroc, words, found = "", "", ""
    if test["auroc"]["value"] is not None:
        low, high = test["auroc"]["ci"]
        auroc = f"{test['auroc']['value']:.3f} ({low:.3f} to {high:.3f})"
        words, found = f"{test['tfidf_auroc']:.3f}", str(test["tfidf_found"])
    negatives = test["rows"] - test["positives"]
    return [
        auroc,
        words,
        f"{test['found']} of {test['positives']}" if test["positives"] else "",
        found,
        f"{test['false_positives']} of {negatives}" if negatives else "",
    ]


_STEPS = {"train": train, "package": package, "accept": accept, "tables": lambda _: write_tables()}

if __name__ == "__main__":
    step, *chosen = sys.argv[1:] or ("",)
    for each in [_STEPS[step]] if step else [train, package, accept]:
        each(chosen or guard_names())
