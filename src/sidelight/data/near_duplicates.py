"""Which texts are near-duplicates: alike but for a number, a name, a word or a typing error.

A text that is left out says nothing about new texts if another version of it was trained on, so
splits and folds keep such texts together. Two texts are alike by the cosine of their character
4-grams, where digits count as one and the same.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from sidelight.types import Flags, Numbers, Values

# Cosines from which texts are joined. Where too many would be, only higher ones count, and at last
# none.
_COSINES = (0.75, 0.85, 0.95, np.inf)
# Parts that the groups must allow: a group has at most the rows of one, and a label has as many.
_PARTS = 5
# Of a long text so many stretches are compared.
_MOST_CHARACTERS, _STRETCHES = 1000, 8
_FEATURES = 2**16
# With more texts, cosines are those of random projections; their error is .02 at .75.
_EXACT_TEXTS = 2000
_DIMENSIONS: Any = 512
# More texts are compared within parts of neighbours in the alphabet: 10 s a part on one core.
_MOST_TEXTS = 20_000
_BLOCK = 512
# Of a text that is like many others, the most similar ones connect it to the rest.
_NEIGHBOURS = 20


@dataclass(frozen=True)
class NearDuplicates:
    """Which rows have alike texts.

    Attributes:
        texts: The number of each row's text; equal texts have one number.
        left: A text of each pair of alike texts.
        right: The other one.
        cosines: How alike they are.
    """

    texts: Int[Numbers, " row"]
    left: Int[Numbers, " pair"]
    right: Int[Numbers, " pair"]
    cosines: Float[Values, " pair"]

    @staticmethod
    def among(keys: Sequence[str]) -> "NearDuplicates":
        """Compares the rows' texts; equal keys are equal texts."""
        numbers: dict[str, int] = {}
        texts = np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)
        return NearDuplicates(texts, *_pairs([*numbers]))

    def select(self, rows: Sequence[int]) -> "NearDuplicates":
        """Only these rows; nothing is compared again."""
        present, texts = np.unique(self.texts[list(rows)], return_inverse=True)
        numbers = np.full(int(self.texts.max(initial=-1)) + 1, -1)
        numbers[present] = np.arange(len(present))
        left, right = numbers[self.left], numbers[self.right]
        kept = (left >= 0) & (right >= 0)
        return NearDuplicates(texts, left[kept], right[kept], self.cosines[kept])

    def groups(self, strata: Bool[Flags, "row stratum"]) -> tuple[Int[Numbers, " row"], int]:
        """The number of each row's group, and how many rows' groups had to be divided.

        Where a group would have more than a fifth of the rows, or a label fewer than five groups,
        texts are joined by higher cosines alone, and at last not at all.

        Args:
            strata: The labels of each row.
        """
        count, steps = int(self.texts.max(initial=-1)) + 1, np.array(_COSINES)
        levels = np.zeros(count, dtype=np.int64)
        holds = np.zeros((count, strata.shape[1]), dtype=np.bool_)
        np.logical_or.at(holds, self.texts, strata)
        while True:
            joined = self.cosines >= steps[np.maximum(levels[self.left], levels[self.right])]
            groups = _components(count, self.left[joined], self.right[joined])
            rows = np.bincount(groups[self.texts], minlength=count)[groups]
            is_divided = rows > max(len(self.texts) / _PARTS, 1)
            for stratum in holds.T:
                if len(np.unique(groups[stratum])) < min(_PARTS, stratum.sum()):
                    is_divided |= stratum
            is_divided &= (np.bincount(groups)[groups] > 1) & (levels < len(steps) - 1)
            if not is_divided.any():
                # Numbered in the order of the rows.
                first = np.unique(groups[self.texts], return_index=True)[1]
                divided = levels[self.texts] > 0
                return np.argsort(np.argsort(first))[groups[self.texts]], int(divided.sum())
            levels[is_divided] += 1


def _pairs(
    texts: Sequence[str],
) -> tuple[Int[Numbers, " pair"], Int[Numbers, " pair"], Float[Values, " pair"]]:
    """Texts that are alike, with their cosines."""
    order = np.arange(len(texts))
    if len(texts) > _MOST_TEXTS:
        order = np.array(sorted(range(len(texts)), key=texts.__getitem__))
    lefts, rights, cosines = [np.empty(0, np.int64)], [np.empty(0, np.int64)], [np.empty(0)]
    for part in np.array_split(order, max(1, -(-len(texts) // _MOST_TEXTS))):
        vectors = _vectors([str(texts[index]) for index in part])
        for start in range(0, len(part), _BLOCK):
            product = vectors[start : start + _BLOCK] @ vectors[start:].T
            block = product if isinstance(product, np.ndarray) else product.toarray()
            block[np.tril_indices(*block.shape[:1], m=block.shape[1])] = 0
            left, right = _nearest(block)
            lefts.append(part[left + start])
            rights.append(part[right + start])
            cosines.append(block[left, right].astype(np.float64))
    return np.concatenate(lefts), np.concatenate(rights), np.concatenate(cosines)


def _vectors(texts: Sequence[str]) -> Any:
    """Of length 1, a row for each text."""
    from sklearn.feature_extraction.text import HashingVectorizer
    from sklearn.preprocessing import normalize
    from sklearn.random_projection import SparseRandomProjection

    options: dict[str, Any] = {"alternate_sign": False, "norm": None, "dtype": np.float32}
    counting = HashingVectorizer(
        analyzer="char_wb", ngram_range=(4, 4), n_features=_FEATURES, **options
    )
    counts: Any = counting.transform([re.sub(r"\d", "0", _shortened(text)) for text in texts])
    documents = np.bincount(counts.indices, minlength=_FEATURES)
    # The square root of the usual weight: an instruction that many texts share does not make them
    # alike, and a rare word in place of another does not make them differ.
    rarity = np.sqrt(1 + np.log((1 + len(texts)) / (1 + documents)))
    counts.data = ((1 + np.log(counts.data)) * rarity[counts.indices]).astype(np.float32)
    if len(texts) > _EXACT_TEXTS:
        projection = SparseRandomProjection(_DIMENSIONS, dense_output=True, random_state=0)
        dense: Any = projection.fit_transform(counts)
        return normalize(dense.astype(np.float32))
    return normalize(counts)


def _shortened(text: str) -> str:
    if len(text) <= _MOST_CHARACTERS:
        return text
    # Templates make beginnings and ends alike, so most of what is compared lies between them.
    size = _MOST_CHARACTERS // _STRETCHES
    starts = np.linspace(0, len(text) - size, _STRETCHES).astype(int)
    return " ".join(text[start : start + size] for start in starts)


def _nearest(
    cosines: Float[np.ndarray, "left right"],
) -> tuple[Int[Numbers, " pair"], Int[Numbers, " pair"]]:
    """Where two texts are alike; of a row with many such places the highest."""
    alike = cosines >= _COSINES[0]
    for row in np.flatnonzero(alike.sum(1) > _NEIGHBOURS):
        # Not by the least of them: texts that differ in numbers alone are all equally alike.
        alike[row] = False
        alike[row, np.argpartition(cosines[row], -_NEIGHBOURS)[-_NEIGHBOURS:]] = True
    left, right = np.nonzero(alike)
    return left, right


def _components(
    texts: int, left: Int[Numbers, " pair"], right: Int[Numbers, " pair"]
) -> Int[Numbers, " text"]:
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    graph = coo_matrix((np.ones(len(left)), (left, right)), (texts, texts))
    return connected_components(graph, directed=False)[1].astype(np.int64)
