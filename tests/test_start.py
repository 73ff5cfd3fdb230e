"""What keeps a model from being loaded is one line, before anything is loaded; signals end it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from unittest.mock import Mock

import httpx
import huggingface_hub
import pytest
import torch
import uvicorn
from transformers import LlamaConfig

import wordings
from sidelight.engines.transformers.backbone import load_backbone, read_model
from sidelight.engines.transformers.engine import TransformersEngine
from sidelight.errors import SidelightError
from sidelight.models.checkpoint import stored_bytes
from sidelight.models.machine import find_device, free_memory
from sidelight.models.smollm2 import cache_root
from sidelight.policy.rules import Policy, Rule
from sidelight.probes.artifact import load_probe, save_probe
from worlds.gguf import CONFIGS, needs_llama, write_gguf
from worlds.models import family_backbone, saved, tiny_backbone, untrained_probe
from worlds.servers import cli, free_port, in_process, wait_until_ready

BACKBONE = "sidelight.engines.transformers.backbone"


@pytest.fixture
def folder(tmp_path, tiny):
    return saved(tiny, tmp_path / "model")


def test_model_larger_than_free_memory_is_not_loaded(folder, monkeypatch):
    load_backbone(folder)
    monkeypatch.setattr(f"{BACKBONE}.free_memory", lambda: 1000)
    monkeypatch.setattr(torch.nn.Module, "__init__", None)
    with pytest.raises(
        SidelightError, match=f"{wordings.DOES_NOT_FIT}: {wordings.WEIGHTS_TAKE} .* GB"
    ):
        load_backbone(folder)


def test_device_lacking_required_operation_is_rejected(monkeypatch):
    """As Apple's GPUs are."""
    assert find_device("cpu") == torch.device("cpu")
    monkeypatch.setattr("torch.segment_reduce", Mock(side_effect=NotImplementedError))
    with pytest.raises(
        SidelightError,
        match=wordings.LACKS_OPERATION.format(name="segment_reduce") + " --device cpu",
    ):
        find_device("cpu")


@pytest.mark.parametrize(
    ("dtype", "gpu", "cpu", "room"),
    [
        ("auto", 1000, 10**12, "0.0 GB are free on cuda:1"),
        ("float32", 1000, 10**12, "0.0 GB are free on cuda:1"),
        # They are converted before they are moved.
        ("bfloat16", 10**12, 1000, "0.0 GB are free on cpu"),
    ],
)
def test_gpu_loading_checks_gpu_memory_and_cpu_memory_for_conversion(
    folder, monkeypatch, dtype, gpu, cpu, room
):
    monkeypatch.setattr(f"{BACKBONE}.find_device", torch.device)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _device: (gpu, 10**12))
    monkeypatch.setattr(f"{BACKBONE}.free_memory", lambda: cpu)
    monkeypatch.setattr(torch.nn.Module, "__init__", None)
    with pytest.raises(
        SidelightError, match=f"{wordings.DOES_NOT_FIT}: {wordings.WEIGHTS_TAKE} .* {room}"
    ):
        load_backbone(folder, dtype=dtype, device="cuda:1")


def test_memory_check_uses_loaded_dtype(tmp_path, monkeypatch):
    folder = saved(family_backbone("llama", dtype=torch.bfloat16), tmp_path / "model")
    stored = stored_bytes(Path(folder))
    monkeypatch.setattr(f"{BACKBONE}.free_memory", lambda: 2 * stored - 1)
    assert load_backbone(folder, device="cpu").fingerprint.dtype == "bfloat16"
    with pytest.raises(SidelightError, match=wordings.DOES_NOT_FIT):
        load_backbone(folder, device="cpu", dtype="float32")
    # The other way, half of what is stored is enough.
    folder = saved(family_backbone("llama", dtype=torch.float32), tmp_path / "wide")
    monkeypatch.setattr(f"{BACKBONE}.free_memory", lambda: stored)
    assert load_backbone(folder, device="cpu", dtype="bfloat16").fingerprint.dtype == "bfloat16"


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """Makes the hub's cache hold a folder as a model."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def hold(name, folder):
        cached = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text("0" * 40)
        return shutil.copytree(folder, cached / "snapshots" / ("0" * 40))

    return hold


@pytest.mark.usefixtures("offline")
def test_oversized_hub_model_is_rejected_before_download(folder, hub_cache, monkeypatch):
    snapshot = hub_cache("some/model", folder)
    assert load_backbone("some/model").fingerprint.name == "some/model"
    monkeypatch.setattr(f"{BACKBONE}.free_memory", lambda: 1000)
    with pytest.raises(SidelightError, match=f"'some/model' {wordings.DOES_NOT_FIT}"):
        load_backbone("some/model")
    (snapshot / "model.safetensors").unlink()
    index = {"metadata": {"total_size": 140 * 10**9}, "weight_map": {}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SidelightError, match=rf"{wordings.WEIGHTS_TAKE} 140\.0 GB"):
        load_backbone("some/model")


@pytest.fixture
def hub(hub_at, monkeypatch):
    """Says what answers in the hub's place: a handler of HTTP, or nothing."""
    monkeypatch.setattr("time.sleep", Mock(side_effect=AssertionError("waits to try again")))
    started = []

    def answer(status=None, **headers):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()

            do_HEAD = do_GET  # noqa: N815

            def log_message(self, *_):
                pass

        port = free_port()
        if status is not None:
            started.append(HTTPServer(("127.0.0.1", port), Handler))
            threading.Thread(target=started[-1].serve_forever, args=(0.01,), daemon=True).start()
        hub_at(f"http://127.0.0.1:{port}")

    yield answer
    for server in started:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("load", [load_backbone, read_model])
