"""Baselines that probes are compared with, fitted to the same texts. `registry` lists them.

Some read the hidden states that probes read (`pooled`, `siren`, `muli`, `token_heads`), others run
a whole model of their own (`fine_tuning`, `prompting`, `endpoints`).
"""
