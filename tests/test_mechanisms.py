"""Laws of every registered mechanism: the streaming form computes what the dense form defines."""

import math
from copy import deepcopy
from itertools import pairwise
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.special import ndtr

from sidelight.errors import SidelightError
from sidelight.mechanisms import attention, fusion
from sidelight.mechanisms.base import Geometry, build_mechanism, mechanism_names, mechanism_spec
from sidelight.ragged import Ragged

LAYERS, WIDTH = 3, 32
# Every registered mechanism by its defaults, and the options that take another way through it.
VARIANTS = [
    *((name, {}) for name in mechanism_names()),
    ("pooling", {"kind": "max"}),
    ("gate", {"activation": "identity"}),
    ("attention", {"pooling": "max"}),
    ("attention", {"factor": 16, "heads": 1}),
    ("attention", {"factor": 2, "heads": 8, "pooling": "max"}),
    ("readout", {"heads": 1}),
    ("fusion", {"rank": 3, "heads": 1}),
    ("blend", {"fusions": 1, "rank": 4}),
    ("spans", {"window": 1, "lookahead": 0, "rank": 3}),
    ("spans", {"window": 3, "lookahead": 4}),
]
# Their features are not linear in the columns, so their shares are integrated gradients.
INTEGRATED = ("fusion", "blend", "spans")
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


@pytest.fixture(scope="module", params=VARIANTS, ids=str)
def variant(request):
    return request.param


@pytest.fixture(scope="module", params=[1, 3], ids=["binary", "three-classes"])
def mechanism(request, variant):
    return built(*variant, request.param)


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
    return torch.einsum("ltd,ldm->tlm", states, mechanism.columns())


def summarised(mechanism, pieces):
    """One packed call over all pieces."""
    columns = [projected(mechanism, piece) for piece in pieces]
    lengths = torch.tensor([len(piece) for piece in columns])
    return mechanism.summarise(Ragged(torch.cat(columns), lengths))


def streamed(mechanism, states):
    """All texts at once, in one piece each."""
    return mechanism.finish(summarised(mechanism, states))


def streamed_in_pieces(mechanism, states, random):
    """In up to four pieces, packed in any order, neighbours merged in any, several at a time."""
    pieces = []
    for text in states:
        tokens = text.shape[1]
        edges = sorted(random.randint(0, tokens) for _ in range(random.randint(0, 3)))
        pieces.append([text[:, a:b] for a, b in pairwise([0, *edges, tokens])])
    places = [(owner, place) for owner, own in enumerate(pieces) for place in range(len(own))]
    random.shuffle(places)
    parts = summarised(mechanism, [pieces[owner][place] for owner, place in places]).split()
    found = dict(zip(places, parts, strict=True))
    waiting = [[found[i, place] for place in range(len(own))] for i, own in enumerate(pieces)]
    while any(len(own) > 1 for own in waiting):
        busy = [own for own in waiting if len(own) > 1]
        chosen = [random.randrange(len(own) - 1) for own in busy]
        lefts = Ragged.pack([own.pop(at) for own, at in zip(busy, chosen, strict=True)])
        rights = Ragged.pack([own.pop(at) for own, at in zip(busy, chosen, strict=True)])
        merged = mechanism.merge(lefts, rights).split()
        for own, at, state in zip(busy, chosen, merged, strict=True):
            own.insert(at, state)
    return mechanism.finish(Ragged.pack([own[0] for own in waiting]))


seeds = st.integers(0, 2**16)


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    seed=seeds,
    padding=st.sampled_from(POISON),
    extra=st.integers(0, 3),
)
@example(lengths=[1, 90, 2, 37, 90, 5], seed=0, padding=0.0, extra=0)
def test_padding_cutting_and_merging_give_the_dense_form(mechanism, lengths, seed, padding, extra):
    """Of each text alone, and NaN for a text without tokens, which disturbs no neighbour."""
    texts = drawn(lengths, seed)
    full = [states for states in texts if states.shape[1]]
    with torch.no_grad():
        alone = [dense(mechanism, [states]) for states in full]
        if alone:
            padded = dense(mechanism, full, padding, extra)
            torch.testing.assert_close(padded, torch.cat(alone), **ROUNDING)
        for actual in (
            streamed(mechanism, texts),
            streamed_in_pieces(mechanism, texts, Random(seed)),
        ):
            filled = torch.tensor(lengths) > 0
            assert actual[~filled].isnan().all()
            if alone:
                torch.testing.assert_close(actual[filled], torch.cat(alone), **ROUNDING)


