"""Long inputs: what is hidden among other texts, and what two ways of reading say of it."""

import pytest

from corpora import rows
from sidelight.data.loading import load_examples
from sidelight.mechanisms.base import mechanism_names, mechanism_spec
from sidelight_lab.bench.long_inputs import compare_lengths
from sidelight_lab.bench.subjects import untrained_probe

pytestmark = pytest.mark.slow


def test_one_window_over_the_whole_says_the_same_and_small_ones_other_things(tiny):
    texts = load_examples(rows("binary", 40))
    probes = [untrained_probe(tiny, n, spec=mechanism_spec(n)) for n in mechanism_names()]

    def figures(**options):
        found = compare_lengths(tiny, probes, texts, seed=0, **options)
        assert [row["read"] for row in found] == ["whole", "windows"] * (len(found) // 2)
        return zip(found[::2], found[1::2], strict=True)

    for whole, windows in figures(lengths=(0, 30), count=4, window=10_000):
        assert {**whole, "read": ""} == {**windows, "read": ""}
    small = figures(lengths=(60,), count=8, window=8)
    assert any(whole["AUROC"] != windows["AUROC"] for whole, windows in small)
