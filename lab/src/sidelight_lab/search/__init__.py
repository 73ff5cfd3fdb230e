"""Chooses a mechanism's options and training settings on validation data, from the cache alone."""
