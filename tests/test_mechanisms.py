"""Laws of every registered mechanism: the streaming form computes what the dense form defines."""

import math
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sidelight.errors import SidelightError
from sidelight.mechanisms import attention, fusion
from sidelight.mechanisms.base import (
    Geometry,
    build_mechanism,
    mechanism_names,
    mechanism_spec,
)
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
    ("readout", {"extremes": "pair"}),
    ("fusion", {"rank": 3, "heads": 1}),
    ("blend", {"fusions": 1, "rank": 4}),
]
# float32: the same sums of up to a few hundred products, in another order.
ROUNDING = {"rtol": 1e-4, "atol": 2e-5}
# bf16 keeps 8 bits, so a state is off by up to 0.4 %; a softmax over scores of size 5 turns that
# into a few per cent of its weights.
BF16_SHARE = 0.1
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


def in_words(variant):
    name, options = variant
    return "-".join([name, *map(str, options.values())])


@pytest.fixture(scope="module", params=VARIANTS, ids=in_words)
def variant(request):
    return request.param


@pytest.fixture(scope="module", params=[1, 3], ids=["binary", "three-classes"])
def mechanism(request, variant):
    return built(*variant, request.param)


@dataclass(frozen=True)
class Texts:
    """Hidden states of several texts, each ``[layer, token, width]``."""

    states: list[torch.Tensor]

    @staticmethod
    def drawn(lengths, seed):
        generator = torch.Generator().manual_seed(seed)
        return Texts([torch.randn(LAYERS, n, WIDTH, generator=generator) for n in lengths])

    def has_tokens(self):
        return torch.tensor([states.shape[1] > 0 for states in self.states])

    def dense(self, mechanism, padding=0.0, extra=0):
        """The dense form on the texts padded with anything."""
        longest = max(states.shape[1] for states in self.states) + extra
        hidden = torch.full((len(self.states), LAYERS, longest, WIDTH), padding)
        mask = torch.zeros(len(self.states), longest, dtype=torch.bool)
        for row, states in enumerate(self.states):
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
    """Cut anywhere, packed in any order, neighbours merged in any order, several at a time."""
    pieces = [cut(text, random) for text in states]
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


def cut(states, random):
    """The text in one to four pieces, some of them empty."""
    tokens = states.shape[1]
    cuts = sorted(random.randint(0, tokens) for _ in range(random.randint(0, 3)))
    edges = [0, *cuts, tokens]
    return [states[:, a:b] for a, b in pairwise(edges)]


lengths = st.lists(st.integers(1, 9), min_size=1, max_size=4)
seeds = st.integers(0, 2**16)
law = settings(max_examples=8, deadline=None)


@pytest.mark.slow
@law
@given(lengths=lengths, seed=seeds)
def test_any_chunking_merging_and_packing_gives_the_dense_form(mechanism, lengths, seed):
    texts = Texts.drawn(lengths, seed)
    with torch.no_grad():
        expected = texts.dense(mechanism)
        actual = streamed_in_pieces(mechanism, texts.states, Random(seed))
    torch.testing.assert_close(actual, expected, **ROUNDING)


@pytest.mark.slow
@law
@given(lengths=lengths, seed=seeds, padding=st.sampled_from(POISON), extra=st.integers(0, 3))
def test_padding_has_no_influence(mechanism, lengths, seed, padding, extra):
    texts = Texts.drawn(lengths, seed)
    with torch.no_grad():
        poisoned = texts.dense(mechanism, padding, extra)
        alone = [Texts([states]).dense(mechanism) for states in texts.states]
    torch.testing.assert_close(poisoned, torch.cat(alone), **ROUNDING)


@pytest.mark.slow
@law
@given(lengths=lengths, seed=seeds, gap=st.integers(0, 4))
def test_a_text_without_tokens_is_nan_and_disturbs_no_neighbour(mechanism, lengths, seed, gap):
    lengths.insert(min(gap, len(lengths)), 0)
    texts = Texts.drawn(lengths, seed)
    filled = texts.has_tokens()
    with torch.no_grad():
        expected = Texts([s for s in texts.states if s.shape[1]]).dense(mechanism)
        for actual in (
            streamed(mechanism, texts.states),
            streamed_in_pieces(mechanism, texts.states, Random(seed)),
        ):
            assert actual[~filled].isnan().all()
            torch.testing.assert_close(actual[filled], expected, **ROUNDING)


