"""Plants faults in the product and counts how many the tests catch: `make mutants`.

    .venv/mutants/bin/python .ci/mutants.py sample FAULTS     a seeded sample, as one patch a fault
    .venv/bin/python .ci/mutants.py run FAULTS [--out FILE]   which of them the tests catch

The operators are cosmic-ray's. A fault is tried with the test files of its part, in their order,
until a test fails. A run goes on where it was stopped. A patch that does not apply is gone.
"""

import argparse
import ast
import difflib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PRODUCT = "src/sidelight"
SOURCES = ("src", *(f"packages/{name}/src" for name in ("lab", "llama", "vllm")))
# How many faults of each part, about as its weight in what a verdict rests on; where they are
# planted, and the tests that have to catch them.
AREAS = {
    "mechanisms": (
        20,
        ["probes/mechanisms"],
        ["mechanisms", "bank", "explanation", "training", "spans"],
    ),
    "bank": (
        12,
        ["probes/bank.py"],
        ["bank", "mechanisms", "explanation", "engine_contract", "engine_verdicts", "vllm_plugin"],
    ),
    "policy": (
        18,
        ["policy"],
        [
            "enforcement",
            "second_stage",
            "policy_*",
            "policies",
            "disclosure",
            "redaction",
            "server_audit",
            "server_metrics",
        ],
    ),
    "prompts": (
        16,
        [
            f"models/{x}.py"
            for x in ("control_tokens", "conversation", "encode", "invisible", "turns")
        ],
        [
            "prompts",
            "invisible",
            "turns*",
            "chat_families",
            "backbones",
            "extraction",
            "engine_text",
            "engine_contract",
        ],
    ),
    "server": (
        48,
        ["server"],
        [
            "server_*",
            "second_stage",
            "disclosure",
            "redaction",
            "polic*",
            "admin_probes",
            "playground_api",
            "start",
        ],
    ),
    "slots": (8, ["packages/vllm/src/sidelight_vllm/slots.py"], ["vllm_*"]),
    "training": (
        24,
        ["training", "classifier.py", "estimator.py", "scoring.py"],
        [
            "training",
            "fit",
            "keeping",
            "depth",
            "training_cost",
            "contexts",
            "recalibration",
            "classifier",
            "estimator",
            "turn_verdicts",
            "spans",
            "guard_command",
        ],
    ),
}
# Faults that any call shows, or none.
TRIVIAL = re.compile(r"NoOp|Decorator|Exception|_(RShift|LShift|BitOr|BitAnd|BitXor|Pow|Mod)")
# Of the processor; a fault that hangs is caught after so many seconds on the clock.
LONGEST_S, HANGS_S = 240, 900
# Exit codes beyond those of pytest.
GONE, BROKEN = 90, 91


def sample(faults: Path, seed: int) -> None:
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator, operator_names

    operators = {
        name: get_operator(name)()
        for name in operator_names()
        if not get_operator(name).arguments() and not TRIVIAL.search(name)
    }
    chosen = random.Random(seed)
    rows: list[dict] = []
    for area, (count, places, _) in AREAS.items():
        # Paths in the core are relative to its folder.
        starts = [ROOT if place.startswith("packages/") else ROOT / PRODUCT for place in places]
        paths = [start / place for start, place in zip(starts, places, strict=True)]
        files = [f for path in paths for f in (sorted(path.rglob("*.py")) or [path])]
        # Lines are drawn, not changes: a line with many operators weighs no more than others.
        changes: dict[tuple[Path, int], list[tuple[str, int]]] = {}
        for file in files:
            source = file.read_text()
            nodes, dull = [*ast_nodes(get_ast(source))], _dull_places(source)
            for name, operator in operators.items():
                places_of = (p for node in nodes for p in operator.mutation_positions(node))
                for occurrence, (start, _) in enumerate(places_of):
                    if not any(first <= start < last for first, last in dull):
                        changes.setdefault((file, start[0]), []).append((name, occurrence))
        lines = sorted(changes)
        chosen.shuffle(lines)
        drawn = 0
        for file, line in lines:
            if drawn == count:
                break
            name, occurrence = chosen.choice(changes[file, line])
            source, relative = file.read_text(), str(file.relative_to(ROOT))
            old = source.splitlines(keepends=True)
            mutated = mutate_code(source, operators[name], occurrence)
            if not _compiles(mutated):
                continue
            drawn += 1
            new = mutated.splitlines(keepends=True)
            patch = "".join(difflib.unified_diff(old, new, f"a/{relative}", f"b/{relative}"))
            change = [row[1:].strip() for row in patch.splitlines()[3:] if row[0] == "+"]
            rows.append(
                {
                    "area": area,
                    "file": relative,
                    "line": line,
                    "operator": name.split("/")[-1],
                    "change": " ".join(change),
                    "patch": patch,
                }
            )
        print(f"{area}: {drawn} of {len(lines)} lines", flush=True)
    faults.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def _compiles(source: str) -> bool:
    """Without a warning either, such as that of ``is`` beside a literal: pytest raises it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            compile(source, "", "exec")
        except SyntaxError:
            return False
    return True


def _dull_places(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where annotations, decorators, docstrings and ``strict=True`` stand: not behaviour."""
    dull: list[ast.AST] = []
    for node in ast.walk(ast.parse(source)):
        dull += getattr(node, "decorator_list", [])
        dull += filter(None, (getattr(node, name, None) for name in ("annotation", "returns")))
        if isinstance(node, ast.keyword) and node.arg == "strict":
            dull.append(node)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            dull.append(node)
    return [((n.lineno, n.col_offset), (n.end_lineno, n.end_col_offset)) for n in dull]


