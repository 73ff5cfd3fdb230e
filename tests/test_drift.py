"""Drift of scores: the index against its formula, and the gauge of a live server."""

from dataclasses import replace

import numpy as np
import pytest

from in_process import in_process
from sidelight.artifact import load_probe, save_probe
from sidelight.engines.transformers import TransformersEngine
from sidelight.metrics import BINS, score_counts, stability_index
from sidelight.server.metrics import ENOUGH, Drift
from sidelight.types import Verdict
from tiny import untrained_probe


def test_every_score_falls_into_one_bin():
    counts = score_counts([0.0, 0.05, 0.1, 0.95, 1.0])
    assert counts == [2, 1, 0, 0, 0, 0, 0, 0, 0, 2]


def test_the_index_is_that_of_the_formula():
    rng = np.random.default_rng(0)
    p, q = rng.integers(1000, 2000, (2, BINS)) * 1000
    shares_p, shares_q = p / p.sum(), q / q.sum()
    expected = sum((a - b) * np.log(a / b) for a, b in zip(shares_p, shares_q, strict=True))
    # Beside a million, the half that is added to each count weighs nothing, and chance is little.
    assert stability_index(p.tolist(), q.tolist()) == pytest.approx(expected, rel=1e-4)
    assert stability_index(p.tolist(), p.tolist()) == 0
    assert stability_index(p.tolist(), q.tolist()) == pytest.approx(
        stability_index(q.tolist(), p.tolist())
    )


@pytest.mark.parametrize(
    ("shape", "shifted"), [((0.3, 0.3), (0.3, 0.9)), ((2, 5), (5, 2))], ids=["ends", "middle"]
)
def test_chance_alone_is_rarely_more_than_stable_and_a_shift_is(shape, shifted):
    rng = np.random.default_rng(0)

    def counts(shape, number):
        return score_counts(rng.beta(*shape, number).tolist())

    told = [stability_index(counts(shape, 150), counts(shape, ENOUGH)) for _ in range(400)]
    assert (np.array(told) > 0.1).mean() < 0.05
    assert min(told) == 0
    assert stability_index(counts(shape, 500), counts(shifted, 500)) > 0.25


@pytest.mark.slow
def test_drift_is_told_of_the_probes_that_run_once_enough_is_seen(tiny, tmp_path):
    probe = untrained_probe(tiny, "toxicity")
    # The scores of validation were all in one bin, where these texts' are not.
    counts = [0] * 4 + [50] + [0] * 5
    known = replace(probe, record={"validation": {"scores": {"toxic": counts}}})
    unknown = str(save_probe(probe, tmp_path / "unknown"))
    texts = [f"text {i}" for i in range(ENOUGH)]
    key = {"Authorization": "Bearer admin"}
    with in_process(TransformersEngine(tiny, [known]), admin_key="admin") as http:

        def judged(texts):
            results = http.post("/v1/moderations", json={"input": texts}).json()["results"]
            return [result["category_scores"]["toxic"] for result in results]

        def told():
            lines = http.get("/metrics", headers=key).text.splitlines()
            own = [line for line in lines if line.startswith("sidelight_probe_drift_psi{")]
            return [float(line.split()[-1]) for line in own]

        scores = judged(texts[:-1])
        assert told() == []
        scores += judged(texts)
        assert told() == [pytest.approx(stability_index(counts, score_counts(scores)))]
        series = http.get("/metrics", headers=key).text
        count = 'sidelight_probe_score_count{label="toxic",probe="toxicity"}'
        assert f"{count} {2 * ENOUGH - 1}.0" in series
        # Its successor has no scores of validation.
        http.put("/admin/probes", json={"probe": [unknown]}, headers=key).raise_for_status()
        judged(texts)
        assert told() == []


def test_scores_of_a_probe_that_is_gone_are_not_kept(tiny, tmp_path):
    drift = Drift(TransformersEngine(tiny, [untrained_probe(tiny, "toxicity")]))
    verdict = Verdict("toxicity", "fine", ("fine",), {"fine": 0.9, "toxic": 0.1}, False)
    versions = set()
    for i in range(5):
        probe = untrained_probe(tiny, "toxicity", threshold=i / 5)
        saved = load_probe(save_probe(probe, tmp_path / str(i)))
        versions.add(saved.version)
        drift.add(saved, verdict)
    assert len(versions) == 5
    assert len(drift._recent) == 1