def test_texts_of_no_tokens_at_all_are_nan(mechanism):
    with torch.no_grad():
        logits = streamed(mechanism, Texts.drawn([0, 0], 0).states)
    assert logits.isnan().all()


@pytest.mark.slow
def test_lengths_may_differ_by_orders_of_magnitude(mechanism):
    texts = Texts.drawn([1, 300, 2, 37, 300, 5], 0)
    with torch.no_grad():
        torch.testing.assert_close(
            streamed(mechanism, texts.states), texts.dense(mechanism), **ROUNDING
        )


@pytest.mark.slow
@law
@given(lengths=lengths, seed=seeds)
def test_states_in_bf16_move_logits_within_their_rounding(mechanism, lengths, seed):
    texts = Texts.drawn(lengths, seed)
    rounded = Texts([states.bfloat16().float() for states in texts.states])
    with torch.no_grad():
        actual = streamed_in_pieces(mechanism, rounded.states, Random(seed))
        torch.testing.assert_close(actual, rounded.dense(mechanism), **ROUNDING)
        expected = texts.dense(mechanism)
    assert (actual - expected).abs().max() < BF16_SHARE * (1 + expected.abs().max())


def test_huge_scores_do_not_overflow(mechanism):
    texts = Texts([states * 1e4 for states in Texts.drawn([3, 8], 1).states])
    with torch.no_grad():
        actual = streamed_in_pieces(mechanism, texts.states, Random(0))
        expected = texts.dense(mechanism)
    assert actual.isfinite().all()
    # A score of 1e5 is rounded to 1e-2, and with it the ratio of two weights.
    torch.testing.assert_close(actual, expected, rtol=0.02, atol=1)


@pytest.mark.slow
@law
@given(lengths=lengths, seed=seeds)
def test_gradients_of_both_forms_are_equal(mechanism, lengths, seed):
    texts = Texts.drawn(lengths, seed)
    weights = torch.randn(3, generator=torch.Generator().manual_seed(seed))

    def gradients(logits):
        loss = (logits * weights[: logits.shape[1]]).sum()
        return torch.autograd.grad(loss, list(mechanism.parameters()))

    dense = gradients(texts.dense(mechanism, math.nan, 1))
    streaming = gradients(streamed(mechanism, texts.states))
    for expected, actual in zip(dense, streaming, strict=True):
        scale = max([1e-2, *expected.abs().flatten().tolist()])
        torch.testing.assert_close(actual / scale, expected / scale, **ROUNDING)


def one_text(tokens=7, seed=3):
    return Texts.drawn([tokens], seed).states[0]


def parameters(mechanism):
    return {key: value.double().numpy() for key, value in mechanism.state_dict().items()}


def softmax(scores):
    weights = np.exp(scores - np.max(scores))
    return weights / weights.sum()


def mean_stage(items, _parameters, _group):
    return np.mean(items, 0)


def max_stage(items, _parameters, _group):
    return np.max(items, 0)


def gate_stage(bound):
    def stage(items, parameters, group):
        weights = softmax([bound(parameters["score"][group] @ item) for item in items])
        return sum(weight * item for weight, item in zip(weights, items, strict=True))

    return stage


def attention_stage(heads, pool):
    def stage(items, parameters, group):
        query, key, value = np.split(items @ parameters["query_key_value"][group], 3, axis=1)
        size = query.shape[1] // heads
        attended = np.zeros_like(query)
        for head in range(heads):
            own = slice(head * size, (head + 1) * size)
            for i in range(len(items)):
                scores = [query[i, own] @ key[j, own] / math.sqrt(size) for j in range(len(items))]
                attended[i, own] = softmax(scores) @ value[:, own]
        return pool(attended @ parameters["out"][group], 0)

    return stage


