"""Files that are whole or as they were, and folders that are left as they were."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import get_context
from pathlib import Path

import pytest

import wordings
from sidelight.errors import SidelightError
from sidelight.storage import (
    check_folder,
    holding,
    remove_unused,
    replacing,
    write_json,
    write_text,
)


def die_while_writing(path: Path) -> None:
    with replacing(path) as partial:
        partial.write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


def test_interrupted_write_preserves_old_file(tmp_path):
    path = tmp_path / "table.json"
    write_json(path, {"rows": 1})
    before = path.read_bytes()
    process = get_context("fork").Process(target=die_while_writing, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert path.read_bytes() == before
    with pytest.raises(TypeError, match=wordings.NOT_JSON):
        write_json(path, {"rows": b"half"})
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half \udcff")
    assert path.read_bytes() == before


def test_write_removes_only_its_stale_partial_files(tmp_path):
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


def test_write_creates_folder_and_leaves_no_temporary_files(tmp_path):
    path = tmp_path / "new" / "folder" / "report.md"
    write_text(path, "é\n")
    assert path.read_bytes() == b"\xc3\xa9\n"
    assert list(path.parent.iterdir()) == [path]


def test_check_folder_creates_nothing_and_rejects_paths_below_files(tmp_path):
    (tmp_path / "old").mkdir()
    check_folder(tmp_path / "old" / "new" / "newer")
    check_folder(tmp_path / "old")
    assert list(tmp_path.rglob("*")) == [tmp_path / "old"]
    (tmp_path / "file").write_text("")
    with pytest.raises(SidelightError, match=wordings.FOLDER_DIFFERS):
        check_folder(tmp_path / "file" / "folder")


def age(folder, seconds):
    for path in (folder, *folder.glob("*/")):
        os.utime(path, (time.time() - seconds,) * 2)


def test_folder_is_removed_only_when_no_process_holds_it(tmp_path):
    folder = tmp_path / "run"
    with holding(folder), holding(folder):
        (folder / "states").mkdir()
        assert not remove_unused(folder)
    with holding(folder):
        program = f"from sidelight.storage import *; print(remove_unused(Path({str(folder)!r})))"
        process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert process.stdout == "False\n"
    assert (folder / "states").is_dir()
    assert remove_unused(folder)
    assert not [*tmp_path.iterdir()]
    assert not remove_unused(folder)


def test_recently_modified_folder_is_not_removed(tmp_path):
    folder = tmp_path / "run"
    with holding(folder):
        (folder / "states").mkdir()
    age(folder, 100)
    assert not remove_unused(folder, idle_s=200)
    (folder / "states" / "new").write_text("")
    assert not remove_unused(folder, idle_s=50)
    age(folder, 100)
    assert remove_unused(folder, idle_s=50)


def test_holder_waiting_during_removal_gets_new_folder(tmp_path, monkeypatch):
    folder, began = tmp_path / "run", threading.Event()
    with holding(folder):
        (folder / "old").write_text("")

    def slowly(path, **_):
        began.set()
        time.sleep(0.1)
        remove(path)

    remove = shutil.rmtree
    monkeypatch.setattr("shutil.rmtree", slowly)
    remover = threading.Thread(target=remove_unused, args=(folder,))
    remover.start()
    began.wait()
    with holding(folder):
        (folder / "new").write_text("")
    remover.join()
    assert {path.name for path in folder.iterdir()} == {"new", "in-use.lock"}


def test_holding_propagates_errors(tmp_path):
    with pytest.raises(FileNotFoundError), holding(tmp_path / "run"):
        (tmp_path / "absent").read_text()
