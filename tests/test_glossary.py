"""The glossary holds in this repository, and what breaks it is found with its place."""

from pathlib import Path
from runpy import run_path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def glossary() -> dict[str, Any]:
    return run_path(str(ROOT / ".ci" / "glossary.py"))


def test_names_and_prose_follow_glossary(glossary: dict[str, Any]):
    assert [*glossary["problems"](ROOT)] == []


@pytest.mark.parametrize(
    "source",
    [
        "judged = 1",
        "def settle_all(): ...",
        "class StepReadings: ...",
        "def f(*, sees_all): ...",
        "f(own=1)",
        "import sidelight as other_name",
        "x.early",
        "try: ...\nexcept OSError as whole: ...",
        "async def test_what_nobody_knows(): ...",
    ],
)
def test_forbidden_identifier_is_reported_with_its_line(glossary: dict[str, Any], source: str):
    found = [*glossary["wrong_names"](f"\n{source}\n", "src/sidelight/types.py")]
    assert found
    line = 1 + len(source.splitlines())
    assert all(each.startswith(f"src/sidelight/types.py:{line}: ") for each in found)


def test_exceptions_apply_only_to_their_names_and_paths(glossary: dict[str, Any]):
    for source, path, count in (
        ("judge = 1", "src/sidelight/judges/client.py", 0),
        ("judge = 1", "src/sidelight/probes/bank.py", 1),
        ("held_out = 1", "src/sidelight/probes/bank.py", 0),
        ("held = 1", "src/sidelight/probes/bank.py", 1),
    ):
        assert len([*glossary["wrong_names"](source, path)]) == count, (source, path)


def test_every_exception_is_needed(glossary: dict[str, Any]):
    found = {
        (word, name, path)
        for path, source in glossary["tracked"](ROOT)
        if path.endswith(".py")
        for word, name, _ in glossary["leaving"](source)
    }
    for stay in glossary["STAYS"]:
        assert any(glossary["excuses"](stay, *each) for each in found), stay


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ('"""Whoever asks is answered."""', "src/sidelight/types.py"),
        ("x = 1  # None: nobody knows", "src/sidelight/types.py"),
        ('raise ValueError("Everybody who reaches it")', "src/sidelight/types.py"),
        ("Of ordinary traffic it flags little.", "docs/guards.md"),
        ('"""As few as may be: its judgement."""', "tests/test_bank.py"),
    ],
)
def test_forbidden_phrase_is_reported_with_its_line(
    glossary: dict[str, Any], source: str, path: str
):
    found = [*glossary["wrong_phrases"](f"\n{source}\n", path)]
    assert found
    assert all(each.startswith(f"{path}:2: ") for each in found)


def test_code_and_test_strings_are_not_checked_as_prose(glossary: dict[str, Any]):
    assert [*glossary["wrong_phrases"]('task("nobody")', "src/sidelight/types.py")] == []
    assert [*glossary["wrong_phrases"]('ask("Does nobody know?")', "tests/test_bank.py")] == []
