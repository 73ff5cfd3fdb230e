"""Files that are whole or as they were, and folders that are left as they were."""

import os
import signal
import time
from multiprocessing import get_context
from pathlib import Path

import pytest

from sidelight.errors import SidelightError
from sidelight.storage import check_folder, replacing, write_json, write_text


def die_while_writing(path: Path) -> None:
    with replacing(path) as partial:
        partial.write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_or_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "table.json"
    write_json(path, {"rows": 1})
    before = path.read_bytes()
    process = get_context("fork").Process(target=die_while_writing, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert path.read_bytes() == before
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(path, {"rows": b"half"})
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half \udcff")
    assert path.read_bytes() == before


def test_a_write_removes_what_a_killed_one_left_an_hour_ago(tmp_path):
    path = tmp_path / "[1].md"
    stale, fresh = (path.with_name(f"{path.name}.{name}.partial") for name in ("old", "new"))
    for left in (stale, fresh, path.with_name("other.md.old.partial")):
        left.write_text("half")
        if left != fresh:
            os.utime(left, (0, time.time() - 4000))
    write_text(path, "whole")
    assert {left.name for left in tmp_path.iterdir()} == {
        path.name,
        fresh.name,
        "other.md.old.partial",
    }


def test_a_write_makes_its_folder_and_leaves_nothing_beside(tmp_path):
    path = tmp_path / "new" / "folder" / "report.md"
    write_text(path, "é\n")
    assert path.read_bytes() == b"\xc3\xa9\n"
    assert list(path.parent.iterdir()) == [path]


def test_checking_a_folder_leaves_none_and_refuses_one_below_a_file(tmp_path):
    (tmp_path / "old").mkdir()
    check_folder(tmp_path / "old" / "new" / "newer")
    check_folder(tmp_path / "old")
    assert list(tmp_path.rglob("*")) == [tmp_path / "old"]
    (tmp_path / "file").write_text("")
    with pytest.raises(SidelightError, match="Name another folder"):
        check_folder(tmp_path / "file" / "folder")
