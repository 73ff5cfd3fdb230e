"""The documentation as a site: it builds strictly, without the network, and asks nobody else."""

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


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed")
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-c", BUILD, str(folder)], cwd=ROOT, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_every_page_of_the_docs_is_one_of_the_site(site: Path):
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")} - {"README"}
    assert pages | {"index", "openapi", "python"} <= {page.stem for page in site.glob("*.html")}


def test_no_page_loads_anything_from_elsewhere(site: Path):
    """Links that a reader follows may lead anywhere; scripts, styles, fonts and pictures not."""
    loads = re.compile(
        r"<(?:script|img|iframe|source|link)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//[^>]*"
        r"|url\([\"']?(?:https?:)?//[^)]*|@import[^;]*//[^;]*"
    )
    asked = {
        str(file.relative_to(site)): found
        for kind in ("*.html", "*.css")
        for file in site.rglob(kind)
        if (found := loads.findall(file.read_text()))
    }
    assert asked == {}
    assert len(list(site.rglob("*.css"))) > 0


def test_the_reference_is_that_of_the_code(site: Path):
    python = (site / "python.html").read_text()
    assert [name for name in sidelight.__all__ if f">{name}<" not in python] == []
    document = json.loads((site / "openapi.json").read_text())
    routes = [f"{m.upper()} {path}" for path, ms in document["paths"].items() for m in ms]
    page = (site / "openapi.html").read_text()
    assert len(routes) > 15
    assert [route for route in routes if route not in page] == []
    assert [
        name for name in document["components"]["schemas"] if name.split("__")[-1] not in page
    ] == []
