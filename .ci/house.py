"""Prints the size and shape of the code: `make house`. Figures to look at, not limits."""

import ast
import io
import statistics
import subprocess
import tokenize
from dataclasses import dataclass
from pathlib import Path

SHORT, LONG = 40, 500
PLACES = (
    *("src/sidelight", *(str(path) for path in sorted(Path("packages").glob("*/src")))),
    *("tests", *(str(path) for path in sorted(Path("packages").glob("*/tests")))),
)
NOT_CODE = {
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.COMMENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


@dataclass(frozen=True)
class File:
    """One module: physical lines, lines of code (no blanks, comments, docstrings), of imports."""

    path: Path
    lines: int
    code: int
    imports: int


def measure(path: Path) -> File:
    text = path.read_text()
    tree = ast.parse(text)
    docstrings: set[int] = set()
    imports: set[int] = set()
    for node in ast.walk(tree):
        has_docstring = isinstance(
            node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        ) and (ast.get_docstring(node, clean=False) is not None)
        if has_docstring:
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
        if isinstance(node, ast.Import | ast.ImportFrom):
            imports |= set(range(node.lineno, node.end_lineno + 1))
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NOT_CODE:
            code |= set(range(token.start[0], token.end[0] + 1))
    return File(path, text.count("\n"), len(code - docstrings), len(imports))


def row(name: str, files: list[File]) -> str:
    code = sum(file.code for file in files)
    imports = sum(file.imports for file in files) / max(code, 1)
    median = statistics.median(file.code for file in files)
    lines = sum(file.lines for file in files)
    return f"{name:34} {len(files):5} {lines:7,} {code:7,} {median:7.0f} {imports:8.1%}"


def main() -> None:
    listed = subprocess.run(["git", "ls-files", "*.py"], capture_output=True, text=True, check=True)
    files = [measure(Path(name)) for name in listed.stdout.split() if Path(name).exists()]
    print(f"{'':34} {'files':>5} {'lines':>7} {'code':>7} {'median':>7} {'imports':>8}")
    for place in PLACES:
        inside = [file for file in files if file.path.is_relative_to(place)]
        if not inside:
            continue
        print(row(place, inside))
        if place.endswith("tests"):
            continue
        folders = sorted({file.path.parent for file in inside})
        for folder in folders:
            files_of_folder = [file for file in inside if file.path.parent == folder]
            print(row(f"  {folder.relative_to(place)}", files_of_folder))
        modules = [file for file in inside if not file.path.name.startswith("__")]
        for title, odd in (
            (f"under {SHORT} lines", [file for file in modules if file.lines < SHORT]),
            (f"over {LONG} lines", [file for file in modules if file.lines > LONG]),
        ):
            names = ", ".join(f"{file.path.relative_to(place)} ({file.lines})" for file in odd)
            print(f"  {title}: {len(odd)} {names}")


if __name__ == "__main__":
    main()
