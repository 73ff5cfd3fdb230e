"""Near-duplicates: texts that are the same except for a number, a name, a word or a typo.

A held-out text says nothing about new texts if another version of it was used in training, so
splits and folds keep such texts together. Similarity is the cosine of character 4-grams, with all
numbers treated as equal.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from zlib import crc32

import numpy as np
from jaxtyping import Bool, Int

from sidelight.types import Flags, Numbers

# Cosine from which two texts are near-duplicates.
_COSINE = 0.75
# Number of folds that the groups must allow: a group has at most the rows of one fold, and a label
# has at least this many groups.
_FOLDS = 5
# Total length of the chunks sampled from a long text, and the longest chunk.
_MOST_CHARACTERS, _CHUNK = 2000, 125
# Mean distance of chunk boundaries, in characters.
_BETWEEN = 64
_FEATURES = 2**16
# More texts are compared in blocks of alphabetical neighbours, at a minute per block on one core.
_MOST_TEXTS = 10_000
_MEMORY_MIB = 64
# Number of most similar texts found for each text; one text of each group then finds the rest.
_NEIGHBOURS = 20


@dataclass(frozen=True)
class NearDuplicates:
    """The near-duplicates among some rows.

    Attributes:
        texts: Index of each row's text; equal texts share an index.
        left: First text of each pair of near-duplicates.
        right: Second text of each pair.
        priorities: Priority of each pair; if a group would become too large, the pairs with the
            lowest priority are dropped first.
    """

    texts: Int[Numbers, " row"]
    left: Int[Numbers, " pair"]
    right: Int[Numbers, " pair"]
    priorities: Int[Numbers, " pair"]

    @staticmethod
    def among(keys: Sequence[str]) -> "NearDuplicates":
        """Compare the texts of the rows; equal keys mean equal texts."""
        numbers: dict[str, int] = {}
        texts = np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)
        left, right = _pairs([*numbers])
        return NearDuplicates(texts, left, right, np.zeros_like(left))

    def select(self, rows: Sequence[int]) -> "NearDuplicates":
        """Restrict to these rows without comparing texts again."""
        present, texts = np.unique(self.texts[list(rows)], return_inverse=True)
        numbers = np.full(int(self.texts.max(initial=-1)) + 1, -1)
        numbers[present] = np.arange(len(present))
        left, right = numbers[self.left], numbers[self.right]
        remain = (left >= 0) & (right >= 0)
        return NearDuplicates(texts, left[remain], right[remain], self.priorities[remain])

    def joined_by(self, columns: Iterable[Sequence[object]]) -> "NearDuplicates":
        """Also join the texts of rows that share a value in a column.

        Args:
            columns: Values of each row; None joins the row to no other. If groups become too large,
                columns are dropped from the last to the first, before near-duplicates.
        """
        columns = [*columns]
        pairs = [(self.left, self.right, self.priorities + len(columns))]
        for priority, column in enumerate(reversed(columns)):
            first: dict[object, int] = {}
            joined = [
                (text, first[value])
                for text, value in zip(self.texts.tolist(), column, strict=True)
                if value is not None and first.setdefault(value, text) != text
            ]
            left, right = np.array(joined, dtype=np.int64).reshape(-1, 2).T
            pairs.append((left, right, np.full(len(joined), priority)))
        return NearDuplicates(self.texts, *map(np.concatenate, zip(*pairs, strict=True)))

    def groups(self, strata: Bool[Flags, "row stratum"]) -> tuple[Int[Numbers, " row"], int]:
        """The group of each row, and the number of rows whose groups had to be divided.

        If a group would have more than a fifth of the rows, or a label fewer than five groups, its
        column links are dropped, from the last column to the first, and then its near-duplicates.

        Args:
            strata: The labels of each row.
        """
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        count = int(self.texts.max(initial=-1)) + 1
        # Lowest priority that joins a text; one above the highest joins none.
        levels = np.zeros(count, dtype=np.int64)
        most = int(self.priorities.max(initial=0)) + 1
        holds = np.zeros((count, strata.shape[1]), dtype=np.bool_)
        np.logical_or.at(holds, self.texts, strata)
        while True:
            joined = self.priorities >= np.maximum(levels[self.left], levels[self.right])
            pairs = (self.left[joined], self.right[joined])
            graph = coo_array((np.ones(joined.sum()), pairs), (count, count))
            groups = connected_components(graph, directed=False)[1].astype(np.int64)
            rows = np.bincount(groups[self.texts], minlength=count)[groups]
            is_divided = rows > max(len(self.texts) / _FOLDS, 1)
            for stratum in holds.T:
                if len(np.unique(groups[stratum])) < min(_FOLDS, stratum.sum()):
                    is_divided |= np.isin(groups, groups[stratum])
            is_divided &= (np.bincount(groups)[groups] > 1) & (levels < most)
            if not is_divided.any():
                # Numbered in the order of the rows.
                first = np.unique(groups[self.texts], return_index=True)[1]
                divided = levels[self.texts] > 0
                return np.argsort(np.argsort(first))[groups[self.texts]], int(divided.sum())
            levels[is_divided] += 1


def are_alike(
    texts: Sequence[str], references: Sequence[str], *, cosine: float
) -> Bool[Flags, " text"]:
    """Whether each text is a near-duplicate of one of the others."""
    from sklearn import config_context
    from sklearn.neighbors import NearestNeighbors

    if not (len(texts) and len(references)):
        return np.zeros(len(texts), dtype=np.bool_)
    vectors = _vectors([_form(text) for text in (*references, *texts)])
    nearest: Any = NearestNeighbors(n_neighbors=1, metric="cosine", algorithm="brute")
    with config_context(working_memory=_MEMORY_MIB):
        distances, _ = nearest.fit(vectors[: len(references)]).kneighbors(
            vectors[len(references) :]
        )
    return distances[:, 0] <= 1 - cosine


def _pairs(texts: Sequence[str]) -> tuple[Int[Numbers, " pair"], Int[Numbers, " pair"]]:
    """Pairs of near-duplicates."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components
    from sklearn import config_context
    from sklearn.neighbors import NearestNeighbors

    first: dict[str, int] = {}
    forms = [_form(text) for text in texts]
    same = np.array([first.setdefault(form, index) for index, form in enumerate(forms)], np.int64)
    repeated = np.flatnonzero(same != np.arange(len(texts)))
    pairs = [(repeated, same[repeated])]
    distinct = np.array([index for _, index in sorted(first.items())], dtype=np.int64)
    for chunk in np.array_split(distinct, max(1, -(-len(distinct) // _MOST_TEXTS))):
        options: dict[str, Any] = {"metric": "cosine", "algorithm": "brute"}
        vectors, rows = _vectors([forms[index] for index in chunk]), np.arange(len(chunk))
        while len(rows) > 1:
            count = min(_NEIGHBOURS, len(rows) - 1)
            nearest: Any = NearestNeighbors(n_neighbors=count, **options)
            with config_context(working_memory=_MEMORY_MIB):
                distances, neighbours = nearest.fit(vectors[rows]).kneighbors()
            left, rank = np.nonzero(distances <= 1 - _COSINE)
            if not len(left):
                break
            right = neighbours[left, rank]
            pairs.append((chunk[rows[left]], chunk[rows[right]]))
            # Texts with more near-duplicates than are searched for are found through one text of
            # each group.
            graph = coo_array((np.ones(len(left)), (left, right)), (len(rows), len(rows)))
            groups = connected_components(graph, directed=False)[1]
            rows = rows[np.unique(groups, return_index=True)[1]]
    left, right = map(np.concatenate, zip(*pairs, strict=True))
    return left, right


def _vectors(texts: Sequence[str]) -> Any:
    """A sparse row for each text."""
    from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer

    options: dict[str, Any] = {"alternate_sign": False, "norm": None, "dtype": np.float32}
    counting = HashingVectorizer(
        analyzer="char_wb", ngram_range=(4, 4), n_features=_FEATURES, **options
    )
    counts: Any = counting.transform(texts)
    weighting: Any = TfidfTransformer(sublinear_tf=True).fit(counts)
    # Square root of the usual weight: an instruction that many texts share does not make them
    # near-duplicates, and replacing a rare word does not separate them.
    weighting.idf_ = np.sqrt(weighting.idf_)
    return weighting.transform(counts)


def _form(text: str) -> str:
    """Normalised text: every number becomes 0, and a long text is reduced to a sample of chunks.

    Chunk boundaries depend on the surrounding characters, and the chunks with the lowest hashes are
    sampled. An inserted paragraph leaves most of them unchanged (Broder 1997, "On the resemblance
    and containment of documents").
    """
    text = re.sub(r"\d+", "0", text)
    if len(text) <= _MOST_CHARACTERS:
        return text
    starts = [0, *_chunk_starts(text), len(text)]
    chunks = {
        text[place : min(place + _CHUNK, end)]
        for start, end in pairwise(starts)
        for place in range(start, end, _CHUNK)
    }
    chosen: list[str] = []
    left = _MOST_CHARACTERS
    for chunk in sorted(chunks, key=_rank):
        if left <= 0:
            break
        chosen.append(chunk)
        left -= len(chunk)
    return " ".join(chosen)


def _rank(chunk: str) -> tuple[int, str]:
    return crc32(chunk.encode("utf-8", "surrogatepass")), chunk


def _chunk_starts(text: str) -> list[int]:
    """Chunk boundaries, by a hash of the four preceding characters."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    # xxHash's multipliers; uint32 overflow is intended.
    factors = (668265263, 3266489917, 2246822519, 2654435761)
    window = sum(
        codes[place : len(codes) + place - 3] * np.uint32(factor)
        for place, factor in enumerate(factors)
    )
    mixed = (window ^ (window >> np.uint32(15))) * np.uint32(2246822519)
    return (np.flatnonzero((mixed ^ (mixed >> np.uint32(13))) % _BETWEEN == 0) + 4).tolist()
