"""What README and docs say of the project holds."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from runpy import run_path
from typing import get_args

import click
import pytest
import torch

from sidelight.cli import app
from sidelight.engines.transformers.engine import TransformersEngine
from sidelight.policy import request, rules
from sidelight.policy.rules import Action, Mode, Policy, Rule, read_policy
from sidelight.probes.card import ProbeCard
from sidelight.probes.mechanisms import base
from sidelight.probes.ragged import Ragged
from sidelight.server.app import create_app
from sidelight.server.config import ServerConfig, read_config
from sidelight.server.metrics import Metrics
from sidelight_lab.redteam.attacks import ATTACKS, attack_names
from worlds.data import documented_table
from worlds.models import tiny_backbone

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted(ROOT.glob("packages/*/README.md")),
    *sorted([*(ROOT / "docs").glob("*.md"), *(ROOT / "packages/lab/docs").rglob("*.md")]),
]
SOURCE = ROOT / "src" / "sidelight"
# Where a path of the pages may begin.
FOLDERS = (SOURCE, *(ROOT / f"packages/{name}/src" for name in ("llama", "vllm")))


def test_paths_in_readme_map_exist():
    table = (ROOT / "README.md").read_text().split("| path | what it is |")[1].split("\n\n")[0]
    paths = [path for row in table.splitlines() for path in re.findall(r"`([^`]+/)`", row)]
    assert len(paths) > 5
    assert [p for p in paths if not (ROOT / p).exists() and not (SOURCE / p).exists()] == []


def test_documented_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):.* ##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        target
        for page in PAGES
        for target in re.findall(r"(?:^\$ |`)make ([a-z-]+)", page.read_text(), re.MULTILINE)
    }
    assert {"demo", "test"} <= named <= targets


def test_architecture_page_names_every_top_level_module():
    folders = {
        path.stem
        for path in SOURCE.iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    } - {"__init__", "__main__"}
    told = set(re.findall(r"\w+", (ROOT / "docs" / "architecture.md").read_text()))
    assert folders - told == set()


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    outside = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", outside, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text).lower().replace(" ", "-") for text in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_anchors_resolve(page: Path):
    for path, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]+))?\)", page.read_text()):
        there = page.parent / path if path else page
        assert there.exists(), path
        assert not anchor or anchor in anchors(there), anchor


def defined(path: Path) -> set[str]:
    """Functions and classes of a file, and methods as ``Class.method``."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{m.name}" for m in node.body if hasattr(m, "name")}
    return names


def found(path: str) -> Path:
    """The file that a page calls by its path in the core, or in the source of an engine."""
    (file,) = [folder / path for folder in FOLDERS if (folder / path).exists()]
    return file


def test_architecture_walk_steps_exist_in_named_files():
    page = (ROOT / "docs" / "architecture.md").read_text()
    stops = re.findall(r"^ +\d+  (\S+\.py)  ([\w.]+(?:, [\w.]+)*)  \S", page, flags=re.MULTILINE)
    numbered = re.findall(r"^ +\d+  ", page, flags=re.MULTILINE)
    assert len(stops) == len(numbered) > 40
    places = [(path, name) for path, names in stops for name in names.split(", ")]
    assert [(p, n) for p, n in places if n not in defined(found(p))] == []


def test_architecture_page_names_existing_files_and_functions():
    page = (ROOT / "docs" / "architecture.md").read_text()
    files = [f for f in re.findall(r"`([\w/]+\.py)`", page) if not f.endswith("x.py")]
    folders = (ROOT, *FOLDERS, ROOT / "packages/lab/src/sidelight_lab")
    assert len(files) > 15
    assert [f for f in files if not any((folder / f).exists() for folder in folders)] == []
    named = re.findall(r"`_?[A-Z]\w+\.(\w+)`", page)
    code = "\n".join(path.read_text() for folder in FOLDERS for path in folder.rglob("*.py"))
    assert [name for name in named if f"def {name}(" not in code] == []


def replaced_methods(path: Path) -> set[str]:
    """Methods of others that a file wraps, or replaces by methods of its own."""
    tree, names = ast.parse(path.read_text()), set[str]()
    functions = {
        node.name for node in ast.walk(tree) if hasattr(node, "args") and hasattr(node, "name")
    }
    for node in ast.walk(tree):
        match node:
            case ast.Call(ast.Name("wrap"), [_, ast.Constant(name), _]):
                names.add(name)
            case ast.Assign([target], value):
                pairs = [(target, value)]
                if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                    pairs = zip(target.elts, value.elts, strict=True)
                for pair in pairs:
                    match pair:
                        case ast.Attribute(attr=name), ast.Attribute(ast.Name("self"), method):
                            names |= {name} if method in functions else set()
                        case ast.Attribute(ast.Name(owner), name), ast.Name(assigned):
                            names |= (
                                {name} if owner[0].isupper() and assigned in functions else set()
                            )
    return names


