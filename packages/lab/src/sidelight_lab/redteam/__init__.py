"""Attacks on probes, and their success rates."""
