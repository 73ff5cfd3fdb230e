"""Labelling of texts in the browser, in the most informative order for a probe."""
