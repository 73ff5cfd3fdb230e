"""Inference engines: text and verdicts from one forward pass, for many concurrent requests."""
