"""Rivals that probes are compared with, fitted to the same texts. One file each."""

from sidelight.baselines.base import Baseline, Rival
from sidelight.baselines.tfidf import TfIdf

BASELINES: dict[str, type[Baseline]] = {
    "tfidf": TfIdf,
}

__all__ = ["BASELINES", "Baseline", "Rival", "TfIdf"]
