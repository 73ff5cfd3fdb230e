"""Ready guards as a set: their figures on packaged tests, and a policy that observes."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from sidelight.backbone import Backbone
from sidelight.data.examples import Example, LabelledExamples, located
from sidelight.data.guards import draw_texts, find_guard
from sidelight.data.loading import load_examples
from sidelight.errors import SidelightError
from sidelight.manifest import read_manifest
from sidelight.probe import Probe
from sidelight.progress import say
from sidelight.states.cache import text_name
from sidelight.thresholds import ThresholdRule
from sidelight.training.background import Background
from sidelight.training.classifier import Classifier
from sidelight.training.judging import assess
from sidelight.training.measuring import trained_texts
from sidelight.training.settings import AUTO, READS, TRAINING_MAX_TOKENS, named_mechanism
from sidelight.training.tfidf import fit_tfidf
from sidelight.types import Task

# Most tokens of a guard's texts, where no number of rows is named.
TOKENS_ON_CPU = 250_000
_POLICY = """\
# A guard with mode = "shadow" blocks nothing, and no client sees its verdicts: they are
# counted in /metrics, which needs a key then (--metrics-key).
# To block what it flags, write "block" in place of "shadow". A line such as threshold = 0.9
# would replace the threshold of training. Rules that block prompts refuse conversations that
# begin with a system turn, unless only you write these:
# system_turns = "trust"
# In a rule of prompts, turns = "tool" acts on what tools bring, and on nothing that a user says.
"""


def load_guard(name: str, part: str = "", task: Task | None = None) -> LabelledExamples:
    """The training texts of a guard, with ``,FILE`` as its part also one's own, or a ``:TEST``."""
    spans, source = find_guard(name).card.columns["spans"], f"guard:{name}{part}"
    return load_examples(source, spans=spans, task=task)


def affordable(backbone: Backbone, texts: LabelledExamples) -> LabelledExamples:
    """Texts that have ``TOKENS_ON_CPU`` tokens together on a CPU; all of them on a GPU."""
    if backbone.device.type != "cpu":
        return texts
    encoder = backbone.encoder
    limit = min(TRAINING_MAX_TOKENS, encoder.max_tokens)
    sizes: list[int] = []
    for index, item in enumerate(texts.items):
        with located(item, index):
            sizes.append(len(encoder.encode_any_length(item.conversation, item.response)))
    return draw_texts(texts, sizes=np.minimum(sizes, limit).tolist(), most=TOKENS_ON_CPU)


def differences(
    folder: Path, backbone: Backbone, texts: LabelledExamples, rule: ThresholdRule
) -> list[str]:
    """Where the probe of a folder differs from the one that a training would write; none: nowhere.

    One that cannot be read differs too.
    """
    try:
        manifest, model = read_manifest(folder), backbone.fingerprint
    except SidelightError:
        return ["its form, which cannot be read"]
    history = manifest.history
    mechanism = named_mechanism(AUTO, of_spans=texts.spans is not None)
    compared = {
        "texts": (history.training.given_sha256, texts.content_hash),
        "threshold rule": (history.threshold_rule, str(rule)),
        "seed": (history.seed, 0),
        "mechanism": (manifest.mechanism.name, mechanism),
        "model": (manifest.backbone.digest, model.digest),
        "dtype": (manifest.backbone.dtype, model.dtype),
    }
    return [name for name, (there, wanted) in compared.items() if there != wanted]


def measure_tests(
    classifier: Classifier, texts: LabelledExamples, tests: Mapping[str, LabelledExamples]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The name and the figures of each packaged test, beside TF-IDF that is fitted to these texts.

    TF-IDF is given the threshold at which it has as many false alarms as the probe.
    """
    probe, words = classifier.probe, None
    if tests and not probe.spans:
        words = fit_tfidf(texts.whole_texts, texts.labels, probe.task)
    cards = find_guard(probe.name).card.tests
    for number, (test, examples) in enumerate(tests.items(), 1):
        title, rows = cards[test].title, len(examples)
        say(f"{probe.name}, test {number} of {len(tests)}: {title}, {rows} texts")
        assessment = assess(classifier, examples)
        trained = trained_texts(probe.history, examples)
        figures: dict[str, Any] = {"title": title, "rows": rows, "trained": trained}
        if assessment.spans is not None:
            yield test, figures | assessment.spans.to_dict()
            continue
        assert words is not None
        positive = examples.labels == 1
        flags = assessment.probabilities[:, 0] >= probe.thresholds[0]
        scores = words.logits(examples.whole_texts)[:, 0]
        alarms, others = int(flags[~positive].sum()), np.sort(scores[~positive])[::-1]
        highest = [*others, -np.inf][alarms]
        has_both = 0 < positive.sum() < len(positive)
        figures |= {
            "positives": int(positive.sum()),
            "found": int(flags[positive].sum()),
            "false_alarms": alarms,
            "auroc": assessment.report.metrics["auroc"].to_dict(),
            "tfidf_auroc": float(roc_auc_score(positive, scores)) if has_both else None,
            "tfidf_found": int((scores[positive] > highest).sum()) if has_both else None,
        }
        yield test, figures


def observing_policy(probes: Sequence[Probe]) -> str:
    """A policy in which nothing is blocked, with a comment that says how to block."""
    rules = [_POLICY]
    for probe in probes:
        side = "output" if probe.reads.includes_response else "input"
        # A bare key has no dot.
        name = f'"{probe.name}"' if "." in probe.name else probe.name
        rules.append(f'\n[{side}.{name}]\nmode = "shadow"\n')
    return "".join(rules)


def background_states(backbone: Backbone, background: Background) -> set[str]:
    """The names of the states that guards share: those of ordinary conversations alone."""
    names: set[str] = set()
    for turns in background.conversations:
        with suppress(SidelightError):
            prompt = backbone.encoder.encode_any_length(Example(turns).conversation)
            names.add(text_name(prompt, READS))
    return names
