"""Background traffic that an LLM writes: what is kept of it, and where.

``writer.py`` has the LLM write, from the openings of ``seeds.json``.
"""

import gzip
import json
import re
import warnings
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import HashingVectorizer

from sidelight.backbone import TransformersBackbone, UnloadedBackbone
from sidelight.data.loading import load_examples
from sidelight.errors import SidelightError
from sidelight.progress import progress
from sidelight.prompts import control_tokens
from sidelight.storage import replacing
from sidelight.training.settings import Background, Turns
from sidelight_lab.background.writer import ROWS, write_batch

CONVERSATIONS = 500
# Cosine of the counts of character 5-grams from which two conversations count as one.
_SIMILAR = 0.8
# A loop compresses better than ordinary text, code and tables do (Radford et al. 2022).
_LOOP_COMPRESSION = 4.5
_LOOP_SHARE = 0.25
_LOOP_CHARACTERS = 120
# What a model tells of violence is left out: it may be what a probe is to find.
_VIOLENCE = re.compile(
    r"\b(hatr|kill|murder|nazi|porn|raped?\b|sexual|slaughter|suicid|terroris|tortur|weapon)", re.I
)


def read_background(path: Path) -> Background:
    """The conversations of a file alone.

    Raises:
        SidelightError: There is no such file, or no text in it.
    """
    items = load_examples(path, label=None).items
    return Background(tuple(item.messages for item in items), private=len(items))


def write_background(
    backbone: TransformersBackbone, count: int, path: Path, *, seed: int = 0
) -> Background:
    """Has the LLM write a set of conversations, and keeps it as JSON Lines.

    A killed run continues after its last batch if it is called again.

    Args:
        backbone: The LLM.
        count: The number of conversations, after cleaning.
        path: The file, which is replaced when all are written.
        seed: Decides all samples; each batch has a seed of its own.

    Raises:
        SidelightError: Nothing that the LLM wrote can be used.
    """
    batches = path.with_name(f"{path.name}.batches")
    run = {"model": backbone.fingerprint.digest, "seed": seed}
    written = _resumed(batches, run)
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = without_duplicates([turns for batch in written for turns in batch])
    with progress("Writing background traffic", count, unit="conversations") as bar:
        bar.advance(min(len(kept), count))
        # Of a model that writes nothing of use, no more than four times the batches are tried.
        while len(kept) < count and len(written) < 4 * (count // ROWS + 1):
            drafts = map(tuple, write_batch(backbone, len(written), seed))
            written.append([turns for turns in drafts if is_usable(turns, backbone)])
            line = {**run, "conversations": [_as_cell(turns) for turns in written[-1]]}
            with batches.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            before = len(kept)
            kept = without_duplicates([turns for batch in written for turns in batch])
            bar.advance(min(len(kept), count) - min(before, count))
    if not kept:
        raise SidelightError(
            f"{backbone.name} wrote no conversation of use in {len(written)} batches. Name a file "
            "of ordinary texts instead, 'packaged' or 'none'."
        )
    if len(kept) < count:
        warnings.warn(
            f"{backbone.name} wrote {len(kept)} conversations of use, of {count}.", stacklevel=2
        )
    save_background(kept[:count], path)
    batches.unlink()
    return Background(tuple(kept[:count]))


def save_background(conversations: Iterable[Turns], path: Path) -> None:
    """Writes conversations as JSON Lines with one column, ``text``; compressed if so named."""
    rows = ({"text": _as_cell(turns)} for turns in conversations)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    with replacing(path) as partial:
        # Without the time, equal sets are equal files.
        partial.write_bytes(gzip.compress(lines, mtime=0) if path.suffix == ".gz" else lines)


def _as_cell(turns: Turns) -> str | list[dict[str, str]]:
    if [turn.role for turn in turns] == ["user"]:
        return turns[0].content
    return [{"role": turn.role, "content": turn.content} for turn in turns]


def _resumed(batches: Path, run: Mapping[str, object]) -> list[list[Turns]]:
    """The batches that an earlier run with the same model and seed has finished."""
    written: list[list[Turns]] = []
    # Not splitlines: a text may hold U+2028, which ends no line of the file.
    lines = batches.read_text("utf-8").split("\n") if batches.exists() else []
    for line in lines:
        try:
            batch = json.loads(line)
        except ValueError:
            break  # The end, or a line that the run was killed in.
        if {name: batch[name] for name in run} != run:
            break
        rows = [{"text": cell} for cell in batch["conversations"]]
        written.append([e.messages for e in load_examples(rows, label=None).items] if rows else [])
    batches.parent.mkdir(parents=True, exist_ok=True)
    batches.write_text("".join(f"{line}\n" for line in lines[: len(written)]), "utf-8")
    return written


def is_usable(turns: Turns, backbone: TransformersBackbone | UnloadedBackbone) -> bool:
    """Whether the backbone reads all turns, and none is empty, violent, loops or names a token."""
    names = control_tokens(backbone.tokenizer).values()
    for turn in turns:
        text = turn.content
        if not text.strip() or _is_loop(text) or _VIOLENCE.search(text):
            return False
        if any(name in text for name in names):
            return False
    try:
        backbone.encoder.encode(turns)
    except SidelightError:
        return False
    return True


def _is_loop(text: str) -> bool:
    content = text.encode()
    if len(content) < _LOOP_CHARACTERS:
        return False
    grams = list(zip(*(text.split()[start:] for start in range(4)), strict=False))
    repeated = 1 - len(set(grams)) / max(1, len(grams))
    return repeated > _LOOP_SHARE or len(content) / len(zlib.compress(content)) > _LOOP_COMPRESSION


def without_duplicates(conversations: Sequence[Turns]) -> list[Turns]:
    """The first of all that are equal but for case and spacing, or that share most 5-grams."""
    keys = [
        " ".join(word for turn in turns for word in turn.content.casefold().split())
        for turns in conversations
    ]
    first = {key: row for row, key in reversed([*enumerate(keys)])}
    rows = sorted(first.values())
    if not rows:
        return []
    vectorizer = HashingVectorizer(analyzer="char", ngram_range=(5, 5), alternate_sign=False)
    grams: Any = vectorizer.transform([keys[row] for row in rows])
    cosines = np.triu((grams @ grams.T).toarray(), 1).max(axis=0)
    return [
        conversations[row] for row, cosine in zip(rows, cosines, strict=True) if cosine <= _SIMILAR
    ]
