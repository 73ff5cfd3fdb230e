"""What a probe has never seen: the distance that it measures, and who counts it."""

from dataclasses import replace
from random import Random

import pytest
import torch
from scipy.spatial.distance import mahalanobis

from corpora import rows
from in_process import in_process
from sidelight.artifact import load_probe, save_probe
from sidelight.bank import Bank, Panel
from sidelight.data.loading import load_examples
from sidelight.engines.transformers import TransformersEngine
from sidelight.mechanisms.base import Geometry, mechanism_spec
from sidelight.mechanisms.distance import Distance
from sidelight.prompts import Message, Reads
from sidelight.ragged import Ragged
from sidelight.states.extraction import score
from sidelight.training import contexts
from sidelight.training.classifier import Classifier
from sidelight.training.fit import fit
from sidelight.training.settings import Background, FitOptions
from sidelight.vllm.columns import Reading
from sidelight.vllm.requests import judgement_of, report_of
from sidelight.vllm.settings import KEY
from sidelight.vllm.worker import RequestJudge

LAYERS, WIDTH = 3, 32
TRAFFIC = tuple((Message("user", f"Ordinary thing {i} said."),) for i in range(40))
FAMILIAR = [row["text"] for row in rows("binary", 60, seed=1)]
# Bytes that no text of training has.
STRANGE = ["\x7f~|{}^" * n for n in range(2, 12)]


@pytest.fixture
def distance():
    measured = Distance(Geometry(LAYERS, WIDTH, 1))
    torch.manual_seed(0)
    measured.centre.normal_()
    measured.factor.normal_()
    measured.limit.copy_(torch.tensor([2.0, 7.0]))
    return measured


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """A probe, and the same trained without ordinary traffic."""
    options = FitOptions(
        mechanisms=(mechanism_spec("linear"),),
        reads=Reads(scope="each_turn"),
        cache_root=tmp_path_factory.mktemp("cache"),
        background=Background(TRAFFIC),
    )
    examples = load_examples(rows("binary", 120), positive="toxic")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contexts, "_LEAST_CONTEXT_TOKENS", 20_000)
        return [
            fit(tiny, examples, None, name="p", options=each).best.probe
            for each in (options, replace(options, background=Background()))
        ]


def test_the_distance_is_that_of_the_means_however_a_text_is_cut(distance):
    random = Random(0)
    texts = [torch.randn(LAYERS, n, WIDTH) for n in (1, 4, 9)]
    hidden = torch.full((3, LAYERS, 12, WIDTH), torch.nan)
    mask = torch.zeros(3, 12, dtype=torch.bool)
    for row, text in enumerate(texts):
        hidden[row, :, : text.shape[1]], mask[row, : text.shape[1]] = text, True
        means = torch.einsum("ld,ldk->lk", text.mean(1), distance.directions).flatten()
        precision = (distance.factor @ distance.factor.T).double().numpy()
        expected = mahalanobis(means, distance.centre.flatten(), precision) ** 2
        expected /= 2 + 7 / text.shape[1]
        columns = torch.einsum("ltd,ldk->tlk", text, distance.columns())
        cut = random.randint(0, len(columns))
        pieces = [
            distance.summarise(Ragged(piece, torch.tensor([len(piece)])))
            for piece in (columns[:cut], columns[cut:])
        ]
        streamed = distance.finish(distance.merge(*pieces))
        assert streamed.item() == pytest.approx(expected, rel=1e-4)
    dense = distance(hidden, mask)
    assert dense[-1].item() == pytest.approx(streamed.item(), rel=1e-4)
    assert distance.finish(distance.summarise(Ragged(columns[:0], torch.tensor([0])))).isnan()


@pytest.mark.slow
def test_what_was_never_seen_is_unfamiliar_and_little_else(tiny, trained):
    probe, without = trained
    classifier = Classifier(tiny, probe)
    told = [verdict.is_unfamiliar for verdict in classifier.predict([*FAMILIAR, *STRANGE])]
    assert sum(told[: len(FAMILIAR)]) <= 0.07 * len(FAMILIAR)
    assert all(told[len(FAMILIAR) :])
    assert without.distance is None
    assert {v.is_unfamiliar for v in Classifier(tiny, without).predict(STRANGE)} == {None}


@pytest.mark.slow
def test_it_changes_no_verdict_and_is_kept_by_the_artifact(tiny, trained, tmp_path):
    probe = trained[0]
    loaded = load_probe(save_probe(probe, tmp_path / "probe"))
    alone, saved, bare = (
        Classifier(tiny, each).predict([*FAMILIAR, *STRANGE])
        for each in (probe, loaded, replace(probe, distance=None))
    )
    assert saved == alone
    assert [replace(verdict, is_unfamiliar=None) for verdict in alone] == bare


@pytest.mark.slow
def test_a_worker_of_vllm_measures_and_reports_it_alike(tiny, trained):
    panel = Panel(trained[:1])
    texts = [FAMILIAR[0], STRANGE[0]]
    wanted = Classifier(tiny, trained[0]).predict(texts)
    assert [verdict.is_unfamiliar for verdict in wanted] == [False, True]
    for text, verdict in zip(texts, wanted, strict=True):
        prompt = tiny.encoder.encode((Message("user", text),))
        tap = panel.prompt_tap()
        with tiny.tapped(tap):
            tiny.run([prompt])
        reading = Reading("r", (), 0, bytes(prompt.parts), ends_prompt=True, is_plain=False)
        judgement = RequestJudge(panel).judge([reading], tap.projected()[0])["r"]
        (received,) = judgement_of({KEY: report_of(judgement, 0.0)})[0].verdicts
        assert received.is_unfamiliar == verdict.is_unfamiliar


@pytest.mark.slow
def test_a_server_counts_what_each_probe_has_never_seen(tiny, trained):
    probes = [replace(trained[0], name="first"), replace(trained[1], name="second")]
    with in_process(TransformersEngine(tiny, probes), admin_key="admin") as http:

        def counted(name):
            lines = http.get("/metrics", headers={"Authorization": "Bearer admin"}).text.split("\n")
            (line,) = (
                x for x in lines if x.startswith(f'sidelight_unfamiliar_total{{probe="{name}"')
            )
            return float(line.split()[-1])

        assert (counted("first"), counted("second")) == (0, 0)
        http.post("/v1/moderations", json={"input": [*FAMILIAR[:5], *STRANGE]}).raise_for_status()
        expected = Classifier(tiny, probes[0]).predict([*FAMILIAR[:5], *STRANGE])
        assert counted("first") == sum(verdict.is_unfamiliar for verdict in expected)
        assert counted("second") == 0


def test_a_whole_conversation_is_measured_not_its_turns(tiny, trained):
    probe = trained[0]
    turns = [Message("user", STRANGE[3]), Message("assistant", "x"), Message("user", FAMILIAR[0])]
    prompt = tiny.encoder.encode(tuple(turns))
    bank = Bank([probe])
    tap = bank.tap()
    with tiny.tapped(tap):
        tiny.run([prompt])
    ((reading,),) = bank.prompt_logits(tap.projected()[0], [bytes(prompt.parts)])
    measured = Bank([probe.distance_probe])
    whole, turn = (
        score(tiny, measured, [tiny.encoder.encode(tuple(each))])[0].item()
        for each in (turns, turns[:1])
    )
    assert reading.distance == pytest.approx(whole, rel=1e-5)
    assert turn > 1.5 * whole
