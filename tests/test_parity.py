"""What counts as another verdict when engines are compared."""

from dataclasses import replace

import numpy as np

from sidelight.engines.parity import compare_engines
from sidelight.engines.transformers import TransformersEngine
from sidelight.prompts import Message
from tiny import untrained_probe


def test_a_flip_is_another_verdict_at_the_probes_threshold(tiny):
    """Two engines whose probes differ in their threshold alone."""
    texts = [[Message("user", f"text {number}")] for number in range(6)]
    probe = untrained_probe(tiny, "toxicity", threshold=0.0)
    strict = replace(probe, thresholds=(1.0,))
    engines = {
        name: lambda one=one: TransformersEngine(tiny, [one])
        for name, one in (("lax", probe), ("strict", strict))
    }
    found = compare_engines(engines, texts, batch_sizes=(1,))[0]
    assert (found.flips, found.texts) == (6, 6)
    assert np.isclose(found.largest, 0)
