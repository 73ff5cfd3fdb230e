"""The check of a GPU: sections one after the other, each in a process of its own, and a report.

A section that fails, hangs or crashes loses no other, and what has a result is not measured again.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import click
import torch

from sidelight.errors import SidelightError
from sidelight.storage import write_json, write_text
from sidelight_lab.bench.gpu_sections import SHAPES, Setting
from sidelight_lab.bench.measurement import table
from sidelight_lab.environment import environment

# Of a probability in float32.
PARITY_ERROR = 1e-4
_READOUTS = (0, 1, 10, 100)
_GIB = 2**30
# A section is given up after this many times its estimate, and after these seconds at least.
_PATIENCE, _PATIENCE_S = 4, 300


@dataclass(frozen=True)
class Section:
    """One measurement.

    Attributes:
        function: Its name in ``gpu_sections.SECTIONS``.
        estimate_s: Seconds on a GPU.
        environment: Variables of its process.
    """

    name: str
    function: str
    estimate_s: int
    arguments: Mapping[str, Any] = field(default_factory=dict[str, Any])
    environment: Mapping[str, str] = field(default_factory=dict[str, str])


def sections(*, serves_with_v2: bool = False) -> list[Section]:
    """All of them, in their order."""
    found = [Section("graphs", "graphs", 20), Section("reference", "reference", 60)]
    for runner in ("1", "2"):
        for eager in (True, False):
            kind = "eager" if eager else "graphs"
            own = {"VLLM_USE_V2_MODEL_RUNNER": str(int(runner) - 1)}
            name = f"parity: runner {runner}, {kind}"
            found.append(Section(name, "parity", 60 if eager else 90, {"eager": eager}, own))
    own = {"VLLM_USE_V2_MODEL_RUNNER": str(int(serves_with_v2))}
    for readouts in _READOUTS:
        name = f"serving: {readouts} readouts"
        found.append(Section(name, "serving", 120, {"readouts": readouts}, own))
    return found


def run_check(
    folder: Path,
    *,
    model: str | None = None,
    shape: str | None = None,
    engine_option: Mapping[str, Any] | None = None,
    only: Sequence[str] = (),
    again: bool = False,
) -> bool:
    """Runs the sections that have no result yet; returns whether all in the report passed.

    Writes ``gpu.json`` and ``gpu.md`` after each section, and its log to ``logs``.

    Args:
        folder: Of the report.
        model: As ``Setting``.
        shape: As ``Setting``; None takes the largest that the GPU has room for.
        engine_option: As ``Setting``.
        only: Beginnings of the names of sections; empty for all.
        again: Measures everything again.

    Raises:
        SidelightError: A name is unknown, or the folder has a report of another machine, other
            versions or other settings.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = shape or _fitting_shape(device)
    if shape not in SHAPES:
        raise SidelightError(f"There is no shape '{shape}'; there are {', '.join(SHAPES)}.")
    files = str((folder / "files").absolute())
    setting = Setting(device, files, model, shape, dict(engine_option or {}))
    found = environment()
    conditions = {
        "device": found["gpus"][0] if device == "cuda" else found["processor"],
        "is a GPU": device == "cuda",
        "cuda": found["cuda"],
        "python": found["python"],
        **found["packages"],
        "model": model,
        "shape": shape,
        "engine options": json.dumps(setting.engine_option, sort_keys=True),
    }
    results = {} if again else _earlier_results(folder, conditions)
    chosen = [one.name for one in sections() if one.name.startswith(tuple(only) or "")]
    if not chosen:
        names = ", ".join(one.name for one in sections())
        raise SidelightError(f"No section begins with {', '.join(only)}. There are: {names}.")
    for number, name in enumerate(chosen, start=1):
        # Serving is timed with the newer runner if that gave the right verdicts.
        new = results.get("parity: runner 2, graphs", {})
        section = next(
            one for one in sections(serves_with_v2=_passed("parity", new)) if one.name == name
        )
        line = f"[{number}/{len(chosen)}] {name}"
        if "result" in results.get(name, {}):
            click.echo(f"{line}: has a result (--again measures it again)", err=True)
            continue
        click.echo(f"{line}: about {section.estimate_s} s on a GPU ...", err=True)
        results[name] = _run(section, setting, folder)
        write_json(folder / "gpu.json", {"conditions": conditions, "sections": results})
        write_text(folder / "gpu.md", report(conditions, results))
        click.echo(f"{line}: {_line(section, results[name])}", err=True)
    return all(_passed(_function(name), found) for name, found in results.items())


def _fitting_shape(device: str) -> str:
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
            f"{folder} has a report under other conditions ({', '.join(changed)}). Name another "
            "folder with --out, or give --again."
        )
    return earlier["sections"]


