"""Probes change while requests are served: what cannot serve changes nothing."""

import asyncio
import json
import os
import random
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from fastapi import Request
from transformers import LlamaConfig

from engine_runs import run
from live import MODEL, served
from sidelight.artifact import load_probe, save_probe
from sidelight.engines.transformers import TransformersEngine
from sidelight.policy.rules import Policy, Rule
from sidelight.prompts import Reads
from sidelight.server import admin as admin_probes
from sidelight.server.app import create_app
from sidelight.server.config import ServerConfig
from sidelight.server.observe import Trace
from sidelight.server.requests import ServerRequest
from sidelight.types import Task
from tiny import INTENT, SIZES, tiny_backbone, untrained_probe

KEY, ADMIN = "user-key", "admin-key"
CHAT = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "hello"}],
    "temperature": 0,
    "max_tokens": 8,
}
BLOCKING = Policy(
    input={"toxicity": Rule("block", threshold=0.0)},
    output={"late": Rule("block", threshold=1.0)},
)


@pytest.fixture(scope="module")
def backbone():
    return tiny_backbone()


@pytest.fixture
def folders(backbone, tmp_path):
    """The served probes' artifacts, and a second version of one."""
    probes = [
        untrained_probe(backbone, "toxicity"),
        untrained_probe(backbone, "late", reads=Reads("response")),
    ]
    saved = {probe.name: save_probe(probe, tmp_path / probe.name) for probe in probes}
    newer = untrained_probe(backbone, "toxicity")
    newer.mechanism.bias.add_(0.5)
    return {**saved, "newer": save_probe(newer, tmp_path / "newer")}


@contextmanager
def serving(backbone, folders, **options):
    sources = {name: folders[name] for name in ("toxicity", "late")}
    engine = TransformersEngine(backbone, [load_probe(path) for path in sources.values()])
    with (
        served(engine, sources=sources, api_key=KEY, admin_key=ADMIN, **options) as address,
        client(address, ADMIN) as admin,
        client(address, KEY) as user,
    ):
        yield admin, user


def client(address, key):
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.Client(base_url=address, headers=headers, timeout=30)


def listed(admin):
    return {entry["name"]: entry for entry in admin.get("/admin/probes").json()["probes"]}


def verdicts(user):
    body = user.post("/v1/chat/completions", json=CHAT).raise_for_status().json()
    return {verdict["probe"]: verdict for verdict in body["sidelight"]["verdicts"]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/admin/probes"),
        ("POST", "/admin/probes"),
        ("POST", "/admin/probes/toxicity/reload"),
        ("POST", "/admin/probes/toxicity/shadow"),
        ("POST", "/admin/probes/toxicity/enable"),
        ("POST", "/admin/probes/toxicity/disable"),
        ("DELETE", "/admin/probes/toxicity"),
    ],
)
def test_only_an_admin_key_opens_the_routes(backbone, folders, method, path):
    with serving(backbone, folders) as (admin, user):
        response = user.request(method, path, json={"path": str(folders["newer"])})
        assert response.status_code == 403
        assert response.json()["error"]["code"] == "admin_key_required"
        assert listed(admin)["toxicity"]["state"] == "serving"


def test_the_list_has_every_probe_with_its_state(backbone, folders):
    with serving(backbone, folders, policy=BLOCKING) as (admin, _):
        entries = listed(admin)
    assert list(entries) == ["toxicity", "late"]
    assert entries["toxicity"] == {
        "name": "toxicity",
        "version": load_probe(folders["toxicity"]).version,
        "kind": "binary",
        "labels": ["fine", "toxic"],
        "reads": "prompt",
        "side": "input",
        "state": "serving",
        "mode": "block",
        "thresholds": {"toxic": 0.0},
        "shadow_of": None,
        "path": str(folders["toxicity"]),
        "failure": None,
    }


