"""Probes change while requests are served: what cannot serve changes nothing."""

import asyncio
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from fastapi import Request
from transformers import LlamaConfig

from engine_runs import run
from in_process import in_process
from live import MODEL
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

ADMIN = {"Authorization": "Bearer admin-key"}
USER = {"Authorization": "Bearer user-key"}
CHATS, PROBES = "/v1/chat/completions", "/admin/probes"
TURNS = [{"role": "user", "content": "hello"}]
CHAT = {"model": MODEL, "messages": TURNS, "temperature": 0, "max_tokens": 8}
BLOCKING = Policy(
    input={"toxicity": Rule("block", threshold=0.0)},
    output={"late": Rule("block", threshold=1.0)},
)


@pytest.fixture
def folders(tiny, tmp_path):
    """The served probes' artifacts, and a second version of one."""
    late = untrained_probe(tiny, "late", reads=Reads("response"))
    probes = [untrained_probe(tiny, "toxicity"), late]
    saved = {probe.name: save_probe(probe, tmp_path / probe.name) for probe in probes}
    newer = untrained_probe(tiny, "toxicity")
    newer.mechanism.bias.add_(0.5)
    return {**saved, "newer": save_probe(newer, tmp_path / "newer")}


class Admin:
    """Changes the probes of a server, and asks it as a user does."""

    def __init__(self, http):
        self.http = http

    def change(self, path="", body=None, *, method="POST", status=200):
        """What the server says of a change: its entry, or the message of the error."""
        answer = self.http.request(method, f"{PROBES}{path}", json=body, headers=ADMIN)
        assert answer.status_code == status, answer.text
        return answer.json() if status < 400 else answer.json()["error"]["message"]

    @property
    def entries(self):
        return {entry["name"]: entry for entry in self.change(method="GET")["probes"]}

    def chat(self, **options):
        return self.http.post(CHATS, json={**CHAT, **options}, headers=USER)

    @property
    def verdicts(self):
        return {v["probe"]: v for v in self.chat().json()["sidelight"]["verdicts"]}

    @property
    def is_blocking(self):
        return self.chat().status_code == 400


@contextmanager
def serving(backbone, folders, **options):
    sources = {name: folders[name] for name in ("toxicity", "late")}
    engine = TransformersEngine(backbone, [load_probe(path) for path in sources.values()])
    keys = {"api_key": "user-key", "admin_key": "admin-key"}
    with in_process(engine, sources=sources, **keys, **options) as http:
        yield Admin(http)


def test_only_an_admin_key_opens_the_routes(tiny, folders):
    with serving(tiny, folders) as admin:
        body = {"path": str(folders["newer"])}
        kinds = ("reload", "shadow", "enable", "disable")
        posts = [("POST", path) for path in ("", *(f"/toxicity/{kind}" for kind in kinds))]
        for method, path in (("GET", ""), *posts, ("DELETE", "/toxicity")):
            refused = admin.http.request(method, f"{PROBES}{path}", json=body, headers=USER)
            assert refused.status_code == 403, path
            assert refused.json()["error"]["code"] == "admin_key_required"
        assert {entry["state"] for entry in admin.entries.values()} == {"serving"}


def test_the_list_has_every_probe_with_its_state(tiny, folders):
    with serving(tiny, folders, policy=BLOCKING) as admin:
        entries = admin.entries
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


def test_a_reload_serves_the_artifact_as_it_is_now(tiny, folders):
    newer = load_probe(folders["newer"]).version
    with serving(tiny, folders) as admin:
        before = admin.verdicts
        shutil.copytree(folders["newer"], folders["toxicity"], dirs_exist_ok=True)
        assert admin.verdicts == before
        assert admin.change("/toxicity/reload", {})["version"] == newer
        after = admin.verdicts
        assert after["toxicity"]["probabilities"] != before["toxicity"]["probabilities"]
        assert after["late"] == before["late"]
        models = admin.http.get("/v1/models", headers=USER).json()["data"][0]
        assert models["sidelight"]["probes"][0]["version"] == newer


