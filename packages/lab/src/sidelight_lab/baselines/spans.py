"""Baselines for span probes; each computes logits for the tokens or words of texts.

Calibration and thresholds are not here: ``bench/spans.py`` sets them for all rows as for a probe.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier

from sidelight.data.examples import SpanExamples
from sidelight.data.spans import token_labels, words
from sidelight.training.dataset import Split, TokenPlaces
from sidelight.training.preparing import ProbeDataset
from sidelight.training.spans import TokenScores
from sidelight_lab.baselines.encoders import Encoder
from sidelight_lab.baselines.fine_tuning import (
    UNLABELLED,
    FineTunedEncoder,
    Item,
    SequenceClassifier,
    score_items,
)

# Function that returns the character ranges and the logits of each text's tokens.
Scorer = Callable[[SpanExamples], tuple[TokenPlaces, TokenScores]]

# Pseudo-count that the lexicon adds to each word's occurrences, labelled at the overall rate.
_PRIOR_WORDS = 4.0
# Number of words on each side of a word, and sizes of its character n-grams, read by `window`.
_WINDOW = 3
_NGRAM_SIZES = (1, 2, 3, 4)
# Inverse penalties; one is chosen on the validation texts.
_STRENGTHS = (1.0, 10.0)
# Minimum number of batches for fine-tuning an encoder.
_STEPS = 400


def lexicon(dataset: ProbeDataset) -> Iterator[Scorer]:
    """How often each word was labelled in training, regardless of its context."""
    names, labels = _labelled_words(dataset.training)
    seen, base = Counter(names), labels.mean(0)
    hits: dict[str, np.ndarray] = dict.fromkeys(seen, np.zeros(len(base)))
    for name, counts in zip(names, labels, strict=True):
        hits[name] = hits[name] + counts

    def logits(text: str) -> list[np.ndarray]:
        found = [(name, hits.get(name, 0) + _PRIOR_WORDS * base) for name in _names(text)]
        return [
            np.log(counts) - np.log(seen[name] + _PRIOR_WORDS - counts) for name, counts in found
        ]

    yield _of_words(logits, dataset)


def window(dataset: ProbeDataset) -> Iterator[Scorer]:
    """Logistic regressions on TF-IDF features of a word's characters, shape and neighbours."""
    _, labels = _labelled_words(dataset.training)
    # The inputs are already lists of features.
    options: dict[str, Any] = {"analyzer": list, "min_df": 2}
    vectorizer: Any = TfidfVectorizer(**options)
    inputs = vectorizer.fit_transform(
        [
            features
            for text, _ in dataset.training.span_examples.text_spans
            for features in _features(text)
        ]
    )
    targets = labels if labels.shape[1] > 1 else labels[:, 0]
    for strength in _STRENGTHS:
        model: Any = OneVsRestClassifier(LogisticRegression(C=strength, solver="liblinear"))
        model.fit(inputs, targets.astype(int))

        def logits(text: str, model: Any = model) -> Any:
            return model.decision_function(vectorizer.transform(_features(text)))

        yield _of_words(logits, dataset)


def encoder(dataset: ProbeDataset, tuning: FineTunedEncoder | None = None) -> Iterator[Scorer]:
    """A second, bidirectional model, fine-tuned to label its tokens."""
    batch_size = FineTunedEncoder.batch_size
    epochs = math.ceil(_STEPS * batch_size / len(dataset.training))
    tuning = tuning or FineTunedEncoder(epochs=epochs)
    reader = Encoder(tuning.path, max_tokens=tuning.max_tokens)

    def items_of(examples: SpanExamples) -> tuple[list[Item], TokenPlaces]:
        texts, spans_of = zip(*examples.text_spans, strict=True)
        # Character range of each token; (0, 0) for tokens added by the encoder.
        tokens = reader.tokens(texts, return_offsets_mapping=True)
        places: TokenPlaces = tokens["offset_mapping"]
        items: list[Item] = []
        rows = zip(texts, tokens["input_ids"], places, spans_of, strict=True)
        for text, ids, ranges, spans in rows:
            is_read = torch.tensor([start < end for start, end in ranges])
            labels = torch.from_numpy(
                token_labels(text, ranges, spans, examples.task.output_labels)
            ).long()
            labels[~is_read] = UNLABELLED
            items.append({"input_ids": torch.tensor(ids), "read": is_read, "labels": labels})
        return items, [[place for place in ranges if place[0] < place[1]] for ranges in places]

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SequenceClassifier(reader.body, dataset, labels_tokens=True)
        model = model.to(dataset.reader.device)
    tuning.tune(model, dataset, lambda split: items_of(split.span_examples)[0], seed=0)

    def scores(examples: SpanExamples) -> tuple[TokenPlaces, TokenScores]:
        items, places = items_of(examples)
        pairs = zip(items, score_items(model, items), strict=True)
        return places, [logits[: len(item["read"])][item["read"]] for item, logits in pairs]

    yield scores


def _names(text: str) -> list[str]:
    return [text[start:end].lower() for start, end in words(text)]


def _labelled_words(split: Split) -> tuple[list[str], np.ndarray]:
    """All words of the texts, with the labels of each."""
    rows, names = split.span_examples.text_spans, split.task.output_labels
    labels = [token_labels(text, words(text), spans, names) for text, spans in rows]
    return [name for text, _ in rows for name in _names(text)], np.concatenate(labels)


def _features(text: str) -> list[list[str]]:
    """Features of each word."""
    names, features = _names(text), list[list[str]]()
    for place, (start, end) in enumerate(words(text)):
        word = f"<{text[start:end]}>"
        ngrams = [word[i : i + size] for size in _NGRAM_SIZES for i in range(len(word) - size + 1)]
        shape = re.sub(r"\d", "0", re.sub(r"[A-Z]", "A", re.sub(r"[a-z]", "a", word)))
        near = range(max(0, place - _WINDOW), min(len(names), place + _WINDOW + 1))
        features.append([*ngrams, shape, *(f"{i - place}:{names[i]}" for i in near)])
    return features


def _of_words(logits: Callable[[str], Any], dataset: ProbeDataset) -> Scorer:
    outputs = dataset.task.outputs

    def scores(examples: SpanExamples) -> tuple[TokenPlaces, TokenScores]:
        texts = [item.span_text for item in examples.items]
        rows = [logits(text) if words(text) else [] for text in texts]
        return [*map(words, texts)], [
            np.array(word_scores, float).reshape(-1, outputs) for word_scores in rows
        ]

    return scores