def test_a_reload_serves_the_artifact_as_it_is_now(backbone, folders):
    newer = load_probe(folders["newer"]).version
    with serving(backbone, folders) as (admin, user):
        before = verdicts(user)
        shutil.copytree(folders["newer"], folders["toxicity"], dirs_exist_ok=True)
        assert verdicts(user) == before
        entry = admin.post("/admin/probes/toxicity/reload", json={}).raise_for_status().json()
        assert entry["version"] == newer
        after = verdicts(user)
        assert after["toxicity"]["probabilities"] != before["toxicity"]["probabilities"]
        assert after["late"] == before["late"]
        models = user.get("/v1/models").json()["data"][0]["sidelight"]["probes"]
        assert models[0]["version"] == newer


def half_written(folder, _rng):
    (folder / "probe.safetensors").write_bytes((folder / "probe.safetensors").read_bytes()[:100])


def without_weights(folder, _rng):
    (folder / "probe.safetensors").unlink()


def without_manifest(folder, _rng):
    (folder / "manifest.json").unlink()


def emptied(folder, _rng):
    shutil.rmtree(folder)


def garbled(folder, rng):
    path = folder / rng.choice(["manifest.json", "probe.safetensors"])
    data = bytearray(path.read_bytes())
    for _ in range(5):
        data[rng.randrange(len(data))] = rng.randrange(256)
    path.write_bytes(data)


def random_bytes(folder, rng):
    for path in folder.iterdir():
        path.write_bytes(rng.randbytes(500))


DAMAGES = [half_written, without_weights, without_manifest, emptied, random_bytes, garbled]


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_garbage_leaves_the_last_good_one_serving(backbone, folders, damage):
    with serving(backbone, folders, policy=BLOCKING) as (admin, user):
        before = listed(admin)["toxicity"]
        damage(folders["toxicity"], random.Random(0))
        refused = admin.post("/admin/probes/toxicity/reload", json={})
        assert refused.status_code == 400
        assert refused.json()["error"]["message"]
        after = listed(admin)["toxicity"]
        assert after == {**before, "failure": refused.json()["error"]["message"]}
        blocked = user.post("/v1/chat/completions", json=CHAT)
        assert blocked.json()["error"]["code"] == "content_filter"


def test_what_does_not_fit_is_refused_by_name(backbone, folders, tmp_path):
    other = tiny_backbone(LlamaConfig(**{**SIZES, "rope_theta": 5000.0}))
    broken = untrained_probe(backbone, "toxicity")
    broken.mechanism.bias.fill_(float("nan"))
    wrong = {
        "other backbone": (untrained_probe(other, "toxicity"), "was trained on"),
        "no verdict": (broken, "No verdict from toxicity"),
        "other side": (untrained_probe(backbone, "toxicity", reads=Reads("both")), "on the input"),
        "other format": (
            replace(untrained_probe(backbone, "toxicity"), prompt_format="raw"),
            "Probes of chats, such as 'late', and of raw texts, such as 'toxicity'",
        ),
        "other task": (untrained_probe(backbone, "toxicity", task=INTENT), "under another name"),
    }
    policy = Policy(input={"toxicity": Rule("block")})
    with serving(backbone, folders, policy=policy) as (admin, _):
        before = listed(admin)["toxicity"]["version"]
        for name, (probe, told) in wrong.items():
            path = str(save_probe(probe, tmp_path / name))
            refused = admin.post("/admin/probes/toxicity/reload", json={"path": path})
            assert refused.status_code in (400, 500)
            assert told in refused.json()["error"]["message"]
            assert listed(admin)["toxicity"]["version"] == before
        assert admin.post("/admin/probes/toxicity/reload", json={}).json()["failure"] is None


@pytest.mark.slow
def test_nothing_passes_unjudged_while_probes_change(backbone, folders):
    """A blocking probe is reloaded, and others come and go, under requests that it must block."""
    stop = threading.Event()

    def keep_asking(user, stream):
        answers = []
        while not stop.is_set():
            response = user.post("/v1/chat/completions", json={**CHAT, "stream": stream})
            answers.append((response.status_code, response.json()["error"]["code"]))
        return answers

    with (
        serving(backbone, folders, policy=BLOCKING) as (admin, user),
        ThreadPoolExecutor(4) as pool,
    ):
        asking = [pool.submit(keep_asking, user, i % 2 == 0) for i in range(4)]
        for turn in range(8):
            path = folders["newer" if turn % 2 == 0 else "toxicity"]
            body = {"path": str(path)}
            admin.post("/admin/probes/toxicity/reload", json=body).raise_for_status()
            loaded = admin.post("/admin/probes", json={**body, "shadow_of": "toxicity"})
            name = loaded.raise_for_status().json()["name"]
            admin.delete(f"/admin/probes/{name}").raise_for_status()
        stop.set()
        answers = [answer for future in asking for answer in future.result()]
    assert len(answers) > 8
    assert set(answers) == {(400, "content_filter")}


