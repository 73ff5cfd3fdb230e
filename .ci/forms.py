"""Counts the forms that a thing takes on its way through the code: `.ci/forms.py CHECKOUT ...`.

Prints a table with a column for each checkout; `--list` adds the names behind the numbers.

- **Walks**: `sidelight train --data FILE`, and two streamed chats with our own server, one of which
  is blocked. The commands run on the embedded model in a process that profiles every call.
  - A *stop* is a function of the product that is entered from another module of the product, or
    from outside of it. It counts once, however often and from wherever it is entered. Properties,
    special methods, generated functions, comprehensions and lambdas are no stops.
  - A *type* is a dataclass, a named tuple or a pydantic model of the product that a stop takes or
    returns, by itself or as the first element of a list, tuple or dictionary. It counts once.
- **Branches** on three special cases, in the source of the core and of the engines vLLM and
  llama.cpp: the places where a condition (of `if`, `while`, `assert`, a conditional expression, a
  comprehension or a `match`, an index of a literal table, or a comparison by itself) asks for the
  case, and the places where a field, a parameter or an argument hands the answer on. A place is the
  line that a condition or a name begins on; it counts once.
  - *spans*: whether tokens or whole texts are labelled.
  - *plain text*: whether a text is a chat.
  - *task kind*: whether a task is binary, multi-class or multi-label.
"""

import argparse
import ast
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PACKAGES = ("vllm", "llama")
# The words by which a condition asks for a case: its names, attributes and texts.
CASES = {
    "spans": r"spans|of_spans|of_tokens|labels_tokens|SpanRule|SpanReport|\w*OfTokens|\w*OfSpans",
    "plain text": r"is_plain|prompt_format|PlainText|'raw'|'chat'|'both'|is_raw|is_chat",
    "task kind": r"task\.kind|flaggable|'binary'|'multiclass'|'multilabel'|abstains|is_binary"
    r"|is_multi\w+|Binary\w*|MultiClass\w*|MultiLabel\w*",
}
# The names that hand on an answer.
FLAGS = {
    "spans": r"of_spans|of_tokens",
    "plain text": r"is_plain|is_raw|is_chat",
    "task kind": r"abstains|is_binary|is_multi\w+",
}
TEXTS = (
    "Come at once: the kitchen is on fire, number {}.",
    "Come when it suits you, number {}.",
)
ROWS = 60
WAIT_S = 300


def source_folders(checkout: Path) -> list[Path]:
    """The folders of the product's code: the core, and engines where they are packages."""
    folders = [checkout / "src", *(checkout / "packages" / name / "src" for name in PACKAGES)]
    return [folder for folder in folders if folder.is_dir()]


# Branches.


def conditions(node: ast.AST) -> Iterator[ast.expr]:
    """What each branch decides by, the whole of it."""
    tests: list[ast.expr] = []
    match node:
        case ast.If() | ast.IfExp() | ast.While() | ast.Assert():
            tests = [node.test]
        case ast.comprehension():
            tests = node.ifs
        case ast.Match():
            tests = [node.subject]
        case ast.Subscript(value=ast.Dict()):
            tests = [node.slice]
        case ast.BoolOp() | ast.Compare():
            tests = [node]
    yield from tests
    for child in ast.iter_child_nodes(node):
        if child not in tests:
            yield from conditions(child)


def words_of(condition: ast.AST) -> set[str]:
    """The names, attributes and texts in a condition."""
    words: set[str] = set()
    for node in ast.walk(condition):
        match node:
            case ast.Name(id=name):
                words.add(name)
            case ast.Attribute(value=ast.Name(id="task") | ast.Attribute(attr="task"), attr=name):
                words |= {name, f"task.{name}"}
            case ast.Attribute(attr=name):
                words.add(name)
            case ast.Constant(value=str(text)):
                words.add(repr(text))
    return words


