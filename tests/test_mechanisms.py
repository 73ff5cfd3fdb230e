"""Every registered mechanism keeps the laws of mechanisms."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import ndtr
from torch.nn import functional

import wordings
from mechanism_contract import (
    LAYERS,
    ROUNDING,
    WIDTH,
    MechanismContract,
    built,
    drawn,
    gated,
    projected,
    shares_of,
    softmax,
    streamed,
    summarised,
    weights_under,
)
from sidelight.data.evaluation import evaluate_spans
from sidelight.data.loading import load_examples
from sidelight.data.spans import final_characters
from sidelight.engines.annotation import AnswerSpans
from sidelight.errors import SidelightError
from sidelight.probes.artifact import load_probe, save_probe
from sidelight.probes.bank import Bank
from sidelight.probes.mechanisms import attention, base
from sidelight.probes.mechanisms.base import (
    Geometry,
    Mechanism,
    build_mechanism,
    hide,
    mechanism_names,
    mechanism_spec,
    register,
)
from sidelight.probes.ragged import Ragged
from sidelight.scoring import encode, find_spans
from sidelight.states.extraction import text_logits
from sidelight.training.fit import fit
from sidelight.training.settings import FitOptions, TrainingSettings
from worlds.data import planted_rows, span_rows

# Every registered mechanism by its defaults, and the options that take another way through it.
VARIANTS = [
    *((name, {}) for name in mechanism_names()),
    ("pooling", {"kind": "max"}),
    ("gate", {"activation": "identity"}),
    ("attention", {"pooling": "max"}),
    ("attention", {"factor": 16, "heads": 1}),
    ("attention", {"factor": 2, "heads": 8, "pooling": "max"}),
    ("readout", {"heads": 1}),
    ("spans", {"window": 1, "lookahead": 0, "rank": 3}),
    ("spans", {"window": 3, "lookahead": 4}),
]


@pytest.fixture(scope="module", params=VARIANTS, ids=str)
def variant(request):
    return request.param


def pool(items, _parameters, kind):
    return {"mean": np.mean, "max": np.max}[kind](items, 0)


def gate(items, parameters, activation):
    bound = {"tanh": np.tanh, "identity": np.asarray}[activation]
    return softmax(bound(items @ parameters["score"])) @ items


def attend(items, parameters, factor, heads, pooling):
    query, key, value = np.split(items @ parameters["query_key_value"], 3, axis=1)
    attended, size = np.zeros_like(query), WIDTH // factor // heads
    for head in range(heads):
        head_slice = slice(head * size, (head + 1) * size)
        weights = softmax(key[:, head_slice] @ query[:, head_slice].T / math.sqrt(size))
        attended[:, head_slice] = weights.T @ value[:, head_slice]
    return pool(attended @ parameters["out"], None, pooling)


def two_stages(aggregate):
    """The paper's: over each layer's tokens, then over the layers' vectors."""

    def logits(weights, states, **options):
        token, layer = (
            weights_under(weights, "token_stage."),
            weights_under(weights, "layer_stage."),
        )
        vectors = [
            aggregate(tokens, {key: value[group] for key, value in token.items()}, **options)
            for group, tokens in enumerate(states)
        ]
        last = {key: value[0] for key, value in layer.items()}
        return (
            weights["head.weight"] @ aggregate(np.stack(vectors), last, **options)
            + weights["head.bias"]
        )

    return logits


def readout_logits(weights, states, **_options):
    logits = np.zeros_like(weights["bias"])
    for layer, tokens in enumerate(states):
        logits += gated(tokens, {key: weights[key][layer] for key in ("gate", "value", "last")})
    return weights["bias"] + logits / math.sqrt(LAYERS)


def token_logits(parameters, states, window, lookahead):
    """From the features of each token, their mean over the last few, and those of the next few."""
    features = np.einsum("ltd,ldr->tr", states, parameters["features"]) / math.sqrt(LAYERS)
    single, mean, *ahead = np.split(parameters["mixing"], 2 + lookahead)
    logits = []
    for t in range(len(features)):
        inner = parameters["threshold"] + features[t] @ single
        inner += features[max(0, t - window + 1) : t + 1].mean(0) @ mean
        for j, weights in enumerate(ahead[: len(features) - 1 - t], start=1):
            inner += features[t + j] @ weights
        logits.append(parameters["bias"] + inner * ndtr(inner) @ parameters["value"])
    return np.array(logits).reshape(-1, len(parameters["bias"]))


