"""What README and docs say of the project holds."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from sidelight.cli import app
from sidelight.engines.loading import LoadingEngine
from sidelight.server.app import create_app
from tiny import tiny_backbone

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCE = ROOT / "src" / "sidelight"


def mapped_paths() -> set[Path]:
    """The paths of the README's file map; names after a comma stand in the same folder."""
    table = (ROOT / "README.md").read_text().split("| path | what it is |")[1].split("\n\n")[0]
    paths: set[Path] = set()
    for row in table.splitlines():
        folder = ROOT
        for name in re.findall(r"`([^`]+)`", row.split("|")[1]) if "|" in row else []:
            path = ROOT / name if "/" in name.rstrip("/") else folder / name
            folder = path.parent
            paths.add(path)
    return paths


def test_every_path_of_the_file_map_exists():
    assert [path for path in mapped_paths() if not path.exists()] == []


def test_every_part_of_the_package_is_in_the_file_map():
    parts = {
        path
        for path in SOURCE.iterdir()
        if (path.suffix == ".py" or (path / "__init__.py").exists()) and path.name != "__init__.py"
    }
    assert parts - mapped_paths() == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_somewhere(page: Path):
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    local = [link for link in links if not link.startswith("http")]
    assert [link for link in local if not (page.parent / link).exists()] == []


def first_cells(page: str, head: str) -> list[str]:
    """The first column of the table with this head."""
    table = (ROOT / "docs" / page).read_text().split(f"{head}\n")[1].split("\n\n")[0]
    return [row.split("|")[1].strip() for row in table.splitlines()[1:]]


def names_of(requirements: list[str]) -> set[str]:
    names = {re.split(r"[\[<>=~!; ]", line)[0] for line in requirements}
    return names - {"sidelight"}


def test_every_dependency_has_its_sentence():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    laboratory = tomllib.loads((ROOT / "lab" / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    tools = names_of([*extras.pop("dev"), *extras.pop("vllm-test")])
    used = names_of(
        sum(extras.values(), start=project["dependencies"] + laboratory["dependencies"])
    )
    cells = first_cells("dependencies.md", "| package | why |")
    told = {name.strip() for cell in cells for name in re.sub(r"\(.*\)", "", cell).split(",")}
    assert used - told == set()
    words = re.findall(r"[\w-]+", (ROOT / "docs" / "dependencies.md").read_text())
    assert tools - told - set(words) == set()


def test_the_tables_of_routes_hold_what_the_server_has():
    paths = create_app(LoadingEngine(tiny_backbone)).openapi()["paths"]
    has = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
    # FastAPI's own pages are not in the document that they show.
    has |= {"GET /docs", "GET /openapi.json"}
    cells = first_cells("serving.md", "| route | gives |")
    cells.remove("`/admin/probes...`")
    cells += first_cells("policies.md", "| route | does |")
    told = [
        f"{method} {re.sub(r'{id}|NAME', '{name}', path)}"
        for method, *listed in (re.findall(r"[^`, ]+", cell) for cell in cells)
        for path in listed
    ]
    assert sorted(told) == sorted(has)


def test_every_option_of_the_server_is_described():
    said = "".join(page.read_text() for page in PAGES)
    options = [name for option in app.commands["serve"].params for name in option.opts]
    assert [name for name in options if not re.search(rf"{name}(?![\w-])", said)] == []


def test_import_and_help_load_nothing_heavy():
    code = (
        "import sys, sidelight; from sidelight.cli import app\n"
        "for command in [], *([name] for name in app.list_commands(None)):\n"
        "    app([*command, '--help'], standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'fastapi', 'matplotlib', 'sklearn'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    asked = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert (asked.returncode, asked.stderr) == (0, "")
    assert asked.stdout.count("Usage: ") > 1
