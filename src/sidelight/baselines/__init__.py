"""Simple rivals that every probe is compared with. One file each."""

from sidelight.baselines.tfidf import tfidf_logits

__all__ = ["tfidf_logits"]
