"""The engine over vLLM where vLLM refuses: which probes serve then, who gets in, and its end."""

import asyncio
import os
import re
import subprocess
import sys
import tomllib
from contextlib import asynccontextmanager
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType, SimpleNamespace

import click
import pytest
from fastapi import Request

import wordings
from sidelight.cli import app
from sidelight.engines.base import (
    EngineBusyError,
    EngineUnavailableError,
    GenerationError,
    NotExplainedError,
)
from sidelight.errors import FingerprintMismatchError, SidelightError
from sidelight.models.conversation import Message
from sidelight.models.fingerprint import ACCEPTED, hash_of
from sidelight.probes.artifact import load_probe
from sidelight.server.app import create_app
from sidelight.server.config import ServerConfig
from sidelight.server.keys import Caller
from sidelight.server.requests import ServerRequest
from sidelight_vllm import ENVIRONMENT, KEY, POLICY
from sidelight_vllm.engine import VllmEngine, saved
from sidelight_vllm.requests import Report, report_params
from sidelight_vllm.server import NO_PLACE, arguments, serve
from sidelight_vllm.settings import SET_HERE, require_options, revision_of, server_config
from worlds.models import untrained_probe

ROOT = Path(__file__).parents[3]
HELLO = [[Message("user", "hello")]]
# Names of the engine's probes and of the workers', and whether it is ready.
OLD = (["old"], ["old"], True)
NEW = (["new"], ["new"], True)
REFUSAL = "The last worker refuses."


class Workers:
    """Stands in for vLLM: its workers load what they are told, and report by it.

    It writes one token of each text, with one report.
    """

    errored = False

    def __init__(self, servers=1):
        self.vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(max_model_len=100),
            speculative_config=None,
            parallel_config=SimpleNamespace(_api_process_count=servers),
        )
        states = {}
        self.output_processor = SimpleNamespace(
            request_states=states,
            process_outputs=lambda outputs: None,
            has_unfinished_requests=lambda: bool(states),
        )
        self.loaded = self.checked = []
        # Stands for what the workers would report.
        self.report: object = ...
        self.refuses = ""
        self.is_paused = False
        # How many more texts may be read, if that is limited.
        self.readable: asyncio.Semaphore | None = None
        self.pausing, self.may_pause = asyncio.Event(), asyncio.Event()
        self.may_pause.set()

    def revision(self):
        return revision_of(probe.version for probe in self.loaded)

    async def collective_rpc(self, method, args):
        if self.refuses == method:
            # Whichever rank it is of, as vLLM raises it.
            raise Exception(REFUSAL)
        if method == "sidelight_check":
            self.checked = [load_probe(folder) for folder in args[0]]
        else:
            assert method == "sidelight_load"
            assert self.is_paused
            assert args == (revision_of(probe.version for probe in self.checked),)
            self.loaded = self.checked

    async def generate(self, tokens, params, request_id):
        assert not self.is_paused
        states = self.output_processor.request_states
        states[request_id] = SimpleNamespace(external_req_id=request_id, request_index=0)
        report = report_params(Report(revision=self.revision(), error=""))
        output = SimpleNamespace(
            request_id=request_id,
            new_token_ids=[7],
            kv_transfer_params=report if self.report is ... else self.report,
        )
        self.output_processor.process_outputs([output])
        try:
            if self.readable is not None:
                await self.readable.acquire()
            yield SimpleNamespace()
        finally:
            states.pop(request_id, None)

    def shutdown(self):
        pass

    async def pause_generation(self, *, mode, clear_cache):
        assert (mode, clear_cache) == ("wait", True)
        self.pausing.set()
        await self.may_pause.wait()
        assert not self.output_processor.request_states
        self.is_paused = True

    async def resume_generation(self):
        self.is_paused = False


@pytest.fixture(autouse=True)
def names_of_vllm(monkeypatch):
    """The names that the engine imports from vLLM when it judges."""
    dead = {
        name: type(name, (Exception,), {}) for name in ("EngineDeadError", "EngineGenerateError")
    }
    for path, found in {
        "vllm": {"SamplingParams": SimpleNamespace},
        "vllm.v1": {},
        "vllm.v1.engine": {},
        "vllm.v1.engine.exceptions": dead,
    }.items():
        module = ModuleType(path)
        module.__dict__.update(found)
        monkeypatch.setitem(sys.modules, path, module)