def handed_on(node: ast.AST) -> str | None:
    """The name of a field, parameter or argument."""
    match node:
        case ast.arg(arg=name) | ast.keyword(arg=name):
            return name
        case ast.AnnAssign(target=ast.Name(id=name)):
            return name
        case ast.Attribute(attr=name) | ast.Name(id=name):
            return name
    return None


def branches(checkout: Path) -> dict[str, list[str]]:
    """The places of the branches on each case."""
    found: dict[str, set[str]] = {case: set() for case in CASES}
    for folder in source_folders(checkout):
        for path in sorted(folder.rglob("*.py")):
            tree = ast.parse(path.read_text())
            asked = [(condition.lineno, words_of(condition)) for condition in conditions(tree)]
            flags = [
                (node.lineno, {name})
                for node in ast.walk(tree)
                if (name := handed_on(node)) is not None
            ]
            for case in CASES:
                for places, pattern in ((asked, CASES[case]), (flags, FLAGS[case])):
                    found[case] |= {
                        f"{path.relative_to(checkout)}:{line}"
                        for line, words in places
                        if any(re.fullmatch(pattern, word) for word in words)
                    }
    return {case: sorted(places) for case, places in found.items()}


# Walks, in a process with the checkout's code.


def is_data(kind: type) -> bool:
    """Whether its objects are values: a dataclass, a named tuple or a pydantic model."""
    return any(hasattr(kind, name) for name in ("__dataclass_fields__", "model_fields", "_fields"))


@dataclass
class Recorder:
    """Notes stops and types while it is on."""

    prefixes: tuple[str, ...]
    is_on: bool = False
    stops: dict[Any, str] = field(default_factory=dict)
    types: set[str] = field(default_factory=set)
    _known: dict[Any, bool] = field(default_factory=dict)
    _properties: dict[str, set[int]] = field(default_factory=dict)

    def __call__(self, frame: Any, event: str, argument: Any) -> None:
        code = frame.f_code
        if not self.is_on or event not in ("call", "return") or not self._is_ours(code):
            return
        # A module or the body of a class has no local names of a function.
        if not code.co_flags & 2:
            return
        if event == "return":
            if code in self.stops:
                self._note(argument)
            return
        if code.co_name.startswith("<"):
            return
        caller = frame.f_back
        while caller is not None and not self._is_ours(caller.f_code):
            caller = caller.f_back
        if caller is not None and caller.f_code.co_filename == code.co_filename:
            return
        if self._is_stop(code):
            self.stops.setdefault(code, f"{code.co_filename}: {code.co_qualname}")
        for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]:
            self._note(frame.f_locals.get(name))

    def _is_ours(self, code: Any) -> bool:
        if code not in self._known:
            self._known[code] = code.co_filename.startswith(self.prefixes)
        return self._known[code]

    def _is_stop(self, code: Any) -> bool:
        """Whether it is neither a property, nor special."""
        path = code.co_filename
        if path not in self._properties:
            self._properties[path] = {
                node.decorator_list[0].lineno
                for node in ast.walk(ast.parse(Path(path).read_text()))
                if isinstance(node, ast.FunctionDef)
                and any(
                    ast.unparse(decorator).endswith("property") for decorator in node.decorator_list
                )
            }
        is_property = code.co_firstlineno in self._properties[path]
        return not is_property and not code.co_name.startswith(("<", "__"))

    def _note(self, value: object, depth: int = 2) -> None:
        kind = type(value)
        if kind.__module__.startswith("sidelight") and is_data(kind):
            self.types.add(f"{kind.__module__}.{kind.__qualname__}")
        elif depth and kind in (list, tuple, dict) and value:
            self._note(next(iter(value.values() if kind is dict else value)), depth - 1)


def run_command(*words: str) -> None:
    from sidelight.cli import app

    app(list(words), standalone_mode=False)