@pytest.mark.slow
@settings(max_examples=4, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4), seed=seeds)
def test_gradients_of_both_forms_are_equal(mechanism, lengths, seed):
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
def test_huge_scores_do_not_overflow(mechanism):
    texts = [states * 1e4 for states in drawn([3, 8], 1)]
    actual = streamed_in_pieces(mechanism, texts, Random(0))
    assert actual.isfinite().all()
    # A score of 1e5 is rounded to 1e-2, and with it the ratio of two weights.
    torch.testing.assert_close(actual, dense(mechanism, texts), rtol=0.02, atol=1)


def part_of(own, prefix):
    return {key[len(prefix) :]: value for key, value in own.items() if key.startswith(prefix)}


def softmax(scores):
    weights = np.exp(scores - np.max(scores, 0))
    return weights / weights.sum(0)


def pool(items, _parameters, kind):
    return {"mean": np.mean, "max": np.max}[kind](items, 0)


def gate(items, parameters, activation):
    bound = {"tanh": np.tanh, "identity": np.asarray}[activation]
    return softmax(bound(items @ parameters["score"])) @ items


def attend(items, parameters, factor, heads, pooling):
    query, key, value = np.split(items @ parameters["query_key_value"], 3, axis=1)
    attended, size = np.zeros_like(query), WIDTH // factor // heads
    for head in range(heads):
        own = slice(head * size, (head + 1) * size)
        weights = softmax(key[:, own] @ query[:, own].T / math.sqrt(size))
        attended[:, own] = weights.T @ value[:, own]
    return pool(attended @ parameters["out"], None, pooling)


def two_stages(stage):
    """The paper's: over each layer's tokens, then over the layers' vectors."""

    def logits(own, states, **options):
        token, layer = part_of(own, "token_stage."), part_of(own, "layer_stage.")
        vectors = [
            stage(tokens, {key: value[group] for key, value in token.items()}, **options)
            for group, tokens in enumerate(states)
        ]
        last = {key: value[0] for key, value in layer.items()}
        return own["head.weight"] @ stage(np.stack(vectors), last, **options) + own["head.bias"]

    return logits


def linear_logits(own, states):
    layers = zip(states, own["value"][:, :, 0], own["last"], strict=True)
    logits = sum(s.mean(0) @ value + s[-1] @ last for s, value, last in layers)
    return own["bias"] + logits / math.sqrt(LAYERS)


def gated(tokens, own):
    """A softmax over tokens for each head, and the last token."""
    weights = softmax(tokens @ own["gate"])
    values = np.einsum("td,dhc->thc", tokens, own["value"])
    return np.einsum("th,thc->c", weights, values) + tokens[-1] @ own["last"]


def readout_logits(own, states, **_options):
    logits = np.zeros_like(own["bias"])
    for layer, tokens in enumerate(states):
        logits += gated(tokens, {key: own[key][layer] for key in ("gate", "value", "last")})
    return own["bias"] + logits / math.sqrt(LAYERS)


def fusion_logits(own, states, **_options):
    inner = np.einsum("ltd,ldr->tr", states, own["features"]) / math.sqrt(LAYERS)
    centred = inner - inner.mean(1, keepdims=True)
    normed = centred / np.sqrt(inner.var(1, keepdims=True) + 1e-5)
    features = normed * own["norm.weight"] + own["norm.bias"]
    return own["bias"] + gated(features * ndtr(features), own)


def blend_logits(own, states, fusions, **_options):
    first, *rest = [part_of(own, f"members.{i}.") for i in range(fusions + 1)]
    logits = [readout_logits(first, states), *(fusion_logits(member, states) for member in rest)]
    return np.mean(logits, 0)


def token_logits(own, states, window, lookahead):
    """From the features of each token, their mean over the last few, and those of the next few."""
    features = np.einsum("ltd,ldr->tr", states, own["features"]) / math.sqrt(LAYERS)
    single, mean, *ahead = np.split(own["mixing"], 2 + lookahead)
    logits = []
    for t in range(len(features)):
        inner = own["threshold"] + features[t] @ single
        inner += features[max(0, t - window + 1) : t + 1].mean(0) @ mean
        for j, weights in enumerate(ahead[: len(features) - 1 - t], start=1):
            inner += features[t + j] @ weights
        logits.append(own["bias"] + inner * ndtr(inner) @ own["value"])
    return np.array(logits).reshape(-1, len(own["bias"]))


