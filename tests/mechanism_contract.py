"""Laws of a mechanism: the streaming form computes what the dense form defines.

A test file subclasses ``MechanismContract`` and has three fixtures: ``variant`` (a name and
options), ``equations`` (in numpy, by name), and ``integrated`` (the names of those whose features
are not linear in the columns, so that shares are integrated gradients).
"""

import math
from copy import deepcopy
from itertools import pairwise
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sidelight.probes.mechanisms import attention
from sidelight.probes.mechanisms.base import Geometry, build_mechanism, mechanism_spec
from sidelight.probes.ragged import Ragged

LAYERS, WIDTH = 3, 32
# float32: the same sums of up to a few hundred products, in another order.
ROUNDING = {"rtol": 1e-4, "atol": 2e-5}
POISON = [math.nan, math.inf, -math.inf, 3e38]


def built(name, options, outputs, layers=LAYERS):
    """A mechanism of random parameters, large enough that every one of them matters."""
    torch.manual_seed(0)
    mechanism = build_mechanism(
        mechanism_spec(name, options), Geometry(layers, WIDTH, outputs)
    ).eval()
    for parameter in mechanism.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return mechanism


def drawn(lengths, seed):
    """Hidden states of several texts, each ``[layer, token, width]``."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(LAYERS, n, WIDTH, generator=generator) for n in lengths]


def dense(mechanism, texts, padding=0.0, extra=0):
    """The dense form on the texts padded with anything."""
    longest = max(states.shape[1] for states in texts) + extra
    hidden = torch.full((len(texts), LAYERS, longest, WIDTH), padding)
    mask = torch.zeros(len(texts), longest, dtype=torch.bool)
    for row, states in enumerate(texts):
        hidden[row, :, : states.shape[1]] = states
        mask[row, : states.shape[1]] = True
    return mechanism(hidden, mask)


def projected(mechanism, states):
    """What a tap keeps of each token: ``[token, layer, column]``."""
    return torch.einsum("ltd,ldm->tlm", states, mechanism.projections())


def summarised(mechanism, chunks):
    """One packed call over all pieces."""
    projections = [projected(mechanism, chunk) for chunk in chunks]
    lengths = torch.tensor([len(chunk) for chunk in projections])
    return mechanism.summarise(Ragged(torch.cat(projections), lengths))


def streamed(mechanism, states):
    """All texts at once, in one piece each."""
    return mechanism.finish(summarised(mechanism, states))


def streamed_in_chunks(mechanism, states, random):
    """In up to four pieces, packed in any order, neighbours merged in any, several at a time."""
    texts_in_chunks = []
    for text in states:
        tokens = text.shape[1]
        edges = sorted(random.randint(0, tokens) for _ in range(random.randint(0, 3)))
        texts_in_chunks.append([text[:, a:b] for a, b in pairwise([0, *edges, tokens])])
    places = [
        (owner, place)
        for owner, text_chunks in enumerate(texts_in_chunks)
        for place in range(len(text_chunks))
    ]
    random.shuffle(places)
    states_of_chunks = summarised(
        mechanism, [texts_in_chunks[owner][place] for owner, place in places]
    ).split()
    found = dict(zip(places, states_of_chunks, strict=True))
    waiting = [
        [found[i, place] for place in range(len(text_chunks))]
        for i, text_chunks in enumerate(texts_in_chunks)
    ]
    while any(len(text_chunks) > 1 for text_chunks in waiting):
        busy = [text_chunks for text_chunks in waiting if len(text_chunks) > 1]
        chosen = [random.randrange(len(text_chunks) - 1) for text_chunks in busy]
        lefts = Ragged.pack(
            [text_chunks.pop(at) for text_chunks, at in zip(busy, chosen, strict=True)]
        )
        rights = Ragged.pack(
            [text_chunks.pop(at) for text_chunks, at in zip(busy, chosen, strict=True)]
        )
        merged = mechanism.merge(lefts, rights).split()
        for text_chunks, at, state in zip(busy, chosen, merged, strict=True):
            text_chunks.insert(at, state)
    return mechanism.finish(Ragged.pack([text_chunks[0] for text_chunks in waiting]))


seeds = st.integers(0, 2**16)


# In logits: float32 sums of some hundred shares, and what integrated gradients may miss.
COMPLETE = 1e-4


def shares_of(mechanism, tokens, output):
    with torch.no_grad():
        outputs = mechanism.logits(tokens).shape[1]
    return mechanism.shares(tokens, torch.eye(outputs)[output].expand(len(tokens.lengths), -1))


def weights_under(weights, prefix):
    return {key[len(prefix) :]: value for key, value in weights.items() if key.startswith(prefix)}


def softmax(scores):
    weights = np.exp(scores - np.max(scores, 0))
    return weights / weights.sum(0)


def gated(tokens, parameters):
    """A softmax over tokens for each head, and the last token."""
    weights = softmax(tokens @ parameters["gate"])
    values = np.einsum("td,dhc->thc", tokens, parameters["value"])
    return np.einsum("th,thc->c", weights, values) + tokens[-1] @ parameters["last"]


class MechanismContract:
    """A test class that inherits it needs the fixtures of its file."""

    @pytest.fixture(scope="class", params=[1, 3], ids=["binary", "three-classes"])
    @classmethod
    def mechanism(cls, request, variant):
        return built(*variant, request.param)

    @pytest.mark.slow
    @settings(max_examples=10, deadline=None)
    @given(
        lengths=st.lists(st.integers(0, 9), min_size=1, max_size=4),
        seed=seeds,
        padding=st.sampled_from(POISON),
        extra=st.integers(0, 3),
    )
    @example(lengths=[1, 90, 2, 37, 90, 5], seed=0, padding=0.0, extra=0)
    def test_padded_and_chunked_forms_match_dense_form(
        self, mechanism, lengths, seed, padding, extra
    ):
        """Of each text alone, and NaN for a text without tokens, which disturbs no neighbour."""
        texts = drawn(lengths, seed)
        full = [states for states in texts if states.shape[1]]
        with torch.no_grad():
            expected = [dense(mechanism, [states]) for states in full]
            if expected:
                padded = dense(mechanism, full, padding, extra)
                torch.testing.assert_close(padded, torch.cat(expected), **ROUNDING)
            for actual in (
                streamed(mechanism, texts),
                streamed_in_chunks(mechanism, texts, Random(seed)),
            ):
                filled = torch.tensor(lengths) > 0
                assert actual[~filled].isnan().all()
                if expected:
                    torch.testing.assert_close(actual[filled], torch.cat(expected), **ROUNDING)

    @pytest.mark.slow
    @settings(max_examples=4, deadline=None)
    @given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4), seed=seeds)
    def test_dense_and_streaming_gradients_are_equal(self, mechanism, lengths, seed):
        texts = drawn(lengths, seed)
        weights = torch.randn(3, generator=torch.Generator().manual_seed(seed))

        def gradients(logits):
            loss = (logits * weights[: logits.shape[1]]).sum()
            return torch.autograd.grad(loss, list(mechanism.parameters()))

        padded = gradients(dense(mechanism, texts, math.nan, 1))
        for expected, actual in zip(padded, gradients(streamed(mechanism, texts)), strict=True):
            scale = max([1e-2, *expected.abs().flatten().tolist()])
            torch.testing.assert_close(actual / scale, expected / scale, **ROUNDING)

    @torch.no_grad()
    def test_huge_scores_do_not_overflow(self, mechanism):
        texts = [states * 1e4 for states in drawn([3, 8], 1)]
        actual = streamed_in_chunks(mechanism, texts, Random(0))
        assert actual.isfinite().all()
        # A score of 1e5 is rounded to 1e-2, and with it the ratio of two weights.
        torch.testing.assert_close(actual, dense(mechanism, texts), rtol=0.02, atol=1)

    def test_mechanism_matches_numpy_equation(self, variant, mechanism, equations):
        (states,) = drawn([7], 3)
        weights = {key: value.double().numpy() for key, value in mechanism.state_dict().items()}
        options = mechanism_spec(*variant).options
        expected = equations[variant[0]](weights, states.double().numpy(), **options)
        with torch.no_grad():
            actual = streamed(mechanism, [states])[0].numpy()
        np.testing.assert_allclose(actual, expected, **ROUNDING)

    def test_training_mode_is_exact_on_short_texts(self, mechanism):
        texts = drawn([3, attention.TRAINING_QUERIES], 0)
        with torch.no_grad():
            exact, trained_on = (
                streamed(mechanism, texts),
                streamed(deepcopy(mechanism).train(), texts),
            )
        assert torch.equal(trained_on, exact)

    @pytest.mark.parametrize("scale", [0.02, 1.0, 2.0])
    def test_token_and_layer_shares_sum_to_logit(self, variant, mechanism, integrated, scale):
        """Read off without a gradient's steps, unless features are not linear."""
        texts = [states * scale for states in drawn([1, 2, 9, 60], seed=int(scale))]
        with torch.inference_mode():
            # Some tokens come twice, as the embeddings of a word do.
            projections = [
                projected(mechanism, torch.cat([states, states[:, :2]], 1)) for states in texts
            ]
            tokens = Ragged(
                torch.cat(projections), torch.tensor([len(states) for states in projections])
            )
            logits = mechanism.logits(tokens)
        for output in range(logits.shape[1]):
            shares = shares_of(mechanism, tokens, output)
            assert shares.values.shape == tokens.values.shape[:2]
            total = shares.baseline + Ragged(shares.values.sum(1), tokens.lengths).sums()
            torch.testing.assert_close(total, logits[:, output].double(), atol=COMPLETE, rtol=0)
            assert (shares.steps == 0) == (variant[0] not in integrated)

    @torch.no_grad()
    @pytest.mark.parametrize("token", [0, 4, 19])
    def test_unread_token_makes_logits_nan(self, mechanism, token):
        """Its columns are NaN; a logit without it would be a verdict on part of a text."""
        projections = projected(mechanism, drawn([20], 2)[0])
        projections[token, 1] = math.nan
        halves = [mechanism.summarise(Ragged(p, torch.tensor([10]))) for p in projections.split(10)]
        assert mechanism.logits(Ragged(projections, torch.tensor([20]))).isnan().all()
        assert mechanism.finish(mechanism.merge(*halves)).isnan().all()
