"""Sidelight's laboratory: baselines, tables, search, anatomy and benchmarks for probes."""