def spans_logits(own, states, window, lookahead, **_options):
    return token_logits(own, states, window, lookahead).max(0)


EQUATIONS = {
    "pooling": two_stages(pool),
    "gate": two_stages(gate),
    "attention": two_stages(attend),
    "linear": linear_logits,
    "readout": readout_logits,
    "fusion": fusion_logits,
    "blend": blend_logits,
    "spans": spans_logits,
}


def test_each_mechanism_equals_its_equation_in_numpy(variant, mechanism):
    (states,) = drawn([7], 3)
    own = {key: value.double().numpy() for key, value in mechanism.state_dict().items()}
    options = mechanism_spec(*variant).options
    expected = EQUATIONS[variant[0]](own, states.double().numpy(), **options)
    with torch.no_grad():
        actual = streamed(mechanism, [states])[0].numpy()
    np.testing.assert_allclose(actual, expected, **ROUNDING)


def test_training_on_short_texts_is_exact_but_for_dropout(mechanism, monkeypatch):
    monkeypatch.setattr(fusion, "DROPOUT", 0.0)
    texts = drawn([3, attention.TRAINING_QUERIES], 0)
    with torch.no_grad():
        exact, trained_on = streamed(mechanism, texts), streamed(deepcopy(mechanism).train(), texts)
    assert torch.equal(trained_on, exact)


def test_training_samples_tokens_never_layers_and_loses_nothing_if_all_ask_alike():
    layers = attention.TRAINING_QUERIES + 10
    (varied,) = drawn([400], 0)
    alike, flat = varied[:, :1].expand(-1, 400, -1), torch.randn(layers, 5, WIDTH)
    for states, is_exact in ((varied, False), (alike, True), (flat, True)):
        mechanism = built("attention", {}, 3, len(states))
        with torch.no_grad():
            exact, trained_on = streamed(mechanism, [states]), streamed(mechanism.train(), [states])
        assert torch.allclose(trained_on, exact, **ROUNDING) == is_exact


LLAMA_3B = Geometry(layers=29, width=3072, outputs=1)
GPT_OSS_20B = Geometry(layers=25, width=2880, outputs=1)


@pytest.mark.parametrize(
    ("geometry", "name", "options", "count"),
    [
        (LLAMA_3B, "pooling", {}, 3_073),
        (LLAMA_3B, "gate", {}, 95_233),
        (LLAMA_3B, "attention", {"factor": 32}, 35_389_440 + 3_073),
        (GPT_OSS_20B, "attention", {"factor": 32, "heads": 6}, 26_956_800 + 2_881),
        # (L + 1) (1 + C) H d and a bias.
        (LLAMA_3B, "linear", {}, 29 * 2 * 3072 + 1),
        (LLAMA_3B, "readout", {}, 29 * (2 * 2 + 1) * 3072 + 1),
        (LLAMA_3B, "spans", {"lookahead": 2}, (29 * 3072 + 4 * 64 + 1 + 1) * 64 + 1),
    ],
)
def test_parameter_counts_are_the_papers(geometry, name, options, count):
    with torch.device("meta"):
        mechanism = build_mechanism(mechanism_spec(name, options), geometry)
    assert sum(parameter.numel() for parameter in mechanism.parameters()) == count


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("gat", {}, r"'gat'. Did you mean 'gate'\? Known: attention"),
        ("readout", {"head": 2}, r"'head' of mechanism .* mean 'heads'"),
        ("pooling", {"kind": "median"}, "kind.*mean"),
        ("attention", {"factor": 64}, "0 inner columns"),
        ("attention", {"factor": 8, "heads": 3}, "4 inner columns, which 3 heads cannot share"),
        ("readout", {"heads": 0}, "heads"),
        ("readout", {"heads": True}, "heads"),
        ("spans", {"lookahead": 5}, "lookahead cannot be 5.*Known: 0, 1"),
    ],
)
def test_what_an_option_cannot_have_is_refused_with_what_it_can(name, options, says):
    filled = {"factor": 8, "heads": 2, "pooling": "mean"}
    assert mechanism_spec("attention", {"heads": 2}).options == filled
    with pytest.raises(SidelightError, match=says):
        build_mechanism(mechanism_spec(name, options), Geometry(LAYERS, WIDTH, 1))


# In logits: float32 sums of some hundred shares, and what integrated gradients may miss.
COMPLETE = 1e-4


def shares_of(mechanism, tokens, output):
    with torch.no_grad():
        outputs = mechanism.logits(tokens).shape[1]
    return mechanism.shares(tokens, torch.eye(outputs)[output].expand(len(tokens.lengths), -1))


