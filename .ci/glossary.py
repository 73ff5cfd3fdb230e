"""Check that identifiers and prose keep to the glossary: one word per idea, the field's.

    python .ci/glossary.py [FOLDER]

Every identifier of the Python files in FOLDER (default: this repository) is split into words. A
word of `LEAVES` fails, unless `STAYS` says why it is the right one there. Docstrings, comments,
messages and pages must not have one of `PHRASES`. Prints each place, and exits with 1 if there are
any.
"""

import ast
import fnmatch
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Words that name one of our ideas in a way that the field does not, and what to write instead.
LEAVES = {
    "classify, classified, Verdicts": "judge judges judged judging judgement judgements",
    "annotate, header, sentinel, truncate": "mark marks marked",
    "RequestContext": "terms",
    "RequestResult, status": "outcome outcomes",
    "VisibleVerdict": "disclosed",
    "TokenRole, Segment, turn, chunk": "part parts unit units piece pieces",
    "projections": "column columns",
    "ProbeBanks, prompt_probes, response_probes": "panel panels early late",
    "StagingBuffer, SlotStore, GatherPlan, StepPlan": "stage staged pages page reading readings",
    "final, finished": "settled settle settles",
    "monitored": "watch watched watches",
    "stream_scores, is_admin, hides_scores": "tells sees withholds withheld",
    "thresholds_at_fpr, without_context, background": "quiet alone ordinary",
    "prefixes, layer scores, poolings": "beginnings beginning worths worth views view",
    "revision, consistent, annotated": "identity whole described",
    "structured outputs": "dictated worded",
    "the noun: probe, examples, message": "own made shown held said given others other kept",
    "a passive, or 'unknown'": "nobody whoever somebody",
    "ProbeCard, metrics, results": "manifest manifests history figures reference",
}

# (words, identifiers as a pattern, folders or files, why they stay).
_LLM_JUDGES = "src/sidelight/judges src/sidelight/policy src/sidelight/server src/sidelight/cli"
_LABS = "packages/lab packages/label"
_JUDGE_FITS = (
    "src/sidelight/probes/card.py src/sidelight/statistics/combination.py "
    "src/sidelight/training/recalibration.py src/sidelight/data/plots.py"
)
_TABLES = (
    "src/sidelight/data src/sidelight/cli src/sidelight/classifier.py "
    "packages/lab packages/guards examples .ci"
)
STAYS = (
    ("judge judges judging", r".*", f"{_LLM_JUDGES} tests .ci conftest.py", "LLM judges"),
    ("judge judges", r"Judge\w+|(scripted_)?judge|_?judges|test_\w+", "packages", "LLM judges"),
    ("judge judges", r".*", f"{_LABS} src/sidelight/data/annotators.py", "LLM judges"),
    ("judge judges", r"judges?|\w*judge_fit|JudgeFit", _JUDGE_FITS, "fits of LLM judges"),
    ("late", r"late", "tests/test_redaction.py", "the name of a probe"),
    ("judged", r"judged", "src/sidelight/judges", "a field of Granite Guardian's template"),
    ("page pages", r".*", "src/sidelight/server tests .ci packages/guards", "web pages, and docs"),
    ("page pages", r".*", "packages/lab packages/label packages/llama", "web pages, and docs"),
    ("page", r"page_size_bytes", "packages/vllm", "pages of vLLM's KV cache"),
    ("column columns", r".*", f"{_TABLES} packages/label tests", "columns of files and tables"),
    ("column columns", r"columns?", "src/sidelight/training", "columns of files"),
    ("column", r"add_column|column_stack|column_or_1d", "*", "rich, NumPy and scikit-learn"),
    ("mark marks", r"mark|marks", "*", "pytest's marks"),
    ("panel", r"[Pp]anel", "src/sidelight/demo", "rich's panels"),
    ("panel panels", r"panels?|panel_queries|test_every_panel\w+", "tests", "Grafana's panels"),
    ("panels", r"panels", "packages/lab", "panels of a plot"),
    ("stage", r"\w*[sS]econd_?[sS]tage\w*", "*", "an LLM judge as the second stage of a cascade"),
    ("stage", r"TwoStage|(token|layer)_stage", "src/sidelight/probes", "names of stored tensors"),
    ("stage", r"STAGE_MISSING|\w*pipeline_stage\w*", "*", "pipeline-parallel stages"),
    ("early", r"early_exit|\w*early_stopping\w*", "*", "early exit, early stopping"),
    ("early", r"_EARLY_STOPPING", "packages/lab", "early stopping"),
    ("held", r"\w*(held_out|HELD_OUT)\w*", "*", "held-out data"),
    ("reference", r"\w*(reference|REFERENCE)\w*", "*", "reference implementations and pages"),
    ("given", r"given", "*", "hypothesis's decorator"),
    ("unit", r"unit|unit_scale", "*", "units of progress bars and measurements"),
    ("unit", r"UNIT", "tests/test_deploy.py", "a systemd unit"),
    ("quiet", r"_?is_quiet|quiet|test_quiet\w+", "*", "work without progress bars"),
    ("identity", r"identity|Identity", "*", "the identity function"),
    ("view", r"view|view_as", "*", "views of tensors"),
    ("manifest manifests", r"manifests?", "packages/llama", "Ollama's manifests"),
    ("watched", r"WatchedFileHandler", "*", "a class of the standard library"),
    ("parts", r"parts", "*", "pathlib's parts of a path"),
    (
        "part parts",
        r"ContentPart|_as_parts|_parse_part",
        "src",
        "content parts of messages",
    ),
    ("other others", r"test_\w+", "*", "a determiner within a sentence"),
)