def replacing(tiny, change, **options):
    """Replaces a probe; the engine's and the workers' probes after it."""

    async def main():
        llm = Workers(**options)
        old, new = (untrained_probe(tiny, name) for name in ("old", "new"))
        with saved([old]) as (folders, served):
            llm.loaded = [load_probe(folder) for folder in folders]
        engine = VllmEngine(
            llm, served, name="tiny", encoder=tiny.encoder, fingerprint=tiny.fingerprint
        )
        await engine.start()
        async with asyncio.timeout(20):
            await change(engine, llm, new)
        served = [probe.name for probe in llm.loaded]
        found = [probe.name for probe in engine.probes], served, engine.is_ready
        await engine.close()
        assert engine.max_tokens < tiny.encoder.max_tokens
        return found

    return asyncio.run(main())


async def probes_of_a_request(engine):
    async with engine.serving() as served:
        return served.probes


async def waiting_for(changing, engine):
    """Until a change waits for the requests inside, so that it lets no other one in."""
    while not changing.done():
        try:
            async with asyncio.timeout(0.001):
                await probes_of_a_request(engine)
        except TimeoutError:
            return
        await asyncio.sleep(0.001)


@asynccontextmanager
async def writing(engine, llm, begun=None):
    """A text is being written, as by the guard of a server."""
    async with engine.serving(begun):
        states, text = llm.output_processor.request_states, object()
        states[text] = None
        try:
            yield
        finally:
            del states[text]


def test_worker_that_rejects_new_probes_leaves_the_old_ones_active(tiny):
    async def change(engine, llm, new):
        llm.refuses = "sidelight_check"
        with pytest.raises(SidelightError, match=REFUSAL):
            await engine.replace_probes([new])
        assert await engine.classify(HELLO)

    assert replacing(tiny, change) == OLD


def test_accepted_model_copy_also_accepts_new_probes(tiny, monkeypatch):
    original = replace(tiny.fingerprint, weights="0" * 16)

    async def change(engine, llm, new):
        new = new.changed(backbone=original)
        with pytest.raises(
            FingerprintMismatchError,
            match=wordings.SETTING_IS_ABSENT.format(name=ACCEPTED),
        ):
            await engine.replace_probes([new])
        monkeypatch.setenv(ACCEPTED, hash_of(original.digest, tiny.fingerprint.digest))
        await engine.replace_probes([new])

    assert replacing(tiny, change) == NEW


def test_inconsistent_workers_make_the_engine_unavailable(tiny):
    """One fails although it has checked the probes."""

    async def change(engine, llm, new):
        llm.refuses = "sidelight_load"
        with pytest.raises(EngineUnavailableError, match=wordings.RESTART):
            await engine.replace_probes([new])
        with pytest.raises(EngineUnavailableError, match=wordings.RESTART):
            await engine.classify(HELLO)

    probes, _, is_ready = replacing(tiny, change)
    assert (probes, is_ready) == (["old"], False)


def test_cancellation_stops_a_waiting_replacement_but_not_a_started_one(tiny):
    async def change(engine, llm, new):
        llm.may_pause.clear()
        changing = asyncio.create_task(engine.replace_probes([new]))
        await llm.pausing.wait()
        changing.cancel()
        await asyncio.sleep(0)
        llm.may_pause.set()
        await changing
        assert await engine.classify(HELLO)

    async def change_and_cancel(engine, llm, new):
        async with writing(engine, llm):
            changing = asyncio.create_task(engine.replace_probes([new]))
            await waiting_for(changing, engine)
            changing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await changing
        assert await engine.classify(HELLO)

    assert replacing(tiny, change) == NEW
    assert replacing(tiny, change_and_cancel) == OLD


def test_replacement_waits_for_open_requests_and_newcomers_wait_for_it(tiny):
    """A server takes nothing more from the first text before it has the second one's verdicts."""

    async def change(engine, llm, new):
        stale = engine.classify(HELLO)
        async with engine.serving() as begun, writing(engine, llm, begun):
            changing = asyncio.create_task(engine.replace_probes([new]))
            await waiting_for(changing, engine)
            newcomer = asyncio.create_task(probes_of_a_request(engine))
            async with writing(engine, llm, begun):
                await asyncio.sleep(0.05)
                assert not changing.done()
            await asyncio.sleep(0.05)
            assert not changing.done()
            assert not newcomer.done()
        assert await newcomer == (new,)
        await changing
        # Probes that came later do not judge it.
        with pytest.raises(EngineUnavailableError, match=wordings.JUST_REPLACED):
            await stale

    assert replacing(tiny, change) == NEW


