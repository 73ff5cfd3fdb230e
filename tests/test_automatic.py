"""Which mechanisms are trained where the user names none."""

import pytest

from sidelight.training.settings import automatic_mechanisms


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (20, [("readout", "none")]),
        (999, [("readout", "none")]),
        (1000, [("readout", "pair")]),
        (5000, [("readout", "pair"), ("blend", "none")]),
    ],
)
def test_more_texts_support_more(texts, expected):
    chosen = automatic_mechanisms(texts)
    assert [(spec.name, spec.options["extremes"]) for spec in chosen] == expected