def test_two_versions_side_by_side_agree_in_the_counts_only(backbone, folders):
    with serving(backbone, folders) as (admin, user):
        body = {"path": str(folders["newer"]), "shadow_of": "toxicity"}
        loaded = admin.post("/admin/probes", json=body)
        assert loaded.status_code == 201
        entry = loaded.json()
        newer = load_probe(folders["newer"]).version
        assert (entry["name"], entry["state"]) == (f"toxicity@{newer}", "shadow")
        assert verdicts(user).keys() == {"toxicity", "late"}
        text = admin.get("/metrics").text
        same = text.count(f'agreement="same",probe="toxicity",shadow="toxicity@{newer}"')
        different = text.count(f'agreement="different",probe="toxicity",shadow="toxicity@{newer}"')
        assert same + different >= 1
        promoted = admin.post("/admin/probes/toxicity/reload", json={"path": body["path"]})
        assert promoted.json()["version"] == newer
        admin.delete(f"/admin/probes/{entry['name']}").raise_for_status()
        assert listed(admin).keys() == {"toxicity", "late"}


def test_a_reload_with_other_labels_is_refused(backbone, folders, tmp_path):
    other = untrained_probe(backbone, "urgency", task=Task("binary", ("routine", "urgent")))
    save_probe(other, tmp_path / "urgency")
    with serving(backbone, folders, policy=BLOCKING) as (admin, user):
        body = {"path": str(tmp_path / "urgency")}
        refused = admin.post("/admin/probes/toxicity/reload", json=body)
        assert refused.status_code == 400
        assert "fine, toxic" in refused.json()["error"]["message"]
        assert user.post("/v1/chat/completions", json=CHAT).status_code == 400


def test_a_disabled_probe_does_not_run_until_it_is_enabled(backbone, folders):
    with serving(backbone, folders, policy=BLOCKING) as (admin, user):
        assert admin.post("/admin/probes/toxicity/disable").json()["state"] == "disabled"
        assert verdicts(user).keys() == {"late"}
        again = admin.post("/admin/probes/toxicity/reload", json={})
        assert (again.status_code, again.json()["error"]["code"]) == (409, "probe_disabled")
        assert admin.post("/admin/probes/toxicity/enable").json()["state"] == "serving"
        assert user.post("/v1/chat/completions", json=CHAT).status_code == 400


def test_a_shadow_is_hidden_and_blocks_nothing_until_it_is_enabled(backbone, folders):
    with serving(backbone, folders, policy=BLOCKING) as (admin, user):
        assert admin.post("/admin/probes/toxicity/shadow", json={}).json()["state"] == "shadow"
        assert verdicts(user).keys() == {"late"}
        wrong = admin.post("/admin/probes/toxicity/shadow", json={"shadow_of": "late"})
        assert wrong.status_code == 400
        admin.post("/admin/probes/toxicity/enable").raise_for_status()
        assert user.post("/v1/chat/completions", json=CHAT).status_code == 400


def test_a_disabled_shadow_is_a_shadow_again(backbone, folders):
    with serving(backbone, folders, policy=BLOCKING) as (admin, user):
        for change, state in (("shadow", "shadow"), ("disable", "disabled"), ("enable", "shadow")):
            body = {"json": {}} if change == "shadow" else {}
            changed = admin.post(f"/admin/probes/toxicity/{change}", **body)
            assert changed.json()["state"] == state
        assert user.post("/v1/chat/completions", json=CHAT).status_code == 200


