"""Labelling texts in the browser, in the order in which a probe learns most from them."""