def test_hub_failures_raise_one_line_error_without_retries(hub, load):
    for answer, says in (
        ({}, "the Hugging Face hub cannot be reached"),
        ({"status": 404, "x_error_code": "RepoNotFound"}, "neither a local folder nor a model"),
        ({"status": 503}, "the Hugging Face hub cannot be reached"),
    ):
        hub(**answer)
        with pytest.raises(
            SidelightError,
            match="^" + wordings.CANNOT_LOAD.format(name="'some/typo'") + f" .*{says}",
        ) as caught:
            load("some/typo")
        assert "\n" not in str(caught.value)


def test_out_of_memory_error_names_exhausted_memory(folder, monkeypatch):
    monkeypatch.setattr(f"{BACKBONE}.find_device", torch.device)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _device: (3 * 10**9, 10**12))
    for error, room in (
        (torch.OutOfMemoryError(), "3.0 GB are free on cuda:1"),
        (MemoryError(), "GB are free on cpu"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you"), "GB are free on cpu"),
    ):
        monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", Mock(side_effect=error))
        with pytest.raises(SidelightError, match=room):
            load_backbone(folder, device="cuda:1")


def test_free_memory_respects_system_and_cgroup_limits(tmp_path):
    assert free_memory(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    4000 kB\n")
    assert free_memory(tmp_path) == 4000 * 1024
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.current").write_text("700000\n")
    (group / "memory.stat").write_text("anon 1\nfile 200000\n")
    (group / "memory.max").write_text("max\n")
    assert free_memory(tmp_path) == 4000 * 1024
    (group / "memory.max").write_text("1000000\n")
    assert free_memory(tmp_path) == 500_000


def test_unusable_cache_folder_raises_clear_error(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SIDELIGHT_CACHE", str(tmp_path / "file"))
    # Installed or not: what is unpacked is never looked at.
    monkeypatch.setattr("sidelight.models.smollm2.packaged_gguf", lambda: tmp_path / "model.gguf")
    assert cli("serve", "--port", "0") == 2
    assert "SIDELIGHT_CACHE to a writable folder" in capsys.readouterr().err
    # Nor has every user a home.
    monkeypatch.delenv("SIDELIGHT_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", Mock(side_effect=RuntimeError))
    with pytest.raises(SidelightError, match="SIDELIGHT_CACHE"):
        cache_root()


@pytest.fixture
def probe(tiny, tmp_path):
    return save_probe(untrained_probe(tiny, "toxicity"), tmp_path / "probe")


SERVE = "serve --port 0 --model {model} --probe {probe} "


@pytest.mark.parametrize(
    ("command", "remedy"),
    [
        (SERVE + "--probe {probe}", "distinct names, got: toxicity, toxicity"),
        (SERVE + "--api-keys-file {folder}/nowhere", "Cannot read the keys in"),
        (SERVE + "--admin-keys-file {keys}", "is not 'ID KEY'"),
        (SERVE + "--policy {keys}", "is not TOML"),
        (SERVE + "--device gpu", "no device 'gpu' on this machine. Did you mean 'cpu'?"),
        (SERVE + "--device cuda:99", "no device 'cuda:99' on this machine"),
        (SERVE + "--device meta", "no device 'meta' on this machine"),
        (
            "serve --port 0 --model {folder}/nowhere --probe {probe}",
            "Cannot load '{folder}/nowhere'",
        ),
        # A model that its probe names is as wrong.
        ("serve --probe {moved}", "Cannot load '/moved/away'"),
        ("train --data nowhere --out {folder}/o --device gpu", "no device 'gpu'"),
        ("train --data nowhere --out {folder}/o --model {folder}", "Cannot load '{folder}'"),
        ("eval {probe} --data nowhere --device gpu", "no device 'gpu'"),
        ("predict {probe} --data nowhere --model ./nowhere", "Cannot load './nowhere'"),
        ("recalibrate {probe} --data nowhere --device gpu", "no device 'gpu'"),
        ("parity {probe} --data nowhere --device gpu --engines transformers", "no device 'gpu'"),
        (
            "parity {probe} --data nowhere --engines transformers --engine-option a=1",
            "The engine transformers has no option",
        ),
        ("parity {probe} --data nowhere --quantised ./nowhere", "Cannot load './nowhere'"),
    ],
)
def test_model_independent_mistakes_fail_before_loading_data_or_model(
    command, remedy, folder, probe, tmp_path, monkeypatch, capsys
):
    named = replace(load_probe(probe).card.backbone, name="/moved/away")
    moved = save_probe(load_probe(probe).changed(backbone=named), tmp_path / "moved")
    keys = tmp_path / "keys"
    keys.write_text("one two three")
    monkeypatch.setattr("sidelight.engines.transformers.backbone.AutoConfig.from_pretrained", None)
    places = {"model": folder, "probe": probe, "moved": moved, "keys": keys, "folder": tmp_path}
    assert cli(*command.format(**places).split()) == 2
    error = capsys.readouterr().err
    assert remedy.format(**places) in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_signal_stops_server_with_documented_exit_code(
    folder, probe, number, code, monkeypatch, capfd
):
    started = threading.Event()
    monkeypatch.setattr(uvicorn.Server, "startup", _then(uvicorn.Server.startup, started.set))

    def stop():
        assert started.wait(60)
        os.kill(os.getpid(), number)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(stop)
        assert cli(*SERVE.format(model=folder, probe=probe).split()) == code
    log = capfd.readouterr().err
    assert f"Probes: {load_probe(probe).name} (score)\n" in log
    assert "Stopping: waiting up to 30 s for running requests: 0" in log
    # Its lines name neither what is served nor where.
    assert "uvicorn" not in log


@pytest.mark.parametrize(
    ("mode", "options", "is_warned"),
    [
        ("shadow", {}, True),
        ("shadow", {"api_key": "user"}, True),
        ("shadow", {"metrics_key": "scraper"}, False),
        ("shadow", {"admin_key": "admin"}, False),
        ("score", {}, False),
    ],
)
def test_unobservable_shadow_rule_triggers_warning(tiny, caplog, mode, options, is_warned):
    engine = TransformersEngine(tiny, [untrained_probe(tiny, "toxicity")])
    with in_process(engine, policy=Policy(input={"toxicity": Rule(mode)}), **options):
        warnings = [line for line in caplog.messages if "shadow" in line]
    assert len(warnings) == is_warned
    assert all("SIDELIGHT_METRICS_KEY" in line for line in warnings)


def _then(coroutine, call):
    async def both(*args, **kwargs):
        await coroutine(*args, **kwargs)
        call()

    return both


# Stops at the first of the imports that take seconds.
IMPORTING = """
import sys, time

class Watch:
    def find_spec(name, path=None, target=None):
        if name == "torch":
            print("importing", flush=True)
            time.sleep(60)

sys.meta_path.insert(0, Watch)
from sidelight.cli import main
main()
"""
NEW_NAMESPACE = ["unshare", "--pid", "--fork", "--kill-child"]


def can_unshare():
    return shutil.which("unshare") and not subprocess.run([*NEW_NAMESPACE, "true"]).returncode


@pytest.mark.parametrize("is_first", [False, True], ids=["any process", "process 1"])
def test_sigterm_ends_server_during_startup(is_first, probe):
    if is_first and not can_unshare():
        pytest.skip("'unshare --pid' is not allowed here, so no process can be the first")
    command = [sys.executable, "-c", IMPORTING, "serve", "--port", "0", "--probe", str(probe)]
    with subprocess.Popen(
        [*(NEW_NAMESPACE if is_first else []), *command], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout.readline() == "importing\n"
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(int(children[0]) if is_first else process.pid, signal.SIGTERM)
            assert process.wait(10) == 0
        finally:
            process.kill()


@needs_llama
@pytest.mark.slow
def test_gguf_server_restarts_after_kill_and_drains_on_sigterm(tmp_path, monkeypatch, capfd):
    # Long enough that the signal comes while it writes.
    config = LlamaConfig(**CONFIGS["llama"].to_dict() | {"max_position_embeddings": 4096})
    tiny = tiny_backbone(config)
    file = str(write_gguf(tiny.model, tmp_path / "tiny.gguf", "llama", tiny.tokenizer))
    monkeypatch.setenv("SIDELIGHT_CACHE", str(tmp_path / "cache"))
    port = free_port()
    command = ["serve", "--model", file, "--port", str(port)]
    body = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "temperature": 0}

    def signal_in_answer(process, number):
        """The lines of an answer after the first, at which the signal is sent."""
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as http:
                wait_until_ready(http)
                with http.stream(
                    "POST", "/v1/chat/completions", json={**body, "stream": True}
                ) as answer:
                    lines = answer.iter_lines()
                    assert next(lines).startswith("data: ")
                    os.kill(process, number)
                    return [*lines]
        except BaseException:
            os.kill(process, number)
            raise

    with (
        subprocess.Popen([sys.executable, "-m", "sidelight", *command]) as killed,
        pytest.raises(httpx.RemoteProtocolError),
    ):
        signal_in_answer(killed.pid, signal.SIGKILL)
    with ThreadPoolExecutor(1) as pool:
        lines = pool.submit(signal_in_answer, os.getpid(), signal.SIGTERM)
        assert cli(*command) == 0
        assert lines.result()[-2] == "data: [DONE]"
    assert "Traceback" not in capfd.readouterr().err
