"""The check of a GPU: sections one after the other, each in a process of its own, and a report.

A section that fails, hangs or crashes loses no other, and what has a result is not measured again.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
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
from sidelight_lab.bench.gpu_sections import Setting
from sidelight_lab.bench.measurement import Range, table
from sidelight_lab.environment import environment

# Of a probability in float32.
PARITY_ERROR = 1e-4
_READOUTS = (0, 1, 10, 100)
_GIB = 2**30
# A section is given up after these seconds.
_PATIENCE_S = 600

# By name, the arguments of the function of ``gpu_sections.SECTIONS`` that the name begins with.
# ``runner`` is one of vLLM's two model runners; without it, the second if that gave right verdicts.
CHECK: Mapping[str, Mapping[str, Any]] = {
    "graphs": {},
    "reference": {},
    **{
        f"parity: runner {runner}, {'eager' if eager else 'graphs'}": {
            "eager": eager,
            "runner": runner,
        }
        for runner in (1, 2)
        for eager in (True, False)
    },
    **{f"serving: {count} readouts": {"readouts": count} for count in _READOUTS},
}


def run_check(
    folder: Path,
    *,
    model: str | None = None,
    engine_option: Mapping[str, Any] | None = None,
    only: Sequence[str] = (),
) -> bool:
    """Runs the sections that have no result yet; returns whether all in the report passed.

    Writes ``gpu.json`` and ``gpu.md`` after each section, and its log to ``logs``.

    Args:
        folder: Of the report.
        model: As ``Setting``.
        engine_option: As ``Setting``.
        only: Beginnings of the names of sections; empty for all.

    Raises:
        SidelightError: A name is unknown, or the folder has a report of another machine, other
            versions or other settings.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = _fitting_shape(device)
    files = str((folder / "files").absolute())
    setting = Setting(device, files, model, shape, dict(engine_option or {}))
    machine = environment()
    conditions = {
        "device": machine["gpus"][0] if device == "cuda" else machine["processor"],
        "is a GPU": device == "cuda",
        "cuda": machine["cuda"],
        "python": machine["python"],
        **machine["packages"],
        "model": model,
        "shape": shape,
        "engine options": json.dumps(setting.engine_option, sort_keys=True),
    }
    results = _earlier_results(folder, conditions)
    chosen = [name for name in CHECK if name.startswith(tuple(only) or "")]
    if not chosen:
        raise SidelightError(f"No section begins with {', '.join(only)}: {'; '.join(CHECK)}.")
    for number, name in enumerate(chosen, start=1):
        line = f"[{number}/{len(chosen)}] {name}"
        if "result" in results.get(name, {}):
            click.echo(f"{line}: has a result", err=True)
            continue
        click.echo(f"{line} ...", err=True)
        is_right = passed("parity", results.get("parity: runner 2, graphs", {}))
        arguments = {"runner": 2 if is_right else 1, **CHECK[name]}
        results[name] = outcome = _run(name, setting, folder, **arguments)
        write_json(folder / "gpu.json", {"conditions": conditions, "sections": results})
        write_text(folder / "gpu.md", report(conditions, results))
        click.echo(f"{line}: {_told(name, outcome)} ({outcome['seconds']:.0f} s)", err=True)
    return all(passed(name, outcome) for name, outcome in results.items())


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
            f"{folder} has a report under other conditions ({', '.join(changed)}). Remove it, or "
            "name another folder with --out."
        )
    return earlier["sections"]


def _run(
    name: str, setting: Setting, folder: Path, *, runner: int, **arguments: Any
) -> dict[str, Any]:
    """Its seconds, with its result or its error."""
    setting.path.mkdir(parents=True, exist_ok=True)
    result = setting.path / "result.json"
    result.unlink(missing_ok=True)
    log = folder / "logs" / f"{name.replace(':', '').replace(' ', '-')}.log"
    log.parent.mkdir(exist_ok=True)
    order = {
        "section": name.partition(":")[0],
        "setting": asdict(setting),
        "arguments": arguments,
        "result": str(result),
    }
    variables = {**_variables(setting), "VLLM_USE_V2_MODEL_RUNNER": str(runner - 1)}
    start, error = perf_counter(), None
    with log.open("wb") as written:
        process = subprocess.Popen(
            [sys.executable, "-m", "sidelight_lab.bench.gpu_sections", json.dumps(order)],
            env={**os.environ, **variables}, stdout=written, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            error = f"It took over {_PATIENCE_S} s."
        finally:
            # Also the processes of vLLM that it may have left behind.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    seconds = round(perf_counter() - start, 1)
    if result.exists():
        return {"seconds": seconds, "result": json.loads(result.read_text("utf-8"))}
    return {"seconds": seconds, "error": error or _said(log), "log": str(log.relative_to(folder))}


def _said(log: Path) -> str:
    """The last error in a log, and the line behind it, which may have the reason."""
    lines = [line.strip() for line in log.read_text("utf-8", errors="replace").split("\n")]
    last = max((i for i, line in enumerate(lines) if "Error: " in line), default=None)
    return "It crashed." if last is None else " ".join(lines[last : last + 2])[:300].strip()


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


def passed(name: str, outcome: Mapping[str, Any]) -> bool:
    """Whether a section has a result, and one that is right."""
    result = outcome.get("result")
    if result is None:
        return False
    if name == "graphs":
        return result["difference"] == 0
    if name.startswith("parity"):
        return max(result["first_pass"], result["second_pass"]) <= PARITY_ERROR
    return True


def _told(name: str, outcome: Mapping[str, Any]) -> str:
    """What came of a section, in a line."""
    if "error" in outcome:
        return f"failed: {outcome['error']}"
    result, verdict = outcome["result"], "passed" if passed(name, outcome) else "NOT passed"
    if name == "graphs":
        how = "replayed with other inputs" if result["is_captured"] else "called, not captured"
        return f"{verdict}: {how}, largest difference {result['difference']:.1e}"
    if name.startswith("parity"):
        first, second = result["first_pass"], result["second_pass"]
        return f"{verdict}: largest difference {first:.1e}, from the cache {second:.1e}"
    return "measured"


def report(conditions: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    parts = ["# Probes inside vLLM on this machine"]
    if not conditions["is a GPU"]:
        parts.append(
            "**This is not a GPU result.** There is no GPU here: the same sections ran with tiny "
            "sizes on a CPU, without captured graphs, to try out the check itself."
        )
    shown = {name: value for name, value in conditions.items() if value is not None}
    parts.append(", ".join(f"{name} {value}" for name, value in shown.items()))
    lines = [
        (name, f"{outcome['seconds']:.0f}", _told(name, outcome))
        for name, outcome in results.items()
    ]
    parts.append(table("Sections", ("section", "seconds", "result"), lines))
    parts.append(
        f"Parity passes if no probability in float32 differs by more than {PARITY_ERROR:g}."
    )
    served = {
        count: results[name]["result"]["ms"]
        for count in _READOUTS
        if "result" in results.get(name := f"serving: {count} readouts", {})
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
        title = f"Serving a random model of the shape {conditions['shape']}: ms of a prefill, and "
        parts.append(table(f"{title}ms per token", ("readouts", "work", "ms", "% added"), cells))
    return "\n\n".join(parts) + "\n"
