"""Models that run in ``transformers``."""
