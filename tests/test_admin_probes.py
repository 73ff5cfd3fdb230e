"""Probes change while requests are served: what cannot serve changes nothing."""

import asyncio
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from fastapi import Request
from transformers import LlamaConfig

from sidelight.engines.transformers.engine import TransformersEngine
from sidelight.models.conversation import Reads
from sidelight.policy.rules import Policy, Rule
from sidelight.probes.artifact import load_probe, save_probe
from sidelight.probes.card import PROBE, TrainingRecord
from sidelight.server.admin import Replacement
from sidelight.server.admin import replace as replace_all
from sidelight.server.app import create_app
from sidelight.server.config import ServerConfig
from sidelight.server.probes import ProbeRegistry
from sidelight.server.requests import ServerRequest
from worlds.models import INTENT, SIZES, broken, tiny_backbone, untrained_probe
from worlds.servers import MODEL, in_process, run_engine

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
    response_probe = untrained_probe(tiny, "late", reads=Reads("response"))
    probes = [untrained_probe(tiny, "toxicity"), response_probe]
    saved = {probe.name: save_probe(probe, tmp_path / probe.name) for probe in probes}
    newer = untrained_probe(tiny, "toxicity")
    newer.mechanism.bias.add_(0.5)
    return {**saved, "newer": save_probe(newer, tmp_path / "newer")}


class Admin:
    """Changes the probes of a server, and asks it as a user does."""

    def __init__(self, http, folders):
        self.http = http
        self.folders = {name: str(folders[name]) for name in ("toxicity", "late")}

    def put(self, body=None, *, status=200, **folders):
        """What the server serves after a change of these probes' folders, or why it refuses."""
        if body is None:
            body = {"probe": [*{**self.folders, **folders}.values()]}
        answer = self.http.put(PROBES, json=body, headers=ADMIN)
        assert answer.status_code == status, answer.text
        return answer.json()["error"]["message"] if status >= 400 else entries_of(answer)

    @property
    def entries(self):
        return entries_of(self.http.get(PROBES, headers=ADMIN))

    def chat(self, **options):
        return self.http.post(CHATS, json={**CHAT, **options}, headers=USER)

    @property
    def verdicts(self):
        return {v["probe"]: v for v in self.chat().json()["sidelight"]["verdicts"]}

    @property
    def is_blocking(self):
        return self.chat().status_code == 400


def entries_of(answer):
    return {entry["name"]: entry for entry in answer.json()["probes"]}


@contextmanager
def serving(backbone, folders, **options):
    served = [folders[name] for name in ("toxicity", "late")]
    engine = TransformersEngine(backbone, [load_probe(path) for path in served])
    keys = {"api_key": "user-key", "admin_key": "admin-key"}
    with in_process(engine, probe=served, **keys, **options) as http:
        yield Admin(http, folders)


def test_probe_list_includes_every_probe_with_its_rule(tiny, folders):
    with serving(tiny, folders, policy=BLOCKING) as admin:
        entries = admin.entries
    assert list(entries) == ["toxicity", "late"]
    assert entries["toxicity"] == {
        "name": "toxicity",
        "version": load_probe(folders["toxicity"]).version,
        "kind": "binary",
        "labels": ["fine", "toxic"],
        "reads": "prompt",
        "labels_spans": False,
        "side": "input",
        "mode": "block",
        "thresholds": {"toxic": 0.0},
        "shadow_of": None,
        "path": str(folders["toxicity"]),
    }


def test_replacement_without_paths_reloads_current_folders(tiny, folders, caplog):
    newer = load_probe(folders["newer"]).version
    with serving(tiny, folders) as admin:
        before = admin.verdicts
        shutil.copytree(folders["newer"], folders["toxicity"], dirs_exist_ok=True)
        assert admin.verdicts == before
        assert admin.put({})["toxicity"]["version"] == newer
        version = load_probe(folders["late"]).version
        assert f"serving: toxicity {newer}, late {version}." in caplog.text
        after = admin.verdicts
        assert after["toxicity"]["probabilities"] != before["toxicity"]["probabilities"]
        assert after["late"] == before["late"]
        models = admin.http.get("/v1/models", headers=USER).json()["data"][0]
        assert models["sidelight"]["probes"][0]["version"] == newer