def spans_logits(weights, states, window, lookahead, **_options):
    return token_logits(weights, states, window, lookahead).max(0)


EQUATIONS = {
    "pooling": two_stages(pool),
    "gate": two_stages(gate),
    "attention": two_stages(attend),
    "readout": readout_logits,
    "spans": spans_logits,
}


@pytest.fixture(scope="module")
def equations():
    return EQUATIONS


@pytest.fixture(scope="module")
def integrated():
    return ("spans",)


class TestMechanisms(MechanismContract):
    pass


def test_attention_training_samples_tokens_but_never_layers():
    layers = attention.TRAINING_QUERIES + 10
    (varied,) = drawn([400], 0)
    alike, flat = varied[:, :1].expand(-1, 400, -1), torch.randn(layers, 5, WIDTH)
    for states, is_exact in ((varied, False), (alike, True), (flat, True)):
        sampling = built("attention", {}, 3, len(states))
        with torch.no_grad():
            exact, trained_on = streamed(sampling, [states]), streamed(sampling.train(), [states])
        assert torch.allclose(trained_on, exact, **ROUNDING) == is_exact


def test_attention_head_widths_suit_memory_efficient_cuda_kernel(monkeypatch):
    """Its kernel takes float32 heads of four numbers or a multiple; see PyTorch's sdp_utils.cpp."""
    widths, real = [], functional.scaled_dot_product_attention

    def recording(*tensors, **options):
        widths.extend(tensor.shape[-1] for tensor in tensors)
        return real(*tensors, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", recording)
    for heads in (1, 2, 4, 8):
        streamed(built("attention", {"factor": 4, "heads": heads}, 1), drawn([3, 5], 0))
    assert {width % 4 for width in widths} == {0}


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
        (LLAMA_3B, "readout", {}, 29 * (2 * 2 + 1) * 3072 + 1),
        (LLAMA_3B, "spans", {"lookahead": 2}, (29 * 3072 + 4 * 64 + 1 + 1) * 64 + 1),
    ],
)
def test_parameter_counts_match_the_paper(geometry, name, options, count):
    with torch.device("meta"):
        mechanism = build_mechanism(mechanism_spec(name, options), geometry)
    assert sum(parameter.numel() for parameter in mechanism.parameters()) == count


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("gat", {}, r"'gat'. Did you mean 'gate'\? Known: attention"),
        ("readout", {"head": 2}, r"'head' of mechanism .* mean 'heads'"),
        ("pooling", {"kind": "median"}, "kind.*mean"),
        ("attention", {"factor": 64}, "inner width of 0"),
        ("attention", {"factor": 8, "heads": 3}, "inner width of 4, which 3 heads cannot share"),
        ("readout", {"heads": 0}, "heads"),
        ("readout", {"heads": True}, "heads"),
        ("spans", {"lookahead": 5}, "lookahead cannot be 5.*Known: 0, 1"),
    ],
)
def test_invalid_mechanism_options_raise_specific_errors(name, options, says):
    filled = {"factor": 8, "heads": 2, "pooling": "mean"}
    assert mechanism_spec("attention", {"heads": 2}).options == filled
    with pytest.raises(SidelightError, match=says):
        build_mechanism(mechanism_spec(name, options), Geometry(LAYERS, WIDTH, 1))


def test_readout_token_shares_match_equation():
    """Against the terms of the equation, written out."""
    readout = built("readout", {}, 1)
    (text,) = drawn([7], seed=3)
    with torch.no_grad():
        weights = torch.einsum("ltd,ldh->lth", text, readout.gate).softmax(1)
        products = (weights * torch.einsum("ltd,ldh->lth", text, readout.value[..., 0])).sum(2)
        products[:, -1] += torch.einsum("ld,ld->l", text[:, -1], readout.last[..., 0])
    tokens = Ragged(projected(readout, text).detach(), torch.tensor([7]))
    shares = shares_of(readout, tokens, 0)
    torch.testing.assert_close(shares.values.float(), products.T / math.sqrt(LAYERS), **ROUNDING)
    torch.testing.assert_close(shares.baseline.float(), readout.bias.detach(), **ROUNDING)