def test_request_uses_the_same_probes_until_it_is_answered(tiny):
    async def change(engine, llm, new):
        app = create_app(engine, ServerConfig())
        state = {"observer": app.state.context.observer, "caller": Caller()}
        scope = {"type": "http", "app": app, "state": state}
        request = ServerRequest(Request(scope, asyncio.Event().wait))
        async with request.until_answered:
            context = await request.begin(HELLO)
            changing = asyncio.create_task(engine.replace_probes([new]))
            await waiting_for(changing, engine)
            await asyncio.sleep(0.05)
            assert await engine.classify(HELLO)
            assert (changing.done(), [probe.name for probe in context.probes]) == (False, ["old"])
        await changing

    assert replacing(tiny, change) == NEW


def test_overlapping_requests_cannot_starve_a_replacement(tiny):
    """Each comes before the one before it has left, so that some is always inside."""
    seen = []

    async def keep_coming(engine, left):
        async with engine.serving() as served:
            seen.append(served.probes[0].name)
            follower = left and asyncio.create_task(keep_coming(engine, left - 1))
            await asyncio.sleep(0.005)
        if follower:
            await follower

    async def change(engine, llm, new):
        async with engine.serving():
            changing = asyncio.create_task(engine.replace_probes([new]))
            while not llm.checked:
                await asyncio.sleep(0.001)
            coming = asyncio.create_task(keep_coming(engine, 20))
            await asyncio.sleep(0.005)
        await changing
        await coming

    assert replacing(tiny, change) == NEW
    assert {*seen} == {"new"}


def test_interrupted_replacement_makes_the_engine_unavailable(tiny):
    async def change(engine, llm, new):
        llm.may_pause.clear()
        changing = asyncio.create_task(engine.replace_probes([new]))
        await llm.pausing.wait()
        for _ in range(2):
            changing.cancel()
            await asyncio.sleep(0)
        with pytest.raises(EngineUnavailableError, match=wordings.RESTART):
            await changing
        with pytest.raises(EngineUnavailableError, match=wordings.RESTART):
            await engine.classify(HELLO)

    assert not replacing(tiny, change)[2]


def test_missing_verdict_raises_an_error(tiny):
    async def ask(engine, llm, _new):
        for report in (None, {}, {KEY: {"error": "different tokens"}}):
            llm.report = report
            with pytest.raises(GenerationError, match=wordings.NO_VERDICT):
                await engine.classify(HELLO)
        assert engine.load.waiting == 0
        with pytest.raises(NotExplainedError, match="--engine transformers"):
            await engine.classify(HELLO, explain=[])

    replacing(tiny, ask)


def test_slow_client_neither_blocks_replacement_nor_gets_foreign_verdicts(tiny, monkeypatch):
    monkeypatch.setattr("sidelight_vllm.lock._SLOW_AFTER_S", 0.05)

    async def change(engine, llm, new):
        async with engine.serving() as old:
            await engine.replace_probes([new])
            prompt = tiny.encoder.encode([Message("user", "hello")])
            with pytest.raises(GenerationError, match=wordings.PROBES_DIFFER):
                await engine.check_all([prompt], old.revision)
            with pytest.raises(EngineUnavailableError, match=wordings.JUST_REPLACED):
                async with engine.serving(old):
                    pytest.fail("these probes are gone")

    assert replacing(tiny, change) == NEW


def test_long_responses_and_multiple_api_servers_prevent_probe_replacement(tiny, monkeypatch):
    monkeypatch.setattr("sidelight_vllm.lock._PATIENCE_S", 0.05)

    async def change(engine, llm, new):
        async with writing(engine, llm):
            with pytest.raises(EngineUnavailableError, match=wordings.STILL_WRITTEN):
                await engine.replace_probes([new])
        assert await engine.classify(HELLO)

    async def share(engine, llm, new):
        with pytest.raises(SidelightError, match="--api-server-count 1"):
            await engine.replace_probes([new])

    assert replacing(tiny, change) == OLD
    assert replacing(tiny, share, servers=2) == OLD