def test_a_removed_probe_is_gone_and_can_come_back(backbone, folders):
    with serving(backbone, folders) as (admin, user):
        admin.delete("/admin/probes/toxicity").raise_for_status()
        assert verdicts(user).keys() == {"late"}
        assert admin.delete("/admin/probes/toxicity").status_code == 404
        body = {"path": str(folders["toxicity"])}
        assert admin.post("/admin/probes", json=body).status_code == 201
        assert admin.post("/admin/probes", json=body).status_code == 409
        assert verdicts(user).keys() == {"late", "toxicity"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/admin/probes", {}, 400),
        ("/admin/probes", {"path": "nowhere"}, 400),
        ("/admin/probes", {"path": os.devnull}, 400),
        ("/admin/probes", {"path": "x", "shadowof": "toxicity"}, 400),
        ("/admin/probes/toxic/reload", {}, 404),
        ("/admin/probes/toxic/enable", None, 404),
    ],
)
def test_a_wrong_change_is_an_error(backbone, folders, path, body, status):
    with serving(backbone, folders) as (admin, _):
        response = admin.post(path, json=body)
        assert response.status_code == status
        assert json.loads(response.text)["error"]["message"]


def test_a_change_whose_caller_leaves_is_made_and_audited(backbone, tmp_path):
    probe = untrained_probe(backbone, "toxicity")
    path = tmp_path / "audit.jsonl"

    async def change(engine):
        app = create_app(engine, ServerConfig(audit_log=path))
        scope = {"type": "http", "app": app, "state": {"trace": Trace()}}
        request = ServerRequest(Request(scope))
        for make, state in (
            (admin_probes.disable, "disabled"),
            (admin_probes.enable, "serving"),
        ):
            caller = asyncio.create_task(make("toxicity", request))
            await asyncio.sleep(0)
            caller.cancel()
            async with asyncio.timeout(60):
                while request.registry.entry("toxicity").state != state:
                    await asyncio.sleep(0.01)

    run(backbone, change, probes=[probe])
    assert [line["change"] for line in audited(path)] == ["disable", "enable"]


@pytest.mark.parametrize(
    ("path", "body", "told"),
    [
        ("/v1/chat/completions", CHAT, lambda said: said["sidelight"]["verdicts"]),
        ("/v1/moderations", {"input": "hello"}, lambda said: said["results"]),
    ],
)
def test_requests_that_wait_for_a_change_are_judged_by_the_new_probe(backbone, path, body, told):
    class Replacing(TransformersEngine):
        async def settled(self):
            await self.replace_probes([untrained_probe(backbone, "p", threshold=0.0)])

    engine = Replacing(backbone, [untrained_probe(backbone, "p", threshold=1.0)])
    with served(engine) as address, httpx.Client(base_url=address, timeout=30) as http:
        answer = http.post(path, json=body).json()
    assert [one["flagged"] for one in told(answer)] == [True]


def test_changes_are_audited_with_the_key_that_made_them(backbone, folders, tmp_path):
    with serving(backbone, folders, audit_log=tmp_path / "audit.jsonl") as (admin, user):
        old = listed(admin)["toxicity"]["version"]
        reloaded = admin.post("/admin/probes/toxicity/reload", json={"path": str(folders["newer"])})
        admin.post("/admin/probes/toxicity/reload", json={"path": "nowhere"})
        user.post("/admin/probes/toxicity/disable")
        admin.delete("/admin/probes/late").raise_for_status()
    first, second = audited(tmp_path / "audit.jsonl")
    assert first["version"] == reloaded.json()["version"] != old
    assert first["request_id"] == reloaded.headers["x-request-id"]
    assert (first["change"], first["probe"]) == ("reload", "toxicity")
    assert (second["change"], second["probe"]) == ("remove", "late")
    assert {first["key_id"], second["key_id"]} == {"admin-key-1"}


def test_a_change_that_cannot_be_audited_stands_and_is_counted(backbone, folders):
    with serving(backbone, folders, audit_log=Path("/dev/full")) as (admin, _):
        assert admin.post("/admin/probes/toxicity/disable").json()["state"] == "disabled"
        assert "sidelight_audit_failures_total 1.0" in admin.get("/metrics").text


def audited(path):
    return [json.loads(line) for line in path.read_text().splitlines()]