def _run(section: Section, setting: Setting, folder: Path) -> dict[str, Any]:
    """Its seconds, with its result or its error."""
    setting.path.mkdir(parents=True, exist_ok=True)
    outcome = setting.path / "result.json"
    outcome.unlink(missing_ok=True)
    log = folder / "logs" / f"{section.name.replace(':', '').replace(' ', '-')}.log"
    log.parent.mkdir(exist_ok=True)
    order = {
        "section": section.function,
        "setting": asdict(setting),
        "arguments": section.arguments,
        "result": str(outcome),
    }
    variables = {**os.environ, **_environment(setting), **section.environment}
    start = perf_counter()
    limit = max(_PATIENCE_S, _PATIENCE * section.estimate_s)
    with log.open("wb") as written:
        process = subprocess.Popen(
            [sys.executable, "-m", "sidelight_lab.bench.gpu_sections", json.dumps(order)],
            env=variables, stdout=written, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            process.wait(limit)
            error = None
        except subprocess.TimeoutExpired:
            error = f"It took over {limit} s."
        finally:
            _end(process)
    seconds = round(perf_counter() - start, 1)
    if outcome.exists():
        return {"seconds": seconds, "result": json.loads(outcome.read_text("utf-8"))}
    return {"seconds": seconds, "error": error or _said(log), "log": str(log.relative_to(folder))}


def _said(log: Path) -> str:
    """The last error in a log, and the line behind it, which may have the reason."""
    lines = [line.strip() for line in log.read_text("utf-8", errors="replace").split("\n")]
    last = max((i for i, line in enumerate(lines) if "Error: " in line), default=None)
    return "It crashed." if last is None else " ".join(lines[last : last + 2])[:300].strip()


def _environment(setting: Setting) -> dict[str, str]:
    # Triton's attention would multiply float32 numbers with the ten bits of TF32.
    own = {"TRITON_F32_DEFAULT": "ieee"}
    if setting.is_gpu:
        return own
    defaults = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "TRITON_INTERPRET": "1",
    }
    return {**own, **{name: os.environ.get(name, value) for name, value in defaults.items()}}


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Ends the section's process, and those of vLLM that it may have left behind."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _function(name: str) -> str:
    return name.partition(":")[0]


def _passed(function: str, found: Mapping[str, Any]) -> bool:
    result = found.get("result")
    if result is None:
        return False
    match function:
        case "graphs":
            return result["difference"] == 0
        case "parity":
            return max(result["first_pass"], result["second_pass"]) <= PARITY_ERROR
        case _:
            return True


def _line(section: Section, found: Mapping[str, Any]) -> str:
    if "error" in found:
        return f"failed after {found['seconds']:.0f} s: {found['error']}"
    verdict = "passed" if _passed(section.function, found) else "measured, and did NOT pass"
    return f"{verdict} in {found['seconds']:.0f} s"


def report(conditions: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    return "\n\n".join(_parts(conditions, results)) + "\n"


def _parts(conditions: Mapping[str, Any], results: Mapping[str, Any]) -> Iterator[str]:
    yield "# Probes inside vLLM on this machine"
    if not conditions["is a GPU"]:
        yield (
            "**This is not a GPU result.** There is no GPU here: the same sections ran with tiny "
            "sizes on a CPU, without captured graphs, to try out the check itself."
        )
    yield ", ".join(f"{name} {value}" for name, value in conditions.items() if value is not None)
    lines = [
        (name, f"{found['seconds']:.0f}", found.get("error") or _summary(_function(name), found))
        for name, found in results.items()
    ]
    yield table("Sections", ("section", "seconds", "result"), lines)
    yield f"Parity passes if no probability in float32 differs by more than {PARITY_ERROR:g}."
    served = {
        count: results[name]["result"]["ms"]
        for count in _READOUTS
        if "result" in results.get(name := f"serving: {count} readouts", {})
    }
    if served:
        yield _serving_table(conditions["shape"], served)


def _summary(function: str, found: Mapping[str, Any]) -> str:
    result = found["result"]
    verdict = "passed" if _passed(function, found) else "NOT passed"
    match function:
        case "graphs":
            how = "replayed with other inputs" if result["is_captured"] else "called, not captured"
            return f"{verdict}: {how}, largest difference {result['difference']:.1e}"
        case "parity":
            passes = result["first_pass"], result["second_pass"]
            return f"{verdict}: largest difference {passes[0]:.1e}, from the cache {passes[1]:.1e}"
        case _:
            return "measured"


def _serving_table(shape: str, served: Mapping[int, Mapping[str, Sequence[float]]]) -> str:
    cells = [
        (
            count, work, f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})",
            f"{100 * (median(values) / median(served[0][work]) - 1):+.1f}" if 0 in served else "",
        )
        for count, own in served.items()
        for work, values in own.items()
    ]  # fmt: skip
    title = f"Serving a random model of the shape {shape}: ms of a prefill, and ms per token"
    return table(title, ("readouts", "work", "ms", "% added"), cells)