def test_architecture_page_lists_every_replaced_vllm_method():
    page = (ROOT / "docs" / "architecture.md").read_text()
    table = page.split("| file | replaces in vLLM |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| `(sidelight_vllm/\w+\.py)` \| (.+) \|$", table, flags=re.MULTILINE)
    told = {path: set(re.findall(r"`([a-z_]+)`", cell)) for path, cell in rows}
    files = (ROOT / "packages/vllm/src").rglob("*.py")
    has = {f"sidelight_vllm/{path.name}": replaced_methods(path) for path in files}
    assert told == {path: names for path, names in has.items() if names}


# What only a GPU has.
OF_GPUS = {
    "accelerator", "cuda", "current_stream", "is_cuda", "mps", "non_blocking", "pin_memory",
    "record_stream", "synchronize", "triton", "wait_event", "xpu",
}  # fmt: skip


def asks_for_device(node: ast.AST) -> bool:
    """Whether code uses what only a GPU has, or compares a device with the CPU."""
    match node:
        case (
            ast.Attribute(attr=name) | ast.Name(name) | ast.keyword(name) | ast.Constant(str(name))
        ):
            return name in OF_GPUS
        case ast.Attribute(ast.Name("torch"), "Stream" | "Event"):
            return True
        case ast.Compare(_, _, [ast.Constant("cpu")]):
            return True
    return False


def device_places(path: Path, folder: Path) -> Iterator[tuple[str, str]]:
    """Each function of a file that has a line for a device that is not the CPU."""

    def places(node: ast.AST, name: str) -> Iterator[str]:
        if asks_for_device(node):
            yield name
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{name}.{node.name}".lstrip(".")
        for child in ast.iter_child_nodes(node):
            yield from places(child, name)

    for name in places(ast.parse(path.read_text()), ""):
        yield str(path.relative_to(folder)), name


def test_gpu_only_code_is_listed_with_its_test():
    page = (ROOT / "packages/lab/docs/gpus.md").read_text()
    rows = re.findall(r"^\| `(\S+\.py)` `(\S+)` \| .+ \| (.+) \|$", page, flags=re.MULTILINE)
    has = {
        place
        for folder in FOLDERS
        for path in folder.rglob("*.py")
        for place in device_places(path, folder)
    }
    assert {(path, name) for path, name, _ in rows} == has
    runs = {run for _, _, run in rows} - {"never run"}
    assert [run for run in runs if not (ROOT / run.strip("`")).exists()] == []


def test_architecture_page_names_every_mechanism():
    rows = documented_table("architecture.md", "mechanism", "projections per token and layer")
    told = [name for row in rows for name in re.findall(r"`([a-z]\w+)`", row["mechanism"])]
    assert sorted(told) == sorted(base.mechanism_names())


NAMES = {"re2": "google-re2", "sklearn": "scikit-learn"}
# What a declared package brings, and engines that users install.
BROUGHT = {
    "psutil", "pydantic_core", "opentelemetry", "starlette", "tokenizers", "uvloop",
    "vllm",
}  # fmt: skip


def test_package_imports_only_declared_dependencies():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    kinds = (extras[name] for name in ("serve", "plots", "datasets"))
    lines = sum(kinds, project["dependencies"])
    declared = {re.split(r"[\[<>=~!; ]", line)[0] for line in lines}
    imported: set[str] = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            imported |= {name.split(".")[0] for name in names}
    foreign = imported - sys.stdlib_module_names - BROUGHT - {"sidelight"}
    packages = {NAMES.get(name, name.replace("_", "-")) for name in foreign}
    assert packages - declared == set()


def dependencies() -> set[str]:
    """Of all packages, and their tools."""
    lines = list[str]()
    for path in (ROOT / "pyproject.toml", *ROOT.glob("packages/*/pyproject.toml")):
        project = tomllib.loads(path.read_text())["project"]
        extras = project.get("optional-dependencies", {}).values()
        lines += sum(extras, project["dependencies"])
    return {re.split(r"[\[<>=~!; ]", line)[0] for line in lines} - {"sidelight"}


@pytest.mark.slow
def test_route_tables_match_server_routes():
    paths = create_app(TransformersEngine(tiny_backbone(), [])).openapi()["paths"]
    has = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
    # Pages are not in the document.
    has |= {"GET /openapi.json", "GET /playground"}
    tables = (documented_table("routes.md", "route", title) for title in ("gives", "does"))
    cells = [row["route"] for table in tables for row in table]
    cells.remove("`/admin/probes...`")
    told = [
        f"{method} {re.sub(r'{id}|NAME', '{name}', path)}"
        for method, *listed in (re.findall(r"[^`, ]+", cell) for cell in cells)
        for path in listed
    ]
    assert sorted(told) == sorted(has)


def commands() -> Iterator[str]:
    for name in app.list_commands(click.Context(app)):
        command = app.get_command(click.Context(app), name)
        subcommands = command.commands if isinstance(command, click.Group) else [""]
        yield from (f"sidelight {name} {sub}".strip() for sub in subcommands)


def series() -> set[str]:
    page = Metrics(TransformersEngine(tiny_backbone(), []), tuple).exposition().decode()
    names = re.findall(r"^# TYPE (\w+)", page, flags=re.MULTILINE)
    return {name for name in names if not name.endswith("_created")}


