"""Attacks on probes, and how much of them gets through."""
