"""What an anatomy says of a probe agrees with the probe's own arithmetic."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from planted_data import split_of, write_rows

from commands import saved
from corpora import TASKS
from sidelight.artifact import save_probe
from sidelight.bank import Bank
from sidelight.errors import SidelightError
from sidelight.mechanisms.base import Geometry, build_mechanism, mechanism_names, mechanism_spec
from sidelight.prompts import Part
from sidelight.ragged import Ragged
from sidelight.standardisation import Standardisation
from sidelight.states.extraction import score
from sidelight_lab.anatomy.attribution import (
    contributions,
    grouped,
    layer_views,
    layer_weights,
    read_pieces,
    token_views,
    token_weights,
    true_targets,
    without_layers,
    without_tokens,
)
from sidelight_lab.anatomy.examine import examine
from sidelight_lab.anatomy.report import write_anatomies
from sidelight_lab.cli.anatomy import anatomy as command
from tiny import untrained_probe

pytestmark = pytest.mark.slow
# Float32 sums over a few hundred terms.
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
# The states on disk are bf16, those of a forward pass here float32.
CACHED = {"atol": 0.05, "rtol": 0.05}
EVERY = [*((name, {}) for name in mechanism_names()), ("gate", {"activation": "identity"})]
every_mechanism = pytest.mark.parametrize(
    ("mechanism", "options"), [*EVERY, ("pooling", {"kind": "max"})]
)


@pytest.fixture(scope="module")
def splits(tiny, tmp_path_factory):
    root = tmp_path_factory.mktemp("states")
    return {kind: split_of(tiny, root, kind, 40, seed) for seed, kind in enumerate(TASKS)}


@pytest.fixture
def make(tiny, splits):
    """A probe of random weights on standardised states."""

    def build(mechanism="readout", options=None, kind="binary"):
        plain = untrained_probe(tiny, "toxicity", task=TASKS[kind])
        spec = mechanism_spec(mechanism, options)
        torch.manual_seed(7)
        geometry = Geometry(tiny.fingerprint.layers, tiny.fingerprint.width, TASKS[kind].outputs)
        built = build_mechanism(spec, geometry).eval().requires_grad_(False)
        for parameter in built.parameters():
            parameter.normal_(std=0.2)
        states = splits[kind].states.read(0).hidden
        return replace(
            plain, spec=spec, mechanism=built, standardisation=Standardisation.measured(states)
        )

    return build


def one_piece(probe, split):
    (piece,) = read_pieces(probe, split, device="cpu")
    return piece


def dense_hidden(probe, split):
    """Standardised states and mask as the mechanism's equation wants them, in cached order."""
    shard = split.states.read(0)
    own = probe.standardisation
    standard = (shard.hidden.float() - own.mean[:, None]) / own.scale[:, None]
    parts = [p.transpose(0, 1) for p in standard.split(shard.lengths.tolist(), 1)]
    hidden = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True).transpose(1, 2)
    return hidden, torch.arange(hidden.shape[2])[None] < shard.lengths[:, None]


@pytest.mark.parametrize(
    ("mechanism", "options", "kind"),
    [*((*one, "multiclass") for one in EVERY), ("gate", {}, "binary"), ("gate", {}, "multilabel")],
)
def test_contributions_and_the_target_at_the_mean_sum_to_the_target(
    splits, make, mechanism, options, kind
):
    probe, split = make(mechanism, options, kind), splits[kind]
    piece = one_piece(probe, split)
    targets = true_targets(split.task, split.labels[piece.texts])
    hidden, mask = dense_hidden(probe, split)
    parts = contributions(probe.mechanism, piece.tokens, targets)
    moved = probe.mechanism(hidden, mask) - probe.mechanism(torch.zeros_like(hidden), mask)
    summed = Ragged(parts.sum(1), piece.tokens.lengths).sums()
    # Integrated at a few points.
    torch.testing.assert_close(summed, (moved * targets).sum(1), atol=2e-3, rtol=2e-3)


def test_a_text_left_without_tokens_is_judged_as_one_mean_token(splits, make):
    probe = make("readout")
    bare = one_piece(probe, splits["binary"])
    bare.marks[:, 2] = True
    left = without_tokens(probe.mechanism, bare)["without template tokens"]
    torch.testing.assert_close(left, probe.mechanism.bias.expand(40, 1), **CLOSE)


@every_mechanism
def test_columns_give_the_logits_of_a_forward_pass_and_weights_that_sum_to_one(
    tiny, splits, make, mechanism, options
):
    probe, split = make(mechanism, options), splits["binary"]
    piece = one_piece(probe, split)
    cached = probe.mechanism.finish(probe.mechanism.summarise(piece.tokens))
    run = score(tiny, Bank([probe]), split.prompts)[0][piece.texts]
    np.testing.assert_allclose(cached, run, **CACHED)
    tokens = token_weights(probe.mechanism, piece.tokens)
    layers = layer_weights(probe.mechanism, piece.tokens)
    if tokens is not None:
        totals = Ragged(tokens, piece.tokens.lengths).sums()
        torch.testing.assert_close(totals, torch.ones_like(totals), **CLOSE)
    if layers is not None:
        torch.testing.assert_close(layers.sum(1), torch.ones(40), **CLOSE)
    assert tokens is None or bool((tokens >= 0).all())


