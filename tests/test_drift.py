"""Drift of scores: the index against its formula, and the gauge of a live server."""

from dataclasses import replace

import numpy as np
import pytest

from live import http_client, served
from sidelight.engines import TransformersEngine
from sidelight.metrics.drift import BINS, score_counts, stability_index
from sidelight.server.drift import ENOUGH
from tiny import tiny_backbone, untrained_probe


def test_every_score_falls_into_one_bin():
    counts = score_counts([0.0, 0.05, 0.1, 0.95, 1.0])
    assert counts == [2, 1, 0, 0, 0, 0, 0, 0, 0, 2]


def test_the_index_is_that_of_the_formula():
    rng = np.random.default_rng(0)
    p, q = rng.integers(1000, 2000, (2, BINS)) * 1000
    shares_p, shares_q = p / p.sum(), q / q.sum()
    expected = sum((a - b) * np.log(a / b) for a, b in zip(shares_p, shares_q, strict=True))
    # The half that is added to each count weighs nothing beside a million.
    assert stability_index(p.tolist(), q.tolist()) == pytest.approx(expected, rel=1e-4)
    assert stability_index(p.tolist(), p.tolist()) == 0
    assert stability_index(p.tolist(), q.tolist()) == pytest.approx(
        stability_index(q.tolist(), p.tolist())
    )


def test_a_shift_is_more_than_chance():
    rng = np.random.default_rng(0)
    reference = score_counts(rng.beta(2, 5, 500).tolist())
    same, shifted = (
        score_counts(rng.beta(2, 5, 500).tolist()),
        score_counts(rng.beta(5, 2, 500).tolist()),
    )
    assert stability_index(reference, same) < 0.1
    assert stability_index(reference, shifted) > 0.25


def test_a_server_tells_drift_once_it_has_seen_enough():
    backbone = tiny_backbone()
    probe = untrained_probe(backbone, "toxicity")
    # The scores of validation were all in one bin, where these texts' are not.
    stored = {"validation": {"scores": {"toxic": [0] * 4 + [50] + [0] * 5}}}
    engine = TransformersEngine(backbone, [replace(probe, record=stored)])
    with served(engine) as address, http_client(address) as http:
        texts = [f"text {i}" for i in range(ENOUGH)]
        http.post("/v1/moderations", json={"input": texts[:-1]}).raise_for_status()
        before = http.get("/metrics").text
        answer = http.post("/v1/moderations", json={"input": texts}).json()
        after = http.get("/metrics").text
    name = 'sidelight_probe_drift_psi{label="toxic",probe="toxicity"}'
    assert name not in before
    (told,) = [float(line.split()[-1]) for line in after.splitlines() if line.startswith(name)]
    scores = [r["category_scores"]["toxic"] for r in answer["results"]]
    observed = score_counts([*scores[:-1], *scores])
    assert told == pytest.approx(stability_index(stored["validation"]["scores"]["toxic"], observed))
    count = 'sidelight_probe_score_count{label="toxic",probe="toxicity"}'
    assert f"{count} {2 * ENOUGH - 1}.0" in after