def walk_train(recorder: Recorder, folder: Path) -> None:
    """A training on made-up texts of two classes."""
    rows = [{"text": TEXTS[i % 2].format(i), "label": 1 - i % 2} for i in range(ROWS)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recorder.is_on = True
    out = ("--out", str(folder / "urgent"), "--set", "context_tokens=2000")
    run_command("train", "--data", str(folder / "texts.jsonl"), *out)
    recorder.is_on = False


def walk_chat(recorder: Recorder, folder: Path) -> None:
    """A chat that passes, and one that is blocked."""
    (folder / "policy.toml").write_text('system_turns = "trust"\n[input.urgent]\nmode = "block"\n')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, answers = f"http://127.0.0.1:{port}", dict[str, str]()

    def ask(text: str) -> str:
        message = {"role": "user", "content": text}
        body = {"model": "smollm2", "messages": [message], "stream": True, "max_tokens": 8}
        request = urllib.request.Request(
            f"{url}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request) as answer:
                return answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.read().decode()

    def client() -> None:
        try:
            end = time.monotonic() + WAIT_S
            while time.monotonic() < end:
                try:
                    urllib.request.urlopen(f"{url}/health").close()
                    break
                except OSError:
                    time.sleep(0.2)
            recorder.is_on = True
            answers.update({text: ask(text.format(3)) for text in TEXTS})
            recorder.is_on = False
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=client).start()
    words = ("--probe", str(folder / "urgent"), "--policy", str(folder / "policy.toml"))
    with suppress(SystemExit):
        run_command("serve", *words, "--port", str(port), "--log-level", "error")
    blocked, passed = answers.values()
    assert "content_filter" in blocked, blocked
    assert "[DONE]" in passed, passed


WALKS = {"train FILE": walk_train, "streamed, blocked chat": walk_chat}


def record(checkout: Path, walk: str, folder: Path) -> None:
    """Takes a walk, and writes what it noted to the folder."""
    recorder = Recorder(tuple(f"{folder}{os.sep}" for folder in source_folders(checkout)))
    threading.setprofile(recorder)
    sys.setprofile(recorder)
    try:
        WALKS[walk](recorder, folder)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    places = [stop.removeprefix(f"{checkout}{os.sep}") for stop in recorder.stops.values()]
    noted = {"stops": sorted(places), "types": sorted(recorder.types)}
    (folder / "noted.json").write_text(json.dumps(noted))


def take(checkout: Path) -> dict[str, list[str]]:
    """What each walk through a checkout meets."""
    path = os.pathsep.join(map(str, [*source_folders(checkout), checkout / "packages/guards/src"]))
    noted: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for walk in WALKS:
            command = [sys.executable, __file__, str(checkout), "--walk", walk, "--folder", folder]
            done = subprocess.run(
                command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
            )
            if done.returncode:
                raise SystemExit(f"{walk} in {checkout} failed:\n{done.stderr[-2000:]}")
            for name, places in json.loads(Path(folder, "noted.json").read_text()).items():
                noted[f"{walk}: {name}"] = places
    return noted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkouts", nargs="*", type=Path, default=[Path()])
    parser.add_argument("--list", action="store_true", help="print the names, too")
    parser.add_argument("--branches", action="store_true", help="take no walks, which need minutes")
    parser.add_argument("--walk", choices=WALKS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    checkouts = [path.resolve() for path in options.checkouts]
    if options.walk:
        record(checkouts[0], options.walk, options.folder)
        return
    counts: dict[str, list[int]] = {}
    for checkout in checkouts:
        found = {} if options.branches else take(checkout)
        found |= {f"branches on {case}": places for case, places in branches(checkout).items()}
        for row, places in found.items():
            counts.setdefault(row, []).append(len(places))
            if options.list:
                print(f"{checkout}, {row}:", *places, "", sep="\n  ")
    for row, numbers in counts.items():
        print(f"{row:36}", *(f"{number:6}" for number in numbers))


if __name__ == "__main__":
    main()
