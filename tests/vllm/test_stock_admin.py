"""Probes are replaced in vLLM's own server, under traffic, and nobody notices but by verdicts."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Event

import httpx
import numpy as np
import pytest

from sidelight.artifact import save_probe
from sidelight.bank import Bank
from sidelight.manifest import read_manifest
from sidelight.prompts import EncodedPrompt, Part, Reads
from sidelight.states.extraction import score
from stock_requests import ADMIN, GREEDY, chat, parts_of, post
from stock_server import stock_server
from tiny import tiny_backbone, untrained_probe
from vllm_served import ROUNDING, judging_any_text

HEADERS = {"Authorization": f"Bearer {ADMIN}"}
CLIENTS = 4
# More than rounding, so that it shows whose verdict it is.
APART = 0.01


@pytest.fixture(scope="module")
def address(subjects, tmp_path_factory):
    home = tmp_path_factory.mktemp("server")
    policy = home / "policy.toml"
    policy.write_text('[input.injection]\nmode = "flag"\n[output.leak]\nmode = "flag"\n')
    environment = {
        "SIDELIGHT_POLICY": str(policy),
        "SIDELIGHT_ADMIN_KEY": ADMIN,
        "VLLM_SERVER_DEV_MODE": "1",
    }
    with stock_server(subjects.path, subjects.folders, home, **environment) as server:
        yield server.address


@pytest.fixture(scope="module")
def retrained(subjects, tmp_path_factory):
    """Other probes of the same names, by name."""
    home = tmp_path_factory.mktemp("retrained")
    ways = {"injected": Reads(), "leaked": Reads("response")}
    probes, _ = judging_any_text(subjects.backbone, ways, home / "scratch")
    names = ("injection", "leak")
    return {
        name: (own := replace(probe, name=name), str(save_probe(own, home / name)))
        for name, probe in zip(names, probes, strict=True)
    }


def admin(address, path, body=None):
    method = "GET" if body is None else "POST"
    url = f"{address}/admin/probes{path}"
    return httpx.request(method, url, json=body, headers=HEADERS, timeout=120)


def asked(address, text, *, streamed=False):
    """What each probe says of a text and its answer."""
    body = {**GREEDY, **chat(text)[1], "stream": streamed}
    response = post(address, "/v1/chat/completions", body)
    assert response.status_code == 200, response.text
    ids, said = [], {}
    for part in parts_of(response):
        for choice in part.get("choices", ()):
            ids += choice.get("token_ids") or []
        for verdict in part.get("sidelight", {}).get("verdicts", ()):
            probabilities = [*(verdict.get("probabilities") or {}).values()]
            assert probabilities, part
            said[verdict["probe"]] = probabilities[-1]
    return tuple(ids), said


def scored(subjects, probes, text, ids):
    prompt = subjects.chat(text)
    read = ids[:-1]
    whole = EncodedPrompt(prompt.token_ids + read, prompt.parts + (Part.RESPONSE,) * len(read))
    given = zip(probes, (prompt, whole), strict=True)
    return {p.name: float(of_probe(subjects, p, each)) for p, each in given}


def of_probe(subjects, probe, prompt):
    (logits,) = score(subjects.backbone, Bank([probe]), [prompt])
    return [*probe.verdict(logits[0]).probabilities.values()][-1]


def test_an_admin_alone_sees_and_changes_probes(address, subjects):
    body = {"path": subjects.folders[0]}
    for headers in ({}, {"Authorization": "Bearer other"}):
        url = f"{address}/admin/probes"
        assert httpx.get(url, headers=headers).status_code in (401, 403)
        answer = httpx.post(f"{url}/injection/reload", json=body, headers=headers)
        assert answer.status_code in (401, 403)
    entries = admin(address, "").json()["probes"]
    assert [(each["name"], each["path"]) for each in entries] == [
        *zip(("injection", "leak"), subjects.folders, strict=True)
    ]


def test_probes_that_cannot_be_served_leave_the_old_ones(address, subjects, tmp_path):
    text = subjects.quiet[0]
    before = asked(address, text)
    leak = subjects.probes[1]
    wide = untrained_probe(subjects.backbone, "leak", mechanism="attention", reads=leak.reads)
    foreign = untrained_probe(tiny_backbone(), "leak", reads=leak.reads)
    broken = untrained_probe(subjects.backbone, "leak", reads=leak.reads)
    broken.mechanism.bias.fill_(float("nan"))
    wrong = {"SIDELIGHT_COLUMNS=": wide, "was trained on": foreign, "No verdict from leak": broken}
    for number, (message, probe) in enumerate(wrong.items()):
        folder = str(save_probe(probe, tmp_path / str(number)))
        answer = admin(address, "/leak/reload", {"path": folder})
        assert answer.status_code >= 400
        assert message in answer.text
        assert asked(address, text) == before
    (entry,) = (each for each in admin(address, "").json()["probes"] if each["name"] == "leak")
    assert (entry["path"], entry["version"]) == (
        subjects.folders[1],
        read_manifest(subjects.folders[1]).version,
    )
    assert "No verdict from leak" in entry["failure"]


def test_a_reload_under_traffic_loses_no_request_and_no_answer_mixes_probes(
    address, subjects, retrained
):
    texts = subjects.quiet[:CLIENTS]
    old = [asked(address, text) for text in texts]
    is_over, found = Event(), [[] for _ in texts]

    def keep_asking(number):
        while not is_over.is_set():
            streamed = len(found[number]) % 2 == 1
            found[number].append(asked(address, texts[number], streamed=streamed))

    with ThreadPoolExecutor(CLIENTS) as pool:
        running = [pool.submit(keep_asking, number) for number in range(CLIENTS)]
        try:
            for name, (_, folder) in retrained.items():
                answer = admin(address, f"/{name}/reload", {"path": folder})
                assert answer.status_code == 200, answer.text
                assert (answer.json()["path"], answer.json()["failure"]) == (folder, None)
        finally:
            is_over.set()
        for each in running:
            each.result()
    probes = [probe for probe, _ in retrained.values()]
    for text, (ids, before), answers in zip(texts, old, found, strict=True):
        same, after = asked(address, text)
        assert same == ids
        for probes_of, said in ((subjects.probes, before), (probes, after)):
            wanted = scored(subjects, probes_of, text, ids)
            assert said == pytest.approx(wanted, abs=ROUNDING)
        assert all(abs(after[name] - before[name]) > APART for name in before)
        assert len(answers) > 2
        # The injection first, then the leak.
        sets = [before, {**before, "injection": after["injection"]}, after]
        for each, said in answers:
            assert each == ids
            assert any(said == pytest.approx(one, abs=ROUNDING) for one in sets), (said, sets)
    judged = admin(address, "").json()["probes"]
    assert [each["path"] for each in judged] == [folder for _, folder in retrained.values()]


def test_probes_that_nobody_has_announced_give_no_verdict(address, subjects):
    """Whoever may call workers can load others into them, past the policy."""
    text = subjects.quiet[1]
    served = [each["path"] for each in admin(address, "").json()["probes"]]
    folders = [*reversed(served)]
    load = {"method": "sidelight_load", "args": [folders]}
    answer = httpx.post(f"{address}/collective_rpc", json=load, timeout=60)
    assert answer.json()["results"] == [None]
    response = post(address, "/v1/chat/completions", {**GREEDY, **chat(text)[1]})
    verdicts = response.json()["sidelight"]["verdicts"]
    assert all("probabilities" not in verdict for verdict in verdicts), json.dumps(verdicts)
    for name, folder in zip(("injection", "leak"), served, strict=True):
        assert admin(address, f"/{name}/reload", {"path": folder}).status_code == 200
    _, said = asked(address, text)
    assert said.keys() == {"injection", "leak"}
    assert np.isfinite([*said.values()]).all()
