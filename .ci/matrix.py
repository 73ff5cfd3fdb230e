"""Runs the lanes of the matrix: outside worlds, and vLLM beyond what `make vllm` covers.

    .venv/bin/python .ci/matrix.py              every lane that has not passed at this commit
    .venv/bin/python .ci/matrix.py LANE ...     these lanes
    .venv/bin/python .ci/matrix.py --turn       the lane whose turn it is, by the number of commits

``matrix.md`` has a row for each lane: commit and date of its latest run, and the result. A run that
was stopped goes on with the lanes that are left. A release needs all of them at its commit.

Lanes of vLLM run in ``.venv-vllm``, on either of its model runners. Its newest version is unpacked
beside the installed one, and uses its dependencies. It has no build for CPUs yet, so its Python
runs over the installed libraries.
"""

import argparse
import os
import re
import subprocess
import sys
import zipfile
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from shutil import rmtree

ROOT = Path(__file__).resolve().parents[1]
REPORT = ROOT / "matrix.md"
MATRIX = "tests/matrix"
NEWEST = "vllm==0.33.0"


@dataclass(frozen=True)
class Lane:
    """Tests that are run together.

    Attributes:
        tests: Arguments of pytest.
        runner: vLLM's model runner, 1 or 2; 0: without vLLM.
        package: What to unpack of vLLM; "": the installed version.
        environment: More variables.
    """

    tests: list[str]
    runner: int = 0
    package: str = ""
    environment: dict[str, str] = field(default_factory=dict)


COMPILED = {"SIDELIGHT_COMPILED": "1"}
# What runners decide: which tokens a step runs, and where their states are.
RUNNERS = ("contract", "parity", "schedules", "redaction")
OF_RUNNERS = [f"packages/vllm/tests/inside/test_{name}.py" for name in RUNNERS]
LANES = {
    "browser": Lane([f"{MATRIX}/browser"]),
    "clients": Lane([f"{MATRIX}/clients"]),
    "examples": Lane([f"{MATRIX}/examples"]),
    "packages": Lane([f"{MATRIX}/packages"]),
    "lab": Lane([f"{MATRIX}/lab"]),
    "gguf": Lane([f"{MATRIX}/gguf"]),
    "vllm-clients": Lane([f"{MATRIX}/clients/test_client_tables.py"], runner=1),
    "vllm-features": Lane(
        [f"{MATRIX}/vllm/test_features.py", f"{MATRIX}/vllm/test_attacks.py"], runner=1
    ),
    "vllm-families-v1": Lane([f"{MATRIX}/vllm/test_families.py"], runner=1),
    "vllm-families-v2": Lane([f"{MATRIX}/vllm/test_families.py"], runner=2),
    "vllm-families-compiled": Lane(
        [f"{MATRIX}/vllm/test_families.py"], runner=1, environment=COMPILED
    ),
    "vllm-quantised": Lane([f"{MATRIX}/vllm/test_quantised.py"], runner=1),
    "vllm-newest-v1": Lane(["packages/vllm/tests/inside"], runner=1, package=NEWEST),
    "vllm-newest-v2": Lane(OF_RUNNERS, runner=2, package=NEWEST),
}


def run(lane: Lane) -> str:
    """Runs the lane's tests; returns "passed", "failed" or "skipped: ..."."""
    environment = {**os.environ, **lane.environment, "OMP_NUM_THREADS": "1"}
    python, options = ROOT / ".venv/bin/python", ["-n", "2", "--dist", "loadgroup"]
    if lane.runner:
        python = ROOT / ".venv-vllm/bin/python"
        if not (python.parent / "sidelight").exists():
            return "skipped: vLLM cannot be installed here"
        try:
            paths = [str(_unpacked(python, lane.package))] if lane.package else []
        except subprocess.CalledProcessError:
            return f"skipped: {lane.package} cannot be downloaded here"
        environment["VLLM_USE_V2_MODEL_RUNNER"] = str(int(lane.runner == 2))
        if lane.runner == 2:
            environment["TRITON_INTERPRET"] = "1"
            paths.append(str(ROOT / "packages/vllm/tests/triton_cpu"))
        paths += filter(None, [os.environ.get("PYTHONPATH")])
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        options += ["-p", "no:unraisableexception"]
    command = [str(python), "-m", "pytest", *options, *lane.tests]
    code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    return "failed" if code else "passed"


def _unpacked(python: Path, package: str) -> Path:
    """The folder of a version of vLLM, ready for ``PYTHONPATH``."""
    _, number = package.split("==")
    folder = python.parents[1] / "versions" / number
    if (folder / ".ready").exists():
        return folder
    download = [python, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, package]
    subprocess.run(download, check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(folder, [m for m in packed.namelist() if not m.endswith(".so")])
    wheel.unlink()
    (libraries,) = python.parents[1].glob("lib/python*/site-packages/vllm")
    for library in libraries.rglob("*.so"):
        place = folder / "vllm" / library.relative_to(libraries)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(library)
    for metadata in folder.glob("vllm-*.dist-info"):
        rmtree(metadata)
    # By this name vLLM tells that it runs on CPUs.
    metadata = folder / f"vllm-{number}+cpu.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}+cpu\n"
    )
    (folder / ".ready").touch()
    return folder


def git(*words: str) -> str:
    return subprocess.run(
        ["git", *words], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


def known() -> dict[str, tuple[str, str, str]]:
    """The commit, date and result of each lane in the report."""
    if not REPORT.exists():
        return {}
    rows = re.findall(r"^\| (\S+) \| (\S+) \| (\S+) \| (.+) \|$", REPORT.read_text(), re.MULTILINE)
    return {name: (commit, day, result) for name, commit, day, result in rows if name in LANES}


def note(name: str, commit: str, result: str) -> None:
    rows = {**known(), name: (commit, date.today().isoformat(), result)}
    lines = ["| lane | commit | date | result |", "|---|---|---|---|"]
    lines += [f"| {name} | {' | '.join(rows[name])} |" for name in LANES if name in rows]
    REPORT.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("lanes", nargs="*", metavar="LANE", help=", ".join(LANES))
    parser.add_argument("--turn", action="store_true", help="the lane whose turn it is")
    arguments = parser.parse_args()
    if unknown := {*arguments.lanes} - {*LANES}:
        parser.error(f"No such lane: {', '.join(unknown)}. There are {', '.join(LANES)}.")
    commit = git("rev-parse", "--short=12", "HEAD")
    names = arguments.lanes or [
        name for name in LANES if known().get(name, ("", "", ""))[::2] != (commit, "passed")
    ]
    if arguments.turn:
        names = [[*LANES][int(git("rev-list", "--count", "HEAD")) % len(LANES)]]
    results: list[str] = []
    for name in names:
        print(f"==> {name}", flush=True)
        results.append(run(LANES[name]))
        note(name, commit, results[-1])
        print(f"{name}: {results[-1]}", flush=True)
    sys.exit("failed" in results)


if __name__ == "__main__":
    main()