def run(faults: Path, out: Path, workers: int) -> None:
    every = [json.loads(line) for line in faults.read_text().splitlines()]
    known = {json.loads(line)["patch"] for line in out.open()} if out.exists() else set()
    left = [fault for fault in every if fault["patch"] not in known]
    # Without a fault the tests of each part pass, or what they catch says nothing.
    nothing = {"file": "", "line": 0, "change": "nothing", "patch": ""}
    areas = dict.fromkeys(fault["area"] for fault in left)
    left = [nothing | {"area": area} for area in areas] + left
    _import_libraries()
    running: dict[int, tuple[dict, Path, float]] = {}
    while left or running:
        while left and len(running) < workers:
            fault = left.pop(0)
            folder = Path(tempfile.mkdtemp(prefix="mutant-"))
            pid = os.fork()
            if not pid:
                os.setpgid(0, 0)
                os._exit(_exit_code(fault, folder))
            running[pid] = fault, folder, time.monotonic()
        pid, status = os.waitpid(-1, os.WNOHANG)
        for overdue, (_, _, start) in running.items():
            if time.monotonic() - start > HANGS_S:
                os.killpg(overdue, signal.SIGKILL)
        if not pid:
            time.sleep(0.1)
            continue
        fault, folder, start = running.pop(pid)
        text = (
            (folder / "output").read_text(errors="replace") if (folder / "output").exists() else ""
        )
        shutil.rmtree(folder, ignore_errors=True)
        code = os.waitstatus_to_exitcode(status)
        # Of 1 a test has failed; 2 or 4 an import that failed, and a signal ends what hangs.
        result = {0: "survived", GONE: "gone", 1: "caught", 2: "caught", 4: "caught"}.get(code, "")
        if not result and code > 0:
            sys.exit(f"pytest could not run ({code}): {text[-2000:]}")
        result = result or "caught"
        by = re.findall(r"^(?:FAILED|ERROR) (\S+)", text, re.MULTILINE)[:1]
        if not fault["patch"]:
            if code:
                sys.exit(f"The tests of {fault['area']} fail without a fault: {text[-3000:]}")
            print(f"{fault['area']}: {time.monotonic() - start:.0f} s without a fault", flush=True)
            continue
        row = fault | {"result": result, "code": code, "by": by, "s": time.monotonic() - start}
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{result:9} {fault['file']}:{fault['line']} {fault['change'][:70]}", flush=True)
    report(out)


def _exit_code(fault: dict, folder: Path) -> int:
    try:
        return _try(fault, folder)
    except BaseException:  # noqa: BLE001 - the process must end with a code of its own
        traceback.print_exc(file=sys.stderr)
        return BROKEN


def _try(fault: dict, folder: Path) -> int:
    """In a process of its own: the tests' exit code."""
    for place in SOURCES:
        shutil.copytree(ROOT / place, folder / place)
    if fault["patch"]:
        command = ["patch", "-p1", "--batch", "--quiet"]
        applied = subprocess.run(command, input=fault["patch"], text=True, cwd=folder, check=False)
        if applied.returncode:
            return GONE
    patterns = AREAS[fault["area"]][2]
    globs = [f"{start}tests/test_{name}.py" for name in patterns for start in ("", "packages/*/")]
    found = [sorted(ROOT.glob(pattern)) for pattern in globs]
    tests = dict.fromkeys(str(file) for files in found for file in files)
    if fault["patch"]:
        resource.setrlimit(resource.RLIMIT_CPU, (LONGEST_S, LONGEST_S))
    copies = [str(folder / place) for place in SOURCES]
    sys.path[:0] = copies
    os.environ["PYTHONPATH"] = os.pathsep.join(copies)
    with (folder / "output").open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import pytest

    os.chdir(ROOT)
    # The libraries that are imported already cannot have their assertions rewritten.
    filter_warning = "ignore::pytest.PytestAssertRewriteWarning"
    # A socket that a fault leaves open is noticed when pytest has ended.
    plugins = ["-p", "no:cacheprovider", "-p", "no:unraisableexception"]
    options = ["-W", filter_warning, "-x", "-q", *plugins, f"--timeout={HANGS_S}"]
    return int(pytest.main([*options, f"--basetemp={folder / 'tmp'}", *tests]))


def _import_libraries() -> None:
    import fastapi  # noqa: F401
    import httpx  # noqa: F401
    import hypothesis  # noqa: F401
    import openai  # noqa: F401
    import pytest  # noqa: F401
    import scipy.optimize  # noqa: F401
    import sklearn.linear_model  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401
    import uvicorn  # noqa: F401

    torch.set_num_threads(1)


def report(out: Path) -> None:
    rows = [json.loads(line) for line in out.open()]
    print(f"{'':12} {'caught':>7} {'of':>5}   survived, gone")
    for area in [*AREAS, None]:
        counts = Counter(row["result"] for row in rows if area in (row["area"], None))
        planted = sum(counts.values()) - counts["gone"]
        rest = f"{counts['survived']}, {counts['gone']}"
        print(f"{area or 'all':12} {counts['caught']:7} {planted:5}   {rest}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=["sample", "run", "report"])
    parser.add_argument("faults", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("mutants.jsonl"))
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.command == "sample":
        sample(arguments.faults, arguments.seed)
    elif arguments.command == "run":
        run(arguments.faults, arguments.out, arguments.workers)
    else:
        report(arguments.faults)


if __name__ == "__main__":
    main()