DAMAGES = {
    "half written": lambda weights, _: weights.write_bytes(weights.read_bytes()[:100]),
    "without weights": lambda weights, _: weights.unlink(),
    "without a manifest": lambda _, manifest: manifest.unlink(),
    "garbled": lambda _, manifest: manifest.write_bytes(b"\x00" + manifest.read_bytes()),
    "gone": lambda weights, _: shutil.rmtree(weights.parent),
}


@pytest.mark.slow
def test_garbage_leaves_the_last_good_one_serving(tiny, folders, tmp_path):
    with serving(tiny, folders, policy=BLOCKING) as admin:
        before = admin.entries["toxicity"]
        for name, damage in DAMAGES.items():
            folder = shutil.copytree(folders["newer"], tmp_path / name)
            damage(folder / "probe.safetensors", folder / "manifest.json")
            message = admin.change("/toxicity/reload", {"path": str(folder)}, status=400)
            assert admin.entries["toxicity"] == {**before, "failure": message}, name
            assert admin.chat().json()["error"]["code"] == "content_filter"
        assert admin.change("/toxicity/reload", {})["failure"] is None


@pytest.mark.slow
def test_what_does_not_fit_is_refused_by_name(tiny, folders, tmp_path):
    other = tiny_backbone(LlamaConfig(**{**SIZES, "rope_theta": 5000.0}))
    broken, own = untrained_probe(tiny, "toxicity"), untrained_probe(tiny, "toxicity")
    broken.mechanism.bias.fill_(float("nan"))
    labels = Task("binary", ("routine", "urgent"))
    wrong = (
        (untrained_probe(other, "toxicity"), "was trained on", 400),
        (broken, "No verdict from toxicity", 500),
        (untrained_probe(tiny, "toxicity", reads=Reads("both")), "on the input", 400),
        (replace(own, prompt_format="raw"), "and of raw texts, such as 'toxicity'", 400),
        (untrained_probe(tiny, "toxicity", task=INTENT), "under another name", 400),
        (untrained_probe(tiny, "urgency", task=labels), "fine, toxic", 400),
    )
    with serving(tiny, folders, policy=BLOCKING) as admin:
        version = admin.entries["toxicity"]["version"]
        for number, (probe, told, status) in enumerate(wrong):
            body = {"path": str(save_probe(probe, tmp_path / str(number)))}
            assert told in admin.change("/toxicity/reload", body, status=status)
            assert admin.entries["toxicity"]["version"] == version
            assert admin.is_blocking


@pytest.mark.slow
def test_nothing_passes_unjudged_while_probes_change(tiny, folders):
    """A blocking probe is reloaded, and others come and go, under requests that it must block."""
    is_over = threading.Event()

    def keep_asking(admin, stream):
        answers = []
        while not is_over.is_set():
            response = admin.chat(stream=stream)
            answers.append((response.status_code, response.json()["error"]["code"]))
        return answers

    with serving(tiny, folders, policy=BLOCKING) as admin, ThreadPoolExecutor(2) as pool:
        asking = [pool.submit(keep_asking, admin, stream) for stream in (False, True)]
        for turn in range(6):
            body = {"path": str(folders["newer" if turn % 2 == 0 else "toxicity"])}
            admin.change("/toxicity/reload", body)
            shadow = admin.change("", {**body, "shadow_of": "toxicity"}, status=201)
            admin.change(f"/{shadow['name']}", method="DELETE")
        is_over.set()
        answers = [answer for future in asking for answer in future.result()]
    assert len(answers) > 4
    assert set(answers) == {(400, "content_filter")}