@pytest.mark.parametrize("scale", [0.02, 1.0, 2.0])
def test_shares_of_tokens_and_layers_sum_to_the_logit(variant, mechanism, scale):
    """Read off without a gradient's steps, unless features are not linear."""
    texts = [own * scale for own in drawn([1, 2, 9, 60], seed=int(scale))]
    with torch.inference_mode():
        # Some tokens come twice, as the embeddings of a word do.
        columns = [projected(mechanism, torch.cat([own, own[:, :2]], 1)) for own in texts]
        tokens = Ragged(torch.cat(columns), torch.tensor([len(own) for own in columns]))
        logits = mechanism.logits(tokens)
    for output in range(logits.shape[1]):
        shares = shares_of(mechanism, tokens, output)
        assert shares.values.shape == tokens.values.shape[:2]
        total = shares.baseline + Ragged(shares.values.sum(1), tokens.lengths).sums()
        torch.testing.assert_close(total, logits[:, output].double(), atol=COMPLETE, rtol=0)
        assert (shares.steps == 0) == (variant[0] not in INTEGRATED)


@torch.no_grad()
@pytest.mark.parametrize("token", [0, 4, 19])
def test_a_token_that_was_not_read_leaves_no_logit(mechanism, token):
    """Its columns are NaN; a logit without it would be a verdict on part of a text."""
    columns = projected(mechanism, drawn([20], 2)[0])
    columns[token, 1] = math.nan
    pieces = [mechanism.summarise(Ragged(p, torch.tensor([10]))) for p in columns.split(10)]
    assert mechanism.logits(Ragged(columns, torch.tensor([20]))).isnan().all()
    assert mechanism.finish(mechanism.merge(*pieces)).isnan().all()


def test_a_share_of_a_readout_is_the_tokens_own_terms():
    """Against the terms of the equation, written out."""
    readout = built("readout", {}, 1)
    (text,) = drawn([7], seed=3)
    with torch.no_grad():
        weights = torch.einsum("ltd,ldh->lth", text, readout.gate).softmax(1)
        terms = (weights * torch.einsum("ltd,ldh->lth", text, readout.value[..., 0])).sum(2)
        terms[:, -1] += torch.einsum("ld,ld->l", text[:, -1], readout.last[..., 0])
    tokens = Ragged(projected(readout, text).detach(), torch.tensor([7]))
    shares = shares_of(readout, tokens, 0)
    torch.testing.assert_close(shares.values.float(), terms.T / math.sqrt(LAYERS), **ROUNDING)
    torch.testing.assert_close(shares.baseline.float(), readout.bias.detach(), **ROUNDING)


def test_integrated_gradients_are_those_of_the_dense_form():
    """Against many small steps along the hidden states themselves."""
    mechanism = built("fusion", {"rank": 3, "heads": 1}, 1)
    (text,) = drawn([4], seed=5)
    # As the fourth power, in even steps of its root.
    root = ((torch.arange(2000) + 0.5) / 2000)[:, None, None, None]
    hidden = (text * root**4).requires_grad_()
    logits = mechanism(hidden, torch.ones(2000, 4, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(logits.sum(), hidden)
    expected = (4 * root**3 / 2000 * gradient * text).sum((0, 3))
    tokens = Ragged(projected(mechanism, text).detach(), torch.tensor([4]))
    torch.testing.assert_close(
        shares_of(mechanism, tokens, 0).values.float(), expected.T, atol=COMPLETE, rtol=1e-3
    )


@torch.no_grad()
def test_spans_label_tokens_alike_however_texts_are_packed_and_cut():
    """Against the equation, for every token and not only the one that decides."""
    mechanism = built("spans", {"window": 3, "lookahead": 2}, 3)
    texts = drawn([1, 2, 9, 0, 4], 5)
    own = {key: value.double().numpy() for key, value in mechanism.state_dict().items()}
    expected = [token_logits(own, text.double().numpy(), 3, 2) for text in texts]
    pieces = [(text[:, :2], text[:, 2:]) for text in texts]
    left, right = (summarised(mechanism, part) for part in zip(*pieces, strict=True))
    for state in (summarised(mechanism, texts), mechanism.merge(left, right)):
        actual = mechanism.token_logits(state)
        assert actual.lengths.tolist() == [1, 2, 9, 0, 4]
        np.testing.assert_allclose(actual.values.numpy(), np.concatenate(expected), **ROUNDING)