@pytest.mark.parametrize(
    ("name", "options", "stage"),
    [
        ("pooling", {}, mean_stage),
        ("pooling", {"kind": "max"}, max_stage),
        ("gate", {}, gate_stage(np.tanh)),
        ("gate", {"activation": "identity"}, gate_stage(float)),
        ("attention", {"factor": 4, "heads": 2}, attention_stage(2, np.mean)),
        ("attention", {"factor": 4, "heads": 4, "pooling": "max"}, attention_stage(4, np.max)),
    ],
)
@pytest.mark.parametrize("outputs", [1, 3])
def test_two_stages_equal_the_papers_equations_in_numpy(name, options, stage, outputs):
    mechanism, hidden = built(name, options, outputs), one_text()
    every = parameters(mechanism)
    token, layer = (
        {key.removeprefix(prefix): value for key, value in every.items() if key.startswith(prefix)}
        for prefix in ("token_stage.", "layer_stage.")
    )
    states = hidden.double().numpy()
    vectors = np.stack([stage(states[group], token, group) for group in range(LAYERS)])
    expected = every["head.weight"] @ stage(vectors, layer, 0) + every["head.bias"]
    with torch.no_grad():
        actual = streamed(mechanism, [hidden])[0].numpy()
    np.testing.assert_allclose(actual, expected, **ROUNDING)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("extremes", ["none", "pair"])
def test_readout_equals_its_equation_in_numpy(heads, outputs, extremes):
    mechanism = built("readout", {"heads": heads, "extremes": extremes}, outputs)
    hidden = one_text()
    own, states = parameters(mechanism), hidden.double().numpy()
    expected = own["bias"].copy()
    for layer in range(LAYERS):
        for head in range(heads):
            weights = softmax(states[layer] @ own["gate"][layer, :, head])
            for token, weight in enumerate(weights):
                value = states[layer, token] @ own["value"][layer, :, head]
                expected += weight * value / math.sqrt(LAYERS)
        expected += states[layer, -1] @ own["last"][layer] / math.sqrt(LAYERS)
        if extremes == "pair":
            gains, losses = own["extremes"][layer].transpose(1, 0, 2)
            maxima = (states[layer] @ gains).max(0) - (states[layer] @ losses).max(0)
            expected += maxima / math.sqrt(LAYERS)
    with torch.no_grad():
        actual = streamed(mechanism, [hidden])[0].numpy()
    np.testing.assert_allclose(actual, expected, **ROUNDING)


@pytest.mark.parametrize("outputs", [1, 3])
def test_linear_equals_its_equation_in_numpy(outputs):
    mechanism, hidden = built("linear", {}, outputs), one_text()
    own, states = parameters(mechanism), hidden.double().numpy()
    expected = own["bias"].copy()
    for layer in range(LAYERS):
        expected += (
            states[layer].mean(0) @ own["value"][layer] + states[layer, -1] @ own["last"][layer]
        )
    with torch.no_grad():
        actual = streamed(mechanism, [hidden])[0].numpy()
    np.testing.assert_allclose(actual, expected, **ROUNDING)


def test_training_on_short_texts_is_exact_but_for_dropout(mechanism, monkeypatch):
    monkeypatch.setattr(fusion, "DROPOUT", 0.0)
    texts = Texts.drawn([3, attention.TRAINING_QUERIES], 0)
    with torch.no_grad():
        exact = streamed(mechanism, texts.states)
        trained_on = streamed(deepcopy(mechanism).train(), texts.states)
    assert torch.equal(trained_on, exact)


def test_training_samples_the_queries_of_long_texts_and_loses_nothing_if_all_ask_alike():
    mechanism = built("attention", {}, 3)
    varied = Texts.drawn([400, 400], 0).states
    alike = [states[:, :1].expand(-1, 400, -1) for states in varied]
    with torch.no_grad():
        exact = [streamed(mechanism, texts) for texts in (varied, alike)]
        mechanism.train()
        sampled = [streamed(mechanism, texts) for texts in (varied, alike)]
    assert not torch.equal(sampled[0], exact[0])
    torch.testing.assert_close(sampled[1], exact[1], **ROUNDING)