# What a native engineer would not write.
PHRASES = (
    r"nobody",
    r"whoever",
    r"somebody",
    r"everybody",
    r"anybody",
    r"judgements?",
    r"worths",
    r"ordinary traffic",
    r"ordinary conversations?",
    r"as \w+ as may be",
)
# Texts that are data or records, not prose of ours.
DATA = (
    "packages/lab/docs/experiments/*",
    "examples/support_tickets.py",
    ".ci/glossary.py",
    "tests/test_glossary.py",
)

_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_PHRASE = re.compile(rf"\b(?:{'|'.join(PHRASES)})\b", re.IGNORECASE)
_INSTEAD = {word: instead for instead, words in LEAVES.items() for word in words.split()}


def identifiers(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Each identifier of a file, with its line."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(name) | ast.Attribute(_, name) | ast.arg(name):
                yield name, node.lineno
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name, node.lineno
            case ast.keyword(str(name)):
                yield name, node.lineno
            case ast.alias(name, other_name):
                yield from ((word, node.lineno) for word in (other_name or name).split("."))
            case ast.ExceptHandler(_, str(name)) | ast.MatchAs(_, str(name)):
                yield name, node.lineno
            case _:
                pass


def excuses(stay: tuple[str, str, str, str], word: str, name: str, path: str) -> bool:
    """Whether an entry of `STAYS` lets a word be in an identifier of a file."""
    words, pattern, folders, _ = stay
    is_in = folders == "*" or any(f"{path}/".startswith(f"{each}/") for each in folders.split())
    return is_in and word in words.split() and re.fullmatch(pattern, name) is not None


def leaving(source: str) -> Iterator[tuple[str, str, int]]:
    """Each word of `LEAVES` in an identifier, with the identifier and its line."""
    for name, line in sorted({*identifiers(ast.parse(source))}, key=lambda each: each[1]):
        words = {word.lower() for word in _WORDS.findall(name)}
        yield from ((word, name, line) for word in sorted(words & _INSTEAD.keys()))


def wrong_names(source: str, path: str) -> Iterator[str]:
    """A line for each identifier that has a word of `LEAVES`."""
    for word, name, line in leaving(source):
        if not any(excuses(stay, word, name, path) for stay in STAYS):
            yield f"{path}:{line}: '{name}' has '{word}'. Write {_INSTEAD[word]}."


def prose(source: str, path: str) -> Iterator[tuple[int, str]]:
    """The lines of a file that are prose: of Python, comments and strings of several words."""
    if not path.endswith(".py"):
        yield from enumerate(source.splitlines(), 1)
        return
    is_test = "/tests/" in f"/{path}"
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        is_text = token.type == tokenize.STRING and " " in token.string
        is_ours = token.string.startswith('"""') or not is_test
        if token.type == tokenize.COMMENT or (is_text and is_ours):
            yield from enumerate(token.string.splitlines(), token.start[0])


def wrong_phrases(source: str, path: str) -> Iterator[str]:
    """A line for each phrase of `PHRASES` in prose."""
    for line, text in prose(source, path):
        for phrase in _PHRASE.findall(text):
            yield f"{path}:{line}: '{phrase}' is no phrase of ours. Say who, or write a passive."


def tracked(folder: Path) -> Iterator[tuple[str, str]]:
    """Path and text of each file that is checked; this one has the words as texts."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    for path in sorted(listed.splitlines()):
        is_data = any(fnmatch.fnmatch(path, data) for data in DATA)
        is_text = path.endswith((".py", ".md", ".html", ".js"))
        if is_text and not is_data and (folder / path).is_file():
            yield path, (folder / path).read_text("utf-8")


def problems(folder: Path) -> Iterator[str]:
    """What the tracked files of a folder have against the glossary."""
    for path, source in tracked(folder):
        if path.endswith(".py"):
            yield from wrong_names(source, path)
        yield from wrong_phrases(source, path)


def main() -> int:
    """Print what is wrong; 1 if anything is."""
    found = [*problems(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)]
    print("\n".join(found) or "The glossary holds.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