# Starts a process as vLLM starts its engine, and prints its id.
STARTER = """
import multiprocessing, time

def wait():
    # Here, so that only the child pays for the import.
    from sidelight_vllm.internals import end_with_parent

    end_with_parent()
    time.sleep(600)

if __name__ == "__main__":
    child = multiprocessing.get_context("spawn").Process(target=wait)
    child.start()
    print(child.pid, flush=True)
    child.join()
"""


@pytest.mark.slow
def test_engine_exits_when_its_parent_is_killed(tmp_path):
    script = tmp_path / "starter.py"
    script.write_text(STARTER)
    starter = subprocess.Popen(
        [sys.executable, script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert starter.stdout is not None
    with starter.stdout as told:
        engine = int(told.readline())
        os.kill(engine, 0)
        starter.kill()
        # It holds the other end: nothing more is read until it has ended.
        assert told.read() == ""
    starter.wait()


def test_reserved_and_unknown_engine_options_are_rejected_with_a_remedy():
    fields = dict.fromkeys([*SET_HERE, "max_num_seqs"])
    arguments = SimpleNamespace(__dataclass_fields__=fields)
    require_options({"max_num_seqs": 8}, arguments)
    for name, remedy in {**SET_HERE, "max_num_seq": "Did you mean 'max_num_seqs'"}.items():
        with pytest.raises(SidelightError, match=re.escape(remedy)):
            require_options({name: 1}, arguments)


@pytest.mark.parametrize("name", ["serve", "train", "predict", "parity"])
def test_suggested_alternative_options_exist_on_every_vllm_command(name):
    command = app.get_command(click.Context(app), name)
    known = {word for parameter in command.params for word in parameter.opts}
    assert {"--engine-option", *re.findall(r"--[a-z-]+", " ".join(SET_HERE.values()))} <= known


def test_batch_is_admitted_to_the_queue_completely_or_rejected(tiny):
    async def ask(engine, llm, _new):
        async def until(waiting):
            while engine.load.waiting != waiting:
                await asyncio.sleep(0)

        llm.readable = asyncio.Semaphore(0)
        many = asyncio.create_task(engine.classify(HELLO * 300))
        await until(300)
        with pytest.raises(
            EngineBusyError, match=wordings.QUEUE_FULL.format(waiting=300, limit=128)
        ):
            await engine.classify(HELLO)
        for _ in range(173):
            llm.readable.release()
        await until(127)
        one = asyncio.create_task(engine.classify(HELLO))
        await until(128)
        with pytest.raises(EngineBusyError):
            await engine.classify(HELLO)
        # A client that leaves frees the places of texts that have not begun, too.
        many.cancel()
        with pytest.raises(asyncio.CancelledError):
            await many
        assert engine.load.waiting == 1
        llm.readable.release()
        assert await one
        assert engine.load.waiting == 0

    replacing(tiny, ask)


def options_of(**settings):
    return ServerConfig(engine="vllm", **settings)


def test_every_server_option_maps_to_vllm_or_has_a_remedy():
    """A new option of the server has to be looked at."""
    in_the_process = {
        *("config", "probe", "policy", "audit_log", "audit_salt", "api_key", "api_keys_file"),
        *("admin_key", "admin_keys_file", "metrics_key", "allow_anonymous"),
        *("allowed_host", "trace_events"),
    }
    as_arguments = {
        *("host", "port", "log_level", "model", "served_model_name", "dtype", "drain_s"),
        "engine_option",
    }
    elsewhere = {"engine", "device", "tokenizer"}
    known = in_the_process | as_arguments | elsewhere | NO_PLACE.keys()
    assert ServerConfig.model_fields.keys() == known


def test_vllm_server_reads_options_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SIDELIGHT_AUDIT_LOG", str(tmp_path / "audit.jsonl"))
    monkeypatch.setenv("SIDELIGHT_TRACE_EVENTS", "1")
    config = server_config()
    assert config.audit_log == tmp_path / "audit.jsonl"
    assert config.trace_events
    monkeypatch.delenv("SIDELIGHT_TRACE_EVENTS")
    assert not server_config().trace_events


def test_unsupported_and_insecure_vllm_server_options_are_rejected(monkeypatch):
    switches = ("json_logs", "playground")
    for message, settings in (
        *(
            (f"does not support '{name}'", {name: True if name in switches else 7})
            for name in NO_PLACE
        ),
        ("--api-key instead", {"engine_option": {"api_key": "x"}}),
        ("run 'vllm serve'", {"engine_option": {"api_server_count": 2}}),
        ("named twice", {"engine_option": {"served_model_name": "a"}, "served_model_name": "b"}),
        (r"Anyone who can reach 0\.0\.0\.0", {"host": "0.0.0.0"}),
    ):
        with pytest.raises(SidelightError, match=message):
            serve(options_of(**settings), "smollm2", [])
    monkeypatch.setenv("VLLM_API_KEY", "x")
    with pytest.raises(
        SidelightError, match=wordings.SET_VARIABLE.format(name="SIDELIGHT_API_KEY")
    ):
        serve(options_of(), "smollm2", [])


class PlainArgs:
    """vLLM's public arguments, in a vLLM that has nothing else that we know."""

    def __init__(self, **additional_config):
        self.additional_config = additional_config

    def create_engine_config(self):
        return "plain"


@pytest.fixture
def unknown_vllm(monkeypatch):
    """The plugin as vLLM loads it, in a vLLM whose internals have moved."""
    for name in (ENVIRONMENT, POLICY):
        monkeypatch.delenv(name, raising=False)
    args = type("EngineArgs", (PlainArgs,), dict(vars(PlainArgs)))
    vllm = ModuleType("vllm")
    vllm.EngineArgs, vllm.__version__ = args, "9.1"
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.delitem(sys.modules, "sidelight_vllm.plugin", raising=False)
    # Set by the plugin, for the processes that it starts.
    monkeypatch.setattr(os, "environ", {**os.environ})
    project = tomllib.loads((ROOT / "packages/vllm/pyproject.toml").read_text())["project"]
    (place,) = project["entry-points"]["vllm.general_plugins"].values()
    # vLLM logs an error while it loads an entry point, and then serves without it.
    return vllm, EntryPoint("sidelight", place, "vllm.general_plugins").load()


def test_vllm_of_any_version_starts_without_probes(unknown_vllm, caplog):
    vllm, install = unknown_vllm
    # vLLM may call a plugin more than once.
    install()
    install()
    assert vllm.EngineArgs().create_engine_config() == "plain"
    assert vllm.EngineArgs(another=1).create_engine_config() == "plain"
    assert not {"sidelight_vllm.plugin", "vllm.config"} & {*sys.modules}
    assert not caplog.messages
    del vllm.EngineArgs
    install()
    assert "additional_config['sidelight'] are not served" in caplog.messages[-1]


@pytest.mark.parametrize("name", [ENVIRONMENT, POLICY, None])
def test_unknown_vllm_version_is_rejected_when_probes_are_named(unknown_vllm, name):
    vllm, install = unknown_vllm
    if name is None:
        install()
    else:
        os.environ[name] = "named"
    with pytest.raises(
        SidelightError,
        match=wordings.VLLM_DIFFERS.format(version=r"9\.1")
        + wordings.TESTED_VLLM.format(versions=r">=0\.32,<0\.34"),
    ):
        install() if name else vllm.EngineArgs(sidelight={"probes": []}).create_engine_config()
    # Processes of the engine do not see its configuration before they load the plugin.
    with pytest.raises(SidelightError, match=wordings.VLLM_DIFFERS.format(version=r"9\.1")):
        install()


def test_options_become_vllm_arguments_without_secrets():
    options = {
        "enforce_eager": True, "enable_prefix_caching": False, "max_num_seqs": 4,
        "lora_modules": ["a=b", {"name": "c"}], "allowed_origins": ["*"],
        "compilation_config": {"level": 0},
    }  # fmt: skip
    config = options_of(
        probe=("p",), port=9, api_key="hidden", admin_key="hidden", audit_salt="hidden",
        drain_s=2.5, engine_option=options,
    )  # fmt: skip
    words = arguments(config, "name", "/folder")
    assert "hidden" not in " ".join(words)
    text = " ".join(words)
    for argument in (
        "--model /folder --served-model-name name", "--port 9", "--shutdown-timeout 3",
        '--additional-config {"sidelight": {"probes": ["p"]}}', "--enforce-eager",
        "--no-enable-prefix-caching --max-num-seqs 4", '--lora-modules a=b {"name": "c"} --',
        '--allowed-origins ["*"]', '--compilation-config {"level": 0}',
    ):  # fmt: skip
        assert argument in text
    named = arguments(options_of(served_model_name="assistant"), "name", "/folder")
    assert named[named.index("--served-model-name") + 1] == "assistant"