def test_folder_is_reloaded_after_its_probe_is_renamed(tiny, folders):
    folder = folders["late"]
    renamed = load_probe(folder).changed(name="renamed")
    with serving(tiny, folders) as admin:
        save_probe(renamed, folder)
        assert admin.put({})["renamed"]["path"] == str(folder)
        save_probe(renamed.changed(training=TrainingRecord()), folder)
        assert admin.put({})["renamed"]["version"] == load_probe(folder).version


def test_probes_and_policy_change_together(tiny, folders, tmp_path):
    """A trial is a shadow in the new policy; a probe that is not named is gone."""
    save_probe(load_probe(folders["newer"]).changed(name="newer"), folders["newer"])
    path = tmp_path / "policy.toml"
    path.write_text('[input.toxicity]\nmode = "block"\nthreshold = 0.0\n')
    trial = path.read_text() + '[input.newer]\nmode = "shadow"\nshadow_of = "toxicity"\n'
    with serving(tiny, folders, policy=Policy()) as admin:
        assert not admin.is_blocking
        body = {"probe": [admin.folders["toxicity"], str(folders["newer"])]}
        (tmp_path / "trial.toml").write_text(trial)
        served = admin.put({**body, "policy": str(tmp_path / "trial.toml")})
        assert {name: entry["mode"] for name, entry in served.items()} == {
            "toxicity": "block",
            "newer": "shadow",
        }
        assert admin.is_blocking
        # The file that was named last is read again.
        (tmp_path / "trial.toml").write_text(trial.replace("block", "flag"))
        admin.put({})
        assert admin.verdicts.keys() == {"toxicity"}
        assert admin.put({"probe": [admin.folders["late"]], "policy": "/dev/null"})
        assert admin.verdicts.keys() == {"late"}


@pytest.mark.slow
def test_failed_replacement_leaves_current_probes_unchanged(tiny, folders, tmp_path):
    another_model = tiny_backbone(LlamaConfig(**{**SIZES, "rope_theta": 5000.0}))
    plain = untrained_probe(tiny, "toxicity")
    wrong = (
        (untrained_probe(another_model, "toxicity"), "was trained on", 400),
        (broken(plain), "gives no verdict", 400),
        (
            untrained_probe(tiny, "toxicity", reads=Reads("both")),
            "no probe 'toxicity' classifies",
            400,
        ),
        (plain.changed(prompt_format="raw"), "and of raw texts, such as 'toxicity'", 400),
        (untrained_probe(tiny, "toxicity", task=INTENT), "would never apply", 400),
        (
            untrained_probe(tiny, "late", reads=Reads("response")),
            "distinct names, got: late, late",
            400,
        ),
    )
    with serving(tiny, folders, policy=BLOCKING) as admin:
        before = admin.entries
        # Half written; ``test_artifact`` has every other damage.
        torn = shutil.copytree(folders["newer"], tmp_path / "torn")
        (torn / PROBE).write_bytes((torn / PROBE).read_bytes()[:-100])
        assert str(torn) in admin.put(toxicity=str(torn), status=400)
        for number, (probe, told, status) in enumerate(wrong):
            folder = str(save_probe(probe, tmp_path / str(number)))
            assert told in admin.put(toxicity=folder, status=status)
        for body in ({"probe": None, "policy": "nowhere"}, {"path": "x"}, {"probe": "x"}):
            assert admin.put(body, status=400)
        assert admin.entries == before
        assert admin.is_blocking


@pytest.mark.slow
def test_no_request_goes_unclassified_during_probe_replacement(tiny, folders):
    """A blocking probe is replaced, and another comes and goes, under requests that it blocks."""
    is_over = threading.Event()

    def keep_asking(admin, stream):
        answers = []
        while not is_over.is_set():
            response = admin.chat(stream=stream)
            answers.append((response.status_code, response.json()["error"]["code"]))
        return answers

    policy = replace(BLOCKING, output={})
    with serving(tiny, folders, policy=policy) as admin, ThreadPoolExecutor(2) as pool:
        asking = [pool.submit(keep_asking, admin, stream) for stream in (False, True)]
        for turn in range(6):
            folder = str(folders["newer" if turn % 2 == 0 else "toxicity"])
            admin.put(toxicity=folder)
            admin.put({"probe": [folder]})
        is_over.set()
        answers = [answer for future in asking for answer in future.result()]
    assert len(answers) > 4
    assert set(answers) == {(400, "content_filter")}