def test_training_samples_tokens_never_layers():
    layers = attention.TRAINING_QUERIES + 10
    mechanism, states = built("attention", {}, 1, layers), torch.randn(layers, 5, WIDTH)
    with torch.no_grad():
        exact = streamed(mechanism, [states])
        trained_on = streamed(mechanism.train(), [states])
    torch.testing.assert_close(trained_on, exact, **ROUNDING)


LLAMA_3B = Geometry(layers=29, width=3072, outputs=1)
GPT_OSS_20B = Geometry(layers=25, width=2880, outputs=1)
QWEN3_30B = Geometry(layers=49, width=2048, outputs=1)


@pytest.mark.parametrize(
    ("geometry", "name", "options", "count"),
    [
        (LLAMA_3B, "pooling", {}, 3_073),
        (LLAMA_3B, "gate", {}, 95_233),
        (LLAMA_3B, "attention", {"factor": 32}, 35_389_440 + 3_073),
        (GPT_OSS_20B, "gate", {}, 77_761),
        (GPT_OSS_20B, "attention", {"factor": 32, "heads": 6}, 26_956_800 + 2_881),
        (QWEN3_30B, "gate", {}, 104_449),
        (QWEN3_30B, "attention", {"factor": 32}, 26_214_400 + 2_049),
        # (L + 1) (1 + C) H d and a bias.
        (LLAMA_3B, "linear", {}, 29 * 2 * 3072 + 1),
        (LLAMA_3B, "readout", {}, 29 * (2 * 2 + 1) * 3072 + 1),
        (LLAMA_3B, "readout", {"extremes": "pair"}, 29 * (2 * 2 + 1 + 2) * 3072 + 1),
    ],
)
def test_parameter_counts_are_the_papers(geometry, name, options, count):
    with torch.device("meta"):
        mechanism = build_mechanism(mechanism_spec(name, options), geometry)
    assert sum(parameter.numel() for parameter in mechanism.parameters()) == count


def test_a_gate_asks_three_numbers_of_each_token_and_layer():
    mechanism = built("gate", {}, 1)
    assert mechanism.columns().shape == (LAYERS, WIDTH, 3)


def test_the_same_seed_builds_the_same_mechanism(variant):
    first, second = (parameters(built(*variant, 1)) for _ in range(2))
    for key, value in first.items():
        np.testing.assert_array_equal(value, second[key])


def test_a_specification_fills_in_every_option():
    assert mechanism_spec("attention", {"heads": 2}).options == {
        "factor": 8,
        "heads": 2,
        "pooling": "mean",
    }


def test_a_wrong_mechanism_or_option_names_the_right_ones():
    with pytest.raises(SidelightError, match=r"'gat'. Did you mean 'gate'\? Known: attention"):
        mechanism_spec("gat")
    with pytest.raises(SidelightError, match=r"'head' of mechanism .* mean 'heads'"):
        mechanism_spec("readout", {"head": 2})


def test_heads_that_cannot_share_the_inner_columns_are_refused():
    with pytest.raises(SidelightError, match="90 inner columns, which 4 heads cannot share"):
        build_mechanism(mechanism_spec("attention", {"factor": 32}), GPT_OSS_20B)
    with pytest.raises(SidelightError, match="0 inner columns"):
        build_mechanism(mechanism_spec("attention", {"factor": 64}), Geometry(LAYERS, WIDTH, 1))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("pooling", {"kind": "median"}),
        ("gate", {"activation": "relu"}),
        ("attention", {"pooling": "median"}),
        ("attention", {"factor": 0}),
        ("attention", {"heads": 0}),
        ("attention", {"heads": -2}),
        ("readout", {"heads": 0}),
        ("readout", {"heads": -1}),
        ("readout", {"heads": True}),
        ("readout", {"heads": "4"}),
    ],
)
def test_a_value_that_an_option_cannot_have_is_refused(name, options):
    with pytest.raises(SidelightError, match=next(iter(options))):
        build_mechanism(mechanism_spec(name, options), Geometry(LAYERS, WIDTH, 1))


