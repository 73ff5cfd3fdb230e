"""Probes are replaced in vLLM's own server, under traffic, and only verdicts change."""

from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest

from policy_contract import TOKENS, chat, verdicts
from sidelight.models.conversation import Reads
from sidelight.probes.artifact import save_probe
from worlds.stock import post, replace_probe, token_ids
from worlds.vllm import ROUNDING, probes_of_any_text

pytestmark = pytest.mark.xdist_group("stock")
CLIENTS = 4
# More than rounding, so that it shows whose verdict it is.
APART = 0.01
# Replaced in this order; of the rules, neither stops an answer.
READS = {"told": Reads(), "heard": Reads("response")}


def asked(stock, text, *, streamed=False):
    """The tokens of an answer, and what each replaced probe says."""
    body = {"model": "tiny", "temperature": 0, "max_tokens": TOKENS, "return_token_ids": True}
    body |= {**chat(text)[1], "stream": streamed}
    response = post(stock.address, "/v1/chat/completions", body)
    scores = {
        name: entry["probabilities"]["toxic"]
        for name, entry in verdicts(response).items()
        if name in READS
    }
    return tuple(token_ids(response)[0]), scores


@pytest.fixture
def retrained(stock, subjects, tmp_path):
    """Other probes of the same names, and their folders; the old ones are put back."""
    ways = {f"re{name}": reads for name, reads in READS.items()}
    probes, _ = probes_of_any_text(subjects.backbone, ways, tmp_path / "scratch")
    probes = [probe.changed(name=name) for name, probe in zip(READS, probes, strict=True)]
    yield [(probe, str(save_probe(probe, tmp_path / probe.name))) for probe in probes]
    for name in READS:
        folder = subjects.folder_of[name]
        assert replace_probe(stock.address, name, folder).status_code == 200


def scored(subjects, probes, text, ids):
    full, prompt = subjects.answered(text, ids), subjects.chat(text)
    return {
        probe.name: subjects.probabilities(
            probe, [full if probe.reads.includes_response else prompt]
        )[0]
        for probe in probes
    }


def test_reload_under_traffic_loses_no_requests_and_mixes_no_probes(stock, subjects, retrained):
    uncut = [text for text, (_, _, cut) in subjects.answers.items() if cut is None]
    texts = uncut[:CLIENTS]
    old = [asked(stock, text) for text in texts]
    is_over, found = Event(), [[] for _ in texts]

    def keep_asking(number):
        while not is_over.is_set():
            streamed = len(found[number]) % 2 == 1
            found[number].append(asked(stock, texts[number], streamed=streamed))

    with ThreadPoolExecutor(CLIENTS) as pool:
        running = [pool.submit(keep_asking, number) for number in range(len(texts))]
        try:
            for probe, folder in retrained:
                answer = replace_probe(stock.address, probe.name, folder)
                assert answer.status_code == 200, answer.text
                served = {card["name"]: card["path"] for card in answer.json()["probes"]}
                assert served[probe.name] == folder
        finally:
            is_over.set()
        for each in running:
            each.result()
    for text, (ids, before), answers in zip(texts, old, found, strict=True):
        same, after = asked(stock, text)
        assert same == ids
        for probes_of, scores in (
            ([subjects.by_name[name] for name in READS], before),
            ([probe for probe, _ in retrained], after),
        ):
            assert scores == pytest.approx(scored(subjects, probes_of, text, ids), abs=ROUNDING)
        assert all(abs(after[name] - before[name]) > APART for name in before)
        assert len(answers) > 2
        sets = [before, {**before, "told": after["told"]}, after]
        for each, scores in answers:
            assert each == ids
            assert any(scores == pytest.approx(one, abs=ROUNDING) for one in sets), (scores, sets)