def test_new_rules_apply_as_soon_as_new_probes(tiny, folders, tmp_path):
    """The engine serves new probes before the change is over."""
    path = tmp_path / "policy.toml"
    path.write_text('[input.toxicity]\nmode = "block"\nthreshold = 0.0\n')
    seen = []

    class Watching(TransformersEngine):
        async def replace_probes(self, probes):
            seen.append([bound.mode for bound in registry.rules])
            await super().replace_probes(probes)
            seen.append([bound.mode for bound in registry.rules])

    async def change(engine):
        await registry.replace([folders["toxicity"]], path)
        seen.append([bound.mode for bound in registry.rules])

    engine = Watching(tiny, [load_probe(folders["newer"])])
    registry = ProbeRegistry(engine, ServerConfig())
    asyncio.run(started(engine, change))
    assert seen == [["score"], ["block"], ["block"]]


async def started(engine, use):
    await engine.start()
    try:
        await use(engine)
    finally:
        await engine.close()


def audited(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_replacement_is_applied_and_audited_after_client_disconnects(tiny, folders, tmp_path):
    path = tmp_path / "audit.jsonl"

    async def change(engine):
        app = create_app(engine, ServerConfig(audit_log=path))
        observer = app.state.context.observer
        scope = {"type": "http", "app": app, "state": {"observer": observer}}
        request = ServerRequest(Request(scope))
        body = Replacement(probe=[str(folders["late"])])
        caller = asyncio.create_task(replace_all(body, request))
        await asyncio.sleep(0)
        caller.cancel()
        async with asyncio.timeout(60):
            while [probe.name for probe in engine.probes] != ["late"] or not path.read_text():
                await asyncio.sleep(0.01)
        observer.audit.close()

    run_engine(tiny, change, probes=[untrained_probe(tiny, "toxicity")])
    assert [line["change"] for line in audited(path)] == ["replace"]


def test_requests_waiting_for_replacement_use_new_probe(tiny):
    class Replacing(TransformersEngine):
        @asynccontextmanager
        async def serving(self):
            await self.replace_probes([untrained_probe(tiny, "p", threshold=0.0)])
            yield

    for path, body in ((CHATS, CHAT), ("/v1/moderations", {"input": "hello"})):
        with in_process(Replacing(tiny, [untrained_probe(tiny, "p", threshold=1.0)])) as http:
            body_of_answer = http.post(path, json=body).json()
        (one,) = (
            body_of_answer["results"]
            if "results" in body_of_answer
            else body_of_answer["sidelight"]["verdicts"]
        )
        assert one["flagged"], path


@pytest.mark.slow
def test_replacements_are_audited_with_key_id(tiny, folders, tmp_path):
    with serving(tiny, folders, audit_log=tmp_path / "audit.jsonl") as admin:
        served = admin.put(toxicity=str(folders["newer"]))
        admin.put({"probe": ["nowhere"]}, status=400)
        admin.http.put(PROBES, json={}, headers=USER)
    (line,) = audited(tmp_path / "audit.jsonl")
    assert line["request_id"].startswith("req_")
    assert line["probes"] == {name: entry["version"] for name, entry in served.items()}
    assert line["rules"] == {
        name: {key: entry[key] for key in ("mode", "thresholds")} for name, entry in served.items()
    }
    assert (line["change"], line["key_id"]) == ("replace", "admin-key-1")
    with serving(tiny, folders, audit_log=Path("/dev/full")) as admin:
        # It stands all the same, and the failure is counted.
        assert admin.put(toxicity=str(folders["newer"])) == served
        series = admin.http.get("/metrics", headers=ADMIN).text
        assert "sidelight_audit_failures_total 1.0" in series