# In logits: float32 sums of some hundred shares, and what integrated gradients may miss.
COMPLETE = 1e-4


def packed(mechanism, texts):
    """The columns of texts, some of whose tokens come twice, as the embeddings of a word do."""
    columns = [projected(mechanism, torch.cat([own, own[:, :2]], 1)).detach() for own in texts]
    return Ragged(torch.cat(columns), torch.tensor([len(own) for own in columns]))


def shares_of(mechanism, tokens, output):
    outputs = mechanism.logits(tokens).shape[1]
    return mechanism.shares(tokens, torch.eye(outputs)[output].expand(len(tokens.lengths), -1))


@pytest.mark.parametrize("scale", [0.02, 1.0, 2.0])
def test_shares_of_tokens_and_layers_sum_to_the_logit(mechanism, scale):
    texts = [own * scale for own in Texts.drawn([1, 2, 9, 60], seed=int(scale)).states]
    with torch.inference_mode():
        tokens = packed(mechanism, texts)
        logits = mechanism.logits(tokens)
    for output in range(logits.shape[1]):
        shares = shares_of(mechanism, tokens, output)
        assert shares.values.shape == tokens.values.shape[:2]
        total = shares.baseline + Ragged(shares.values.sum(1), tokens.lengths).sums()
        torch.testing.assert_close(total, logits[:, output].double(), atol=COMPLETE, rtol=0)


def test_shares_are_read_off_unless_features_are_not_linear(variant, mechanism):
    shares = shares_of(mechanism, packed(mechanism, Texts.drawn([5], seed=0).states), 0)
    assert (shares.steps == 0) == (variant[0] not in ("fusion", "blend"))


@pytest.mark.parametrize("extremes", ["none", "pair"])
def test_a_share_of_a_readout_is_the_tokens_own_terms(extremes):
    """Against the terms of the equation, written out."""
    readout = built("readout", {"extremes": extremes}, 1)
    (text,) = Texts.drawn([7], seed=3).states
    with torch.no_grad():
        weights = torch.einsum("ltd,ldh->lth", text, readout.gate).softmax(1)
        terms = (weights * torch.einsum("ltd,ldh->lth", text, readout.value[..., 0])).sum(2)
        terms[:, -1] += torch.einsum("ld,ld->l", text[:, -1], readout.last[..., 0])
        for sign, candidates in zip((1, -1), readout.extremes[..., 0].unbind(2), strict=False):
            scores = torch.einsum("ltd,ld->lt", text, candidates)
            terms.scatter_add_(1, scores.argmax(1)[:, None], sign * scores.amax(1)[:, None])
    tokens = Ragged(projected(readout, text).detach(), torch.tensor([7]))
    shares = shares_of(readout, tokens, 0)
    torch.testing.assert_close(shares.values.float(), terms.T / math.sqrt(LAYERS), **ROUNDING)
    torch.testing.assert_close(shares.baseline.float(), readout.bias.detach(), **ROUNDING)


def test_integrated_gradients_are_those_of_the_dense_form():
    """Against many small steps along the hidden states themselves."""
    mechanism = built("fusion", {"rank": 3, "heads": 1}, 1)
    (text,) = Texts.drawn([4], seed=5).states
    expected = torch.zeros(LAYERS, 4)
    for place in (torch.arange(2000) + 0.5) / 2000:
        # As the fourth power, in even steps of its root.
        hidden = (text * place**4).requires_grad_()
        logit = mechanism(hidden[None], torch.ones(1, 4, dtype=torch.bool)).sum()
        (gradient,) = torch.autograd.grad(logit, hidden)
        expected += 4 * place**3 / 2000 * (gradient * text).sum(-1)
    tokens = Ragged(projected(mechanism, text).detach(), torch.tensor([4]))
    torch.testing.assert_close(
        shares_of(mechanism, tokens, 0).values.float(), expected.T, atol=COMPLETE, rtol=1e-3
    )
