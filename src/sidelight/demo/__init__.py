"""The demonstration behind ``make demo``, with its bundled texts."""
