"""The table of wordings is whole: no test pins one beside it, and none of it is left over."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import wordings

ROOT = Path(__file__).parents[1]
TESTS = [*(ROOT / "tests").rglob("*.py"), *ROOT.glob("packages/*/tests/**/*.py")]
PINNING = ("pytest.raises", "pytest.warns")
# Two words of prose; what stands after dashes is an option, and what is quoted a name.
PROSE = re.compile(r"(?<![\w'`-])[a-z]{2,} [a-z]{2,}")


def pinned(tree: ast.AST) -> Iterator[ast.expr]:
    """What a test demands of a message, where it is written at the place."""
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and ast.unparse(call.func) in (
            "pytest.raises",
            "pytest.warns",
        ):
            yield from (word.value for word in call.keywords if word.arg == "match")


def test_no_test_pins_a_wording_outside_the_table():
    found = {
        f"{path.relative_to(ROOT)}:{value.lineno}": prose[0]
        for path in TESTS
        for value in pinned(ast.parse(path.read_text()))
        for node in ast.walk(value)
        if isinstance(node, ast.Constant) and (prose := PROSE.search(str(node.value)))
    }
    assert found == {}


def test_each_wording_is_pinned_by_a_test():
    told = " ".join(path.read_text() for path in TESTS)
    table = {name for name in vars(wordings) if name.isupper()}
    assert table == set(re.findall(r"wordings\.([A-Z_]+)", told)) & table
