"""The documentation as a site: it builds strictly, without the network, and loads nothing from
elsewhere.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sidelight

ROOT = Path(__file__).parents[3]
# mkdocs in a process that has no network; its errors are this test's.
BUILD = """
import socket, sys
def refused(*_): raise OSError("the build asks the network")
socket.socket.connect = socket.getaddrinfo = refused
from mkdocs.__main__ import cli
cli(["build", "--strict", "--quiet", "--site-dir", sys.argv[1]])
"""


def test_site_builds_offline_with_all_pages_and_no_external_resources(
    tmp_path: Path,
):
    pytest.importorskip("mkdocs", reason="mkdocs is not installed")
    built = subprocess.run(
        [sys.executable, "-c", BUILD, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stdout + built.stderr
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")} - {"README"}
    assert pages | {"index", "openapi", "python"} <= {page.stem for page in tmp_path.glob("*.html")}
    # Links that a reader follows may lead anywhere; scripts, styles, fonts and pictures not.
    loads = re.compile(
        r"<(?:script|img|iframe|source|link)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//[^>]*"
        r"|url\([\"']?(?:https?:)?//[^)]*|@import[^;]*//[^;]*"
    )
    styles = list(tmp_path.rglob("*.css"))
    assert styles
    for file in (*styles, *tmp_path.rglob("*.html")):
        assert loads.findall(file.read_text()) == [], file
    python = (tmp_path / "python.html").read_text()
    assert [name for name in sidelight.__all__ if f">{name}<" not in python] == []
    document = json.loads((tmp_path / "openapi.json").read_text())
    routes = [f"{m.upper()} {path}" for path, ms in document["paths"].items() for m in ms]
    assert len(routes) > 10
    schemas = [name.split("__")[-1] for name in document["components"]["schemas"]]
    page = (tmp_path / "openapi.html").read_text()
    assert [name for name in (*routes, *schemas) if name not in page] == []