def error_codes() -> set[str]:
    code = "\n".join(path.read_text() for folder in FOLDERS for path in folder.rglob("*.py"))
    return set(re.findall(r"""(?:\bcode=|_error\(|_error", )"(\w+)\"""", code))


def options() -> set[str]:
    """The options of the server, and the keys of its file that have none."""
    parameters = app.commands["serve"].params
    named = {name for option in parameters for name in option.opts}
    return named | (ServerConfig.model_fields.keys() - {option.name for option in parameters})


REFERENCE = {
    "docs/dependencies.md": dependencies,
    "docs/card.md": lambda: [*ProbeCard.model_fields],
    "docs/operate.md": series,
    "docs/policies.md": lambda: [field.name for kind in (Policy, Rule) for field in fields(kind)],
    "docs/reference.md": options,
    "docs/routes.md": error_codes,
    "packages/lab/docs/redteam.md": lambda: {*attack_names(), *(a.group for a in ATTACKS.values())},
}


@pytest.mark.parametrize("page", REFERENCE)
def test_reference_page_is_complete(page: str):
    told = (ROOT / page).read_text()
    names = sorted(REFERENCE[page]())
    assert names
    assert [name for name in names if not re.search(rf"(?<![\w-]){name}(?![\w-])", told)] == []


def test_docs_name_every_command():
    told = "\n".join(page.read_text() for page in PAGES)
    assert [name for name in commands() if f"{name} " not in told and f"{name}`" not in told] == []


def test_option_tables_match_commands():
    """If not, `.ci/reference.py` writes them."""
    page = (ROOT / "docs" / "reference.md").read_text()
    assert run_path(str(ROOT / ".ci" / "reference.py"))["with_tables"](page) == page


def documented_commands(page: Path) -> Iterator[tuple[click.Command, list[str]]]:
    """The `sidelight` commands of a page's consoles, with the options that they are given."""
    for console in re.findall(r"```console\n(.*?)```", page.read_text(), flags=re.DOTALL):
        for line in re.sub(r"\\\n", " ", console).splitlines():
            for words in re.findall(r"(?:\$|&&) (?:\w+=\S+ )*sidelight (\w[^|&]*)", line):
                name, *rest = words.split()
                command = app.get_command(click.Context(app), name)
                if isinstance(command, click.Group):
                    command = command.commands[rest[0]]
                assert command is not None, words
                yield command, re.findall(r"(?<= )--[\w-]+", words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documented_commands_use_existing_options(page: Path):
    for command, flags in documented_commands(page):
        known = {name for o in command.params for name in (*o.opts, *o.secondary_opts)}
        assert set(flags) - known == set(), command.name


def test_documented_policies_and_configurations_are_valid(tmp_path: Path):
    path = tmp_path / "shown.toml"
    readers = dict.fromkeys(("tutorial.md", "policies.md"), read_policy)
    for page, read in {**readers, "reference.md": lambda p: read_config(config=p)}.items():
        blocks = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
        assert blocks, page
        for text in blocks:
            path.write_text(text)
            for name in re.findall(r'^file = "(.+?)"', text, re.MULTILINE):
                (tmp_path / name).touch()
            read(path)


def test_documented_mechanism_streaming_matches_dense_form(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(base, "_BUILDERS", dict(base._BUILDERS))
    page = (ROOT / "docs" / "own-mechanism.md").read_text()
    exec(page.split("```python\n")[1].split("```")[0], {"__name__": "linear_mean"})
    mechanism = base.build_mechanism(base.mechanism_spec("linear_mean"), base.Geometry(3, 32, 2))
    hidden = torch.randn(1, 3, 5, 32)
    tokens = torch.einsum("ltd,ldm->tlm", hidden[0], mechanism.projections())
    states = [
        mechanism.summarise(Ragged(chunk, torch.tensor([len(chunk)])))
        for chunk in (tokens[:2], tokens[2:])
    ]
    dense = mechanism(hidden, torch.ones(1, 5, dtype=torch.bool))
    torch.testing.assert_close(mechanism.finish(mechanism.merge(*states)), dense)


def test_modes_actions_and_headers_are_documented_and_playground_offers_modes():
    pages = {
        name: (ROOT / "docs" / name).read_text()
        for name in ("policies.md", "operate.md", "routes.md")
    }
    table = pages["policies.md"].split("## Modes")[1].split("\n\n")[1]
    assert re.findall(r"^\| `(\w+)`", table, re.MULTILINE) == list(get_args(Mode))
    row = pages["operate.md"].split("| `sidelight_actions_total` |")[1].split("\n")[0]
    assert {*get_args(Action)} - {"none"} == {*re.findall(r"`(\w+)`", row)}
    rows = pages["routes.md"].split("## Read the verdicts")[1].split("## Client support")[0]
    named = vars(rules) | vars(request)
    headers = [value for name, value in named.items() if name.endswith("_HEADER")]
    assert headers
    assert all(f"| `{header}` |" in rows for header in headers)
    page = (SOURCE / "server" / "playground" / "index.html").read_text()
    offered = {mode for mode in get_args(Mode) if f'<option value="{mode}">' in page}
    assert offered == {*get_args(Mode)} - {"shadow"}
