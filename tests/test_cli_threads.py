"""The command line's threads sleep while they wait, and are no more than the CPU quota gives."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sidelight.cli.threads import cpu_quota

# Prints what the environment says at the moment when torch is first imported.
AT_TORCHS_IMPORT = """
import os, sys
from pathlib import Path

class Watch:
    def find_spec(name, path=None, target=None):
        if name == "torch":
            sys.meta_path.remove(Watch)
            print(os.environ.get("OMP_WAIT_POLICY"), os.environ.get("OMP_NUM_THREADS"))

sys.meta_path.insert(0, Watch)
import sidelight.cli.threads
from sidelight.cli import main
sidelight.cli.threads.ROOT = Path(sys.argv.pop(1))
main()
import torch
print(torch.get_num_threads())
"""


def put(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def at_torchs_import(root: Path, **chosen: str) -> tuple[str, int]:
    """What holds when ``sidelight env`` imports torch, and the threads that torch then takes."""
    usual = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    said = subprocess.run(
        [sys.executable, "-c", AT_TORCHS_IMPORT, str(root), "env"],
        env={**usual, **chosen},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    return said[0], int(said[-1])


HALF_A_CPU = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}


@pytest.mark.slow
def test_threads_sleep_while_they_wait_and_keep_to_the_quota(tmp_path: Path):
    assert at_torchs_import(put(tmp_path, HALF_A_CPU)) == ("PASSIVE 1", 1)


@pytest.mark.slow
def test_without_a_quota_the_number_of_threads_is_left_alone(tmp_path: Path):
    said, threads = at_torchs_import(tmp_path)
    assert said == "PASSIVE None"
    assert threads >= 1


@pytest.mark.slow
def test_what_the_user_has_set_wins(tmp_path: Path):
    chosen = {"OMP_WAIT_POLICY": "ACTIVE", "OMP_NUM_THREADS": "2"}
    assert at_torchs_import(put(tmp_path, HALF_A_CPU), **chosen) == ("ACTIVE 2", 2)


V1 = "4:cpu,cpuacct:/job\n3:cpuset:/job\n0::/\n"


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        (HALF_A_CPU, 1),
        ({**HALF_A_CPU, "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({**HALF_A_CPU, "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),
        ({**HALF_A_CPU, "sys/fs/cgroup/cpu.max": "400000 100000\n"}, 4),
        # Of the process's own group and of those above it, the smallest counts.
        (
            {
                "proc/self/cgroup": "0::/pod/box\n",
                "sys/fs/cgroup/pod/box/cpu.max": "max 100000\n",
                "sys/fs/cgroup/pod/cpu.max": "300000 100000\n",
                "sys/fs/cgroup/other/cpu.max": "100000 100000\n",
            },
            3,
        ),
        # A container may see its own group as the root.
        ({**HALF_A_CPU, "proc/self/cgroup": "0::/docker/4f2a\n"}, 1),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "250000\n",
                "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
    ],
)
def test_the_quota_is_the_control_groups(tmp_path: Path, files: dict[str, str], quota: int | None):
    assert cpu_quota(put(tmp_path, files)) == quota