@pytest.mark.slow
def test_a_probe_that_is_disabled_or_a_shadow_or_removed_blocks_nothing(tiny, folders):
    with serving(tiny, folders, policy=BLOCKING) as admin:
        assert admin.is_blocking
        for change, state in (
            ("disable", "disabled"),
            ("enable", "serving"),
            ("shadow", "shadow"),
            ("disable", "disabled"),
            # A shadow that was disabled is one again.
            ("enable", "shadow"),
            ("enable", "serving"),
        ):
            body = {} if change == "shadow" else None
            assert admin.change(f"/toxicity/{change}", body)["state"] == state
            assert admin.is_blocking == (state == "serving")
            if state == "disabled":
                admin.change("/toxicity/reload", {}, status=409)
            if state != "serving":
                assert admin.verdicts.keys() == {"late"}
        newer = {"path": str(folders["newer"]), "shadow_of": "toxicity"}
        shadow = admin.change("", newer, status=201)
        version = load_probe(folders["newer"]).version
        assert (shadow["name"], shadow["state"]) == (f"toxicity@{version}", "shadow")
        for name in (shadow["name"], "toxicity"):
            admin.change(f"/{name}", method="DELETE")
            admin.change(f"/{name}", method="DELETE", status=404)
        assert admin.verdicts.keys() == {"late"}
        body = {"path": str(folders["toxicity"])}
        admin.change("", body, status=201)
        for path, wrong, status in (
            ("", body, 409),
            ("", {}, 400),
            ("", {"path": "nowhere"}, 400),
            ("", {**body, "shadowof": "toxicity"}, 400),
            ("/toxicity/shadow", {"shadow_of": "late"}, 400),
            ("/toxic/reload", {}, 404),
        ):
            assert admin.change(path, wrong, status=status)
        assert admin.entries.keys() == {"late", "toxicity"}
        assert admin.is_blocking


def audited(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_change_whose_caller_leaves_is_made_and_audited(tiny, tmp_path):
    path = tmp_path / "audit.jsonl"

    async def change(engine):
        app = create_app(engine, ServerConfig(audit_log=path))
        scope = {"type": "http", "app": app, "state": {"trace": Trace()}}
        request = ServerRequest(Request(scope))
        caller = asyncio.create_task(admin_probes.disable("toxicity", request))
        await asyncio.sleep(0)
        caller.cancel()
        async with asyncio.timeout(60):
            while request.registry.entry("toxicity").state != "disabled":
                await asyncio.sleep(0.01)

    run(tiny, change, probes=[untrained_probe(tiny, "toxicity")])
    assert [line["change"] for line in audited(path)] == ["disable"]


def test_requests_that_wait_for_a_change_are_judged_by_the_new_probe(tiny):
    class Replacing(TransformersEngine):
        async def settled(self):
            await self.replace_probes([untrained_probe(tiny, "p", threshold=0.0)])

    for path, body in ((CHATS, CHAT), ("/v1/moderations", {"input": "hello"})):
        with in_process(Replacing(tiny, [untrained_probe(tiny, "p", threshold=1.0)])) as http:
            said = http.post(path, json=body).json()
        (one,) = said["results"] if "results" in said else said["sidelight"]["verdicts"]
        assert one["flagged"], path


@pytest.mark.slow
def test_changes_are_audited_with_the_key_that_made_them(tiny, folders, tmp_path):
    with serving(tiny, folders, audit_log=tmp_path / "audit.jsonl") as admin:
        old = admin.entries["toxicity"]["version"]
        reloaded = admin.change("/toxicity/reload", {"path": str(folders["newer"])})
        admin.change("/toxicity/reload", {"path": "nowhere"}, status=400)
        admin.http.post(f"{PROBES}/toxicity/disable", headers=USER)
        admin.change("/late", method="DELETE")
    first, second = audited(tmp_path / "audit.jsonl")
    assert first["version"] == reloaded["version"] != old
    assert first["request_id"].startswith("req_")
    assert (first["change"], first["probe"]) == ("reload", "toxicity")
    assert (second["change"], second["probe"]) == ("remove", "late")
    assert {first["key_id"], second["key_id"]} == {"admin-key-1"}
    with serving(tiny, folders, audit_log=Path("/dev/full")) as admin:
        # It stands all the same, and the failure is counted.
        assert admin.change("/toxicity/disable")["state"] == "disabled"
        series = admin.http.get("/metrics", headers=ADMIN).text
        assert "sidelight_audit_failures_total 1.0" in series