def test_the_gates_weights_are_those_of_its_equation(splits, make):
    probe = make("gate")
    split = splits["binary"]
    piece = one_piece(probe, split)
    hidden, mask = dense_hidden(probe, split)
    token_stage, layer_stage = probe.mechanism.token_stage, probe.mechanism.layer_stage
    scores = torch.einsum("bltd,ld->blt", hidden, token_stage.score).tanh()
    weights = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1)
    found = token_weights(probe.mechanism, piece.tokens)
    torch.testing.assert_close(found, weights.transpose(1, 2)[mask], **CLOSE)
    vectors = torch.einsum("blt,bltd->bld", weights, hidden)
    layers = (vectors @ layer_stage.score[0]).tanh().softmax(-1)
    torch.testing.assert_close(layer_weights(probe.mechanism, piece.tokens), layers, **CLOSE)


@every_mechanism
def test_an_ablated_layer_is_at_its_mean_and_an_ablated_token_is_not_read(
    splits, make, mechanism, options
):
    probe, split = make(mechanism, options, "multiclass"), splits["multiclass"]
    piece, (hidden, mask) = one_piece(probe, split), dense_hidden(probe, split)
    found = without_layers(probe.mechanism, piece.tokens)
    for name, views in layer_views(hidden.shape[1]).items():
        for kept, logits in zip(views, found[name], strict=True):
            dense = probe.mechanism(hidden * kept[None, :, None, None], mask)
            torch.testing.assert_close(logits, dense, **CLOSE)
    found = without_tokens(probe.mechanism, piece)
    for name, kept in token_views(piece.marks).items():
        shown = mask.clone()
        shown[mask] = kept
        torch.testing.assert_close(found[name], probe.mechanism(hidden, shown), **CLOSE)


def test_a_probe_that_reads_one_layer_is_attributed_to_it(splits, make):
    probe, others = make("readout"), torch.arange(4) != 2
    for parameter in (probe.mechanism.value, probe.mechanism.last):
        parameter[others] = 0
    found = examine(probe, splits["binary"])
    for use in found.use.values():
        np.testing.assert_allclose(use.layer_shares, np.eye(4)[2], atol=1e-5)
    np.testing.assert_allclose(found.layers["drop"][others], found.score)
    assert found.layers["only"][2] == pytest.approx(found.score)
    assert found.layers["drop"][2] != pytest.approx(found.score)


def test_every_token_is_in_one_group_and_template_tokens_are_those_of_the_prompt(splits, make):
    split = splits["binary"]
    piece = one_piece(make(), split)
    groups = grouped(piece.marks)
    assert bool((groups.sum(1) == 1).all())
    parts = np.concatenate([np.array(split.prompts[int(i)].parts) for i in piece.texts])
    parts = parts[parts != Part.UNREAD]
    # What stands before a prompt's text is not read, so its first token is of the text.
    first, last, template, content = groups.sum(0).tolist()
    assert first == last == len(split)
    assert first + content == (parts == Part.PROMPT).sum()
    assert last + template == (parts == Part.TEMPLATE).sum()


def test_pieces_cover_every_text_once_however_small_they_are(splits, make, monkeypatch):
    probe, split = make(), splits["binary"]
    whole = examine(probe, split)
    monkeypatch.setattr("sidelight_lab.anatomy.attribution._PIECE_VALUES", 4 * 32 * 40)
    pieces = list(read_pieces(probe, split, device="cpu"))
    assert len(pieces) > 5
    assert sorted(torch.cat([piece.texts for piece in pieces]).tolist()) == list(range(40))
    one_class = split.select(np.flatnonzero(split.labels == 1))
    with pytest.raises(SidelightError, match="of class 'toxic'"):
        examine(probe, one_class)
    parts = examine(probe, split)
    assert parts.score == pytest.approx(whole.score)
    for name, use in parts.use.items():
        np.testing.assert_allclose(use.layer_effects, whole.use[name].layer_effects, atol=1e-5)


@pytest.mark.parametrize(
    ("mechanism", "kind"),
    [("attention", "binary"), ("readout", "multiclass"), ("gate", "multilabel")],
)
def test_all_files_are_written_for_every_task(tiny, splits, make, tmp_path, mechanism, kind):
    found = examine(make(mechanism, kind=kind), splits[kind], heat_maps=1)
    decode = lambda token: tiny.tokenizer.decode([token])  # noqa: E731
    paths = write_anatomies([found], tmp_path / "new", decode=decode)
    assert sorted(paths) == sorted((tmp_path / "new").iterdir())
    assert imread(tmp_path / "new" / f"{mechanism}.png").shape[0] > 500
    (stored,) = json.loads((tmp_path / "new" / "anatomy.json").read_text())
    assert stored["score"] == found.score
    page = (tmp_path / "new" / f"{mechanism}_heat_maps.html").read_text()
    for one in found.heat_maps:
        assert one.weights.shape == (len(one.token_ids), 4)
    assert page.count("<tr><th class='t'>") == sum(len(one.token_ids) for one in found.heat_maps)
    assert "&lt;|assistant|&gt;" in page


def test_the_command_writes_the_report_of_a_stored_probe(tiny, make, tmp_path, monkeypatch):
    monkeypatch.setenv("SIDELIGHT_CACHE", str(tmp_path / "cache"))
    save_probe(make(), tmp_path / "probe")
    data = write_rows(tmp_path / "rows.jsonl", 12, 5, labels=TASKS["binary"].labels)
    options = ["--label", "toxic", "--model", saved(tiny, tmp_path / "model")]
    options += ["--data", data, "--out", str(tmp_path / "out")]
    command.main([str(tmp_path / "probe"), *options], standalone_mode=False)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "readout.png", "readout_heat_maps.html", "anatomy.json", "report.md",
    }  # fmt: skip
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