@torch.no_grad()
def test_span_token_logits_are_independent_of_packing_and_chunking():
    """Against the equation, for every token and not only the one that decides."""
    labelling = built("spans", {"window": 3, "lookahead": 2}, 3)
    texts = drawn([1, 2, 9, 0, 4], 5)
    weights = {key: value.double().numpy() for key, value in labelling.state_dict().items()}
    expected = [token_logits(weights, text.double().numpy(), 3, 2) for text in texts]
    halves = [(text[:, :2], text[:, 2:]) for text in texts]
    left, right = (summarised(labelling, half) for half in zip(*halves, strict=True))
    for state in (summarised(labelling, texts), labelling.merge(left, right)):
        actual = labelling.token_logits(state)
        assert actual.lengths.tolist() == [1, 2, 9, 0, 4]
        np.testing.assert_allclose(actual.values.numpy(), np.concatenate(expected), **ROUNDING)


class Highest(Mechanism):
    """A text has the highest logits of its tokens, which are linear."""

    def __init__(self, geometry):
        super().__init__()
        self.weight = torch.nn.Parameter(
            torch.zeros(geometry.layers, geometry.width, geometry.outputs)
        )
        self.bias = torch.nn.Parameter(torch.zeros(geometry.outputs))

    def forward(self, hidden, mask):
        logits = torch.einsum("bltd,ldc->btc", hide(hidden, mask), self.weight)
        return torch.where(mask[..., None], logits, -torch.inf).amax(1) + self.bias

    def projections(self):
        return self.weight

    def summarise(self, tokens):
        return Ragged(tokens.values.float().sum(1, keepdim=True), tokens.lengths)

    def merge(self, left, right):
        return left.joined(right)

    def finish(self, state):
        return Ragged(state.values[:, 0], state.lengths).maxima() + self.bias


class Labelling(Highest):
    """The same, where these are logits of the tokens too."""

    lookahead = 1

    def __init__(self, geometry):
        super().__init__(geometry)
        self.register_buffer("prior", torch.zeros(geometry.outputs))

    def set_prior(self, logits):
        self.prior.copy_(logits)

    def token_logits(self, state):
        return Ragged(state.values[:, 0] + self.bias, state.lengths)


@pytest.fixture
def newcomers(monkeypatch):
    monkeypatch.setattr(base, "_BUILDERS", dict(base._BUILDERS))
    register("highest")(Highest)
    register("labelling")(Labelling)


def trained(tiny, folder, examples, name, validation=None):
    options = FitOptions(
        mechanism=mechanism_spec(name),
        settings=TrainingSettings(learning_rate=5e-2, epochs=4, batch_size=16),
        cache_root=folder,
    )
    result = fit(tiny, examples, validation, name="new", options=options)
    return load_probe(save_probe(result.probe, folder / "probe"))


@pytest.mark.slow
@pytest.mark.usefixtures("newcomers")
def test_registered_mechanism_can_be_trained_saved_and_served(tiny, tmp_path):
    validation = load_examples(planted_rows("binary", 30, seed=2))
    probe = trained(
        tiny, tmp_path, load_examples(planted_rows("binary", 60)), "highest", validation
    )
    new = load_examples(planted_rows("binary", 40, seed=1), task=probe.task)
    (outputs,) = text_logits(tiny, Bank([probe]), encode(tiny.encoder, new.items))
    flags = [probe.verdict(text.logits).flagged for text in outputs]
    assert np.mean(flags == (new.labels == 1)) > 0.9
    with pytest.raises(SidelightError, match=wordings.WANTS_TOKEN_LABELS.format(got="highest")):
        trained(tiny, tmp_path, load_examples(span_rows(40), spans="spans"), "highest")


@pytest.mark.slow
@pytest.mark.usefixtures("newcomers")
def test_registered_token_mechanism_finds_spans(tiny, tmp_path):
    probe = trained(tiny, tmp_path, load_examples(span_rows(80), spans="spans"), "labelling")
    assert probe.card.training.lookaheads.keys() == {"1"}
    # Fewer than half of the tokens have each label.
    assert (probe.mechanism.prior < 0).all()
    new = load_examples(span_rows(30, seed=1), spans="spans", task=probe.task)
    _, found = find_spans(tiny, probe, new.items)
    assert evaluate_spans(new, found, bootstrap=0).metrics["character_f1"].value > 0.9
    answer_spans = AnswerSpans([probe.changed(reads=replace(probe.reads, side="response"))])
    for word in ("ab ", "cd ", "ef "):
        answer_spans.push(word)
    without_last = final_characters(answer_spans.text, len("ab cd "))
    assert (
        answer_spans.final_characters(3)
        == without_last
        < final_characters(answer_spans.text, len(answer_spans.text))
    )
