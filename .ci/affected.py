"""Runs the checks that changed files need, before ``make test`` runs all of them.

    .venv/bin/python .ci/affected.py [BASE]     changes since a commit; by default, uncommitted ones
    .venv/bin/python .ci/affected.py --list     print the checks alone

A test is affected if it imports a changed module, or one that imports it, or if a changed file of
``tests/`` is one of its helpers. Changes of the build run everything.
"""

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import grimp

from matrix import LANES

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(ROOT.glob("packages/*/src/*/__init__.py"))
PACKAGES = {
    "sidelight": "src",
    # That of the guards has no modules.
    **{path.parent.name: str(path.parents[1].relative_to(ROOT)) for path in MODULES},
}
TESTS = ("tests", "packages")
# Files that are no modules, and the checks that they need.
FURTHER = (
    (
        ("pyproject.toml", "Makefile", "conftest.py", ".ci/"),
        "test",
    ),
    (("docs/", "README.md", "CONTRIBUTING.md", "mkdocs.yml", "packages/lab/docs/"), "docs"),
    (("packages/guards/src/",), "packages/guards/tests"),
    (("deploy/",), "tests/test_deploy.py"),
    (("examples/",), "tests/test_examples.py"),
    (("src/sidelight/server/playground/",), "tests/test_playground_api.py"),
)


def changed_files(base: str) -> list[str]:
    """The paths that differ from a commit, and those that git does not know yet."""
    commands = (["diff", "--name-only", base], ["ls-files", "--others", "--exclude-standard"])
    return sorted({line for words in commands for line in _git(*words).splitlines()})


def affected_modules(files: Iterable[str]) -> set[str]:
    """The changed modules of the packages, and all modules that import them."""
    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    changed = {module for path in files if (module := _module(path)) in graph.modules}
    return changed.union(*(graph.find_downstream_modules(module) for module in changed))


def affected_tests(files: Iterable[str], modules: set[str]) -> Iterator[str]:
    """The test files that import these modules, or that changed, or whose helpers did."""
    helpers = {path.removeprefix("tests/").removesuffix(".py").replace("/", ".") for path in files}
    for folder in TESTS:
        for path in sorted((ROOT / folder).rglob("test_*.py")):
            name, imported = str(path.relative_to(ROOT)), {*_imports(path)}
            if name in files or imported & modules or imported & helpers:
                yield name


def checks(base: str) -> list[list[str]]:
    """The commands to run, from the fastest on."""
    files = changed_files(base)
    targets, extra, python = list[str](), set[str](), ".venv/bin/python"
    for path in files:
        extra |= {need for starts, need in FURTHER if path.startswith(starts)}
        extra |= {"test"} if path.endswith("pyproject.toml") else set()
    if not files:
        return []
    found = [["make", "lint"], ["make", "types"]]
    tests = [*affected_tests(files, affected_modules(files))]
    if "docs" in extra:
        found.append(["make", "docs"])
    targets = [
        t for t in tests if not t.startswith(("packages/vllm/tests/inside/", "tests/matrix/"))
    ]
    targets += sorted(extra - {"docs", "test"})
    if "test" in extra:
        found.append(["make", "test"])
    elif targets:
        found.append([python, "-m", "pytest", "-n", "auto", "--dist", "loadfile", *targets])
    if any(test.startswith("packages/vllm/tests/inside/") for test in tests):
        found.append(["make", "vllm"])
    lanes = [
        name
        for name, lane in LANES.items()
        if any(test.startswith(tuple(lane.tests)) for test in tests if "matrix" in test)
    ]
    if lanes:
        found.append(["make", "matrix", f"LANES={' '.join(lanes)}"])
    return found


def _module(path: str) -> str:
    for source in PACKAGES.values():
        if path.startswith(f"{source}/") and path.endswith(".py"):
            names = path.removeprefix(f"{source}/").removesuffix(".py").split("/")
            return ".".join(names).removesuffix(".__init__")
    return ""


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _git(*words: str) -> str:
    return subprocess.run(
        ["git", *words], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--list"]
    for command in checks(words[0] if words else "HEAD"):
        print(" ".join(command), flush=True)
        if "--list" not in sys.argv:
            subprocess.run(command, cwd=ROOT, check=True)
