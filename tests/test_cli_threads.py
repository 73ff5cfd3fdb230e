"""The command line's threads sleep while they wait, and are no more than the CPU quota gives."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sidelight.cli import threads
from sidelight.cli.threads import cpu_quota, limit_threads

# Prints what the environment says at the moment when torch is first imported.
AT_TORCHS_IMPORT = """
import os, sys
from pathlib import Path

class Watch:
    def find_spec(name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"), os.environ.get("OMP_NUM_THREADS"))
            raise KeyboardInterrupt

sys.meta_path.insert(0, Watch)
import sidelight.cli.threads
from sidelight.cli import main
sidelight.cli.threads.ROOT = Path(sys.argv.pop(1))
main()
"""


def put(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


HALF_A_CPU = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}


@pytest.mark.slow
def test_threads_are_limited_before_torch_is_imported(tmp_path: Path):
    usual = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    said = subprocess.run(
        [sys.executable, "-c", AT_TORCHS_IMPORT, str(put(tmp_path, HALF_A_CPU)), "env"],
        env=usual,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=False,
    ).stdout.splitlines()
    assert said[0] == "PASSIVE 1"


@pytest.mark.parametrize(
    ("chosen", "settled"),
    [
        ({}, ("PASSIVE", "1")),
        # What the user has set wins.
        ({"OMP_WAIT_POLICY": "ACTIVE", "OMP_NUM_THREADS": "2"}, ("ACTIVE", "2")),
    ],
)
def test_threads_sleep_while_they_wait_and_keep_to_the_quota(
    tmp_path: Path,
    chosen: dict[str, str],
    settled: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(threads, "ROOT", put(tmp_path, HALF_A_CPU))
    monkeypatch.setattr(os, "environ", dict(chosen))
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    limit_threads()
    assert (os.environ.get("OMP_WAIT_POLICY"), os.environ.get("OMP_NUM_THREADS")) == settled


def version_1(quota: int) -> dict[str, str]:
    return {
        "proc/self/cgroup": "4:cpu,cpuacct:/job\n3:cpuset:/job\n0::/\n",
        "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": f"{quota}\n",
        "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000\n",
    }


# Of the process's own group and of those above it, the smallest counts.
NESTED = {
    "proc/self/cgroup": "0::/pod/box\n",
    "sys/fs/cgroup/pod/box/cpu.max": "max 100000\n",
    "sys/fs/cgroup/pod/cpu.max": "300000 100000\n",
    "sys/fs/cgroup/other/cpu.max": "100000 100000\n",
}


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        (HALF_A_CPU, 1),
        ({**HALF_A_CPU, "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({**HALF_A_CPU, "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),
        # A container may see its own group as the root.
        ({**HALF_A_CPU, "proc/self/cgroup": "0::/docker/4f2a\n"}, 1),
        (NESTED, 3),
        (version_1(250000), 3),
        (version_1(-1), None),
    ],
)
def test_the_quota_is_the_control_groups(tmp_path: Path, files: dict[str, str], quota: int | None):
    assert cpu_quota(put(tmp_path, files)) == quota
