"""Benchmarks, which are separate commands, never tests. Every figure is a ratio within one run."""
