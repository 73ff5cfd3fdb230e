"""Sidelight: text and classification from one forward pass.

    import sidelight

    clf = sidelight.train("smollm2", "train.jsonl", mechanism="readout")
    print(clf.evaluate("test.jsonl").to_dict()["auprc"])
    clf.save("probes/mine")

Names are loaded on first use, so ``import sidelight`` is fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sidelight.classifier import Classifier, load, train
    from sidelight.data.loading import load_examples
    from sidelight.engines.transformers.backbone import load_backbone
    from sidelight.errors import SidelightError, SidelightWarning
    from sidelight.estimator import SidelightClassifier
    from sidelight.probes.bank import Bank
    from sidelight.probes.explanation import Explanation
    from sidelight.probes.probe import Probe
    from sidelight.types import Task, Verdict

__version__ = "0.1.0"

_HOMES = {
    "Bank": "sidelight.probes.bank",
    "Classifier": "sidelight.classifier",
    "Explanation": "sidelight.probes.explanation",
    "Probe": "sidelight.probes.probe",
    "SidelightClassifier": "sidelight.estimator",
    "SidelightError": "sidelight.errors",
    "SidelightWarning": "sidelight.errors",
    "Task": "sidelight.types",
    "Verdict": "sidelight.types",
    "load": "sidelight.classifier",
    "load_backbone": "sidelight.engines.transformers.backbone",
    "load_examples": "sidelight.data.loading",
    "train": "sidelight.classifier",
}

__all__ = [
    "Bank",
    "Classifier",
    "Explanation",
    "Probe",
    "SidelightClassifier",
    "SidelightError",
    "SidelightWarning",
    "Task",
    "Verdict",
    "load",
    "load_backbone",
    "load_examples",
    "train",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'sidelight' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
