"""Benchmarks: commands of their own, never tests. Every figure is a ratio within one run."""
