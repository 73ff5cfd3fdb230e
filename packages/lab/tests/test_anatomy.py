"""What an anatomy says of a probe agrees with the probe's own arithmetic."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from planted_data import write_rows

import wordings
from sidelight.classifier import Classifier
from sidelight.data.loading import load_examples
from sidelight.errors import SidelightError
from sidelight.models.conversation import TokenRole
from sidelight.probes.artifact import save_probe
from sidelight.probes.mechanisms.base import (
    Geometry,
    build_mechanism,
    mechanism_names,
    mechanism_spec,
)
from sidelight.scoring import encode
from sidelight.types import Span
from sidelight_lab.anatomy import (
    ablated,
    examine,
    read_projections,
    token_groups,
    token_masks,
    write_anatomy,
)
from sidelight_lab.cli.anatomy import anatomy as command
from sidelight_lab.spans_anatomy import plot_thresholds, worst_spans_page
from worlds.data import TASKS, examples, span_rows
from worlds.models import saved, spans_probe, untrained_probe

pytestmark = pytest.mark.slow
# Float32 sums over a few hundred terms.
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
ODD_NAMES = ("_hidden", "costs $5 and $6", r"\frac{", "x" * 300)
EVERY = [*((name, {}) for name in mechanism_names()), ("pooling", {"kind": "max"})]


@pytest.fixture
def make(tiny):
    """A probe of random weights."""

    def build(mechanism="readout", options=None, kind="binary"):
        plain = untrained_probe(tiny, "toxicity", task=TASKS[kind])
        spec = mechanism_spec(mechanism, options)
        torch.manual_seed(7)
        geometry = Geometry(tiny.fingerprint.layers, tiny.fingerprint.width, TASKS[kind].outputs)
        built = build_mechanism(spec, geometry).eval().requires_grad_(False)
        for parameter in built.parameters():
            parameter.normal_(std=0.2)
        return Classifier(tiny, replace(plain.changed(mechanism=spec), mechanism=built))

    return build


def all_projections(classifier, texts):
    prompts = encode(classifier.backbone.encoder, texts.items)
    (batch,) = read_projections(classifier, prompts)
    return prompts, *batch


@pytest.mark.parametrize(("mechanism", "options"), EVERY)
def test_ablation_sets_layers_to_mean_and_masks_tokens(tiny, make, mechanism, options):
    classifier, texts = make(mechanism, options), examples("binary", 12, 3)
    prompts, rows, tokens = all_projections(classifier, texts)
    groups = [token_groups(prompts[row], classifier.probe.reads) for row in rows]
    ablations = ablated(tokens, torch.cat(groups))
    found = {
        ablation: classifier.probe.mechanism.logits(states)
        for ablation, states in ablations.items()
    }
    full = torch.from_numpy(classifier.logits(texts.items)[rows]).float()
    torch.testing.assert_close(found["everything"], full, **CLOSE)
    # The mechanism's equation, on states that are standardised as its probe says.
    copies = [[] for _ in rows]

    def keep(_layer, hidden):
        for copy, states, row in zip(copies, hidden, rows, strict=True):
            copy.append(states[: len(prompts[row])][prompts[row].mask(classifier.probe.reads)])

    with tiny.tapped(keep):
        tiny.run([prompts[row] for row in rows])
    standardisation = classifier.probe.standardisation
    for place, (copy, groups_of_text) in enumerate(zip(copies, groups, strict=True)):
        hidden = (torch.stack(copy) - standardisation.mean[:, None]) / standardisation.scale[
            :, None
        ]
        for layer in range(len(copy)):
            is_included = torch.arange(len(copy)) != layer
            for ablation, mask in (("drop", is_included), ("only", ~is_included)):
                dense = (hidden * mask[:, None, None])[None]
                logits = classifier.probe.mechanism(dense, torch.ones(1, dense.shape[2]).bool())
                torch.testing.assert_close(found[f"{ablation} {layer}"][place], logits[0], **CLOSE)
        for ablation, is_read in token_masks(groups_of_text).items():
            logits = classifier.probe.mechanism(hidden[None], is_read[None])
            torch.testing.assert_close(found[ablation][place], logits[0], **CLOSE)


def test_text_without_tokens_is_scored_as_one_mean_token(make):
    classifier = make("readout")
    _, _, tokens = all_projections(classifier, examples("binary", 5, 3))
    template = torch.tensor([[False, False, True, False]]).expand(len(tokens.values), -1)
    left = ablated(tokens, template)["without template tokens"]
    bias = classifier.probe.mechanism.bias.expand(5, 1)
    torch.testing.assert_close(classifier.probe.mechanism.logits(left), bias, **CLOSE)


def test_single_layer_probe_is_attributed_to_that_layer(make):
    classifier, is_unread = make("readout"), torch.arange(4) != 2
    for parameter in (classifier.probe.mechanism.value, classifier.probe.mechanism.last):
        parameter[is_unread] = 0
    found = examine(classifier, examples("binary", 40, 0))
    for use in found.use.values():
        np.testing.assert_allclose(use.layer_shares, np.eye(4)[2], atol=1e-5)
    scores = {ablation: np.array(by_layer) for ablation, by_layer in found.layer_ablation.items()}
    np.testing.assert_allclose(scores["drop"][is_unread], found.score)
    assert scores["only"][2] == pytest.approx(found.score)
    assert scores["drop"][2] != pytest.approx(found.score)


def test_token_groups_partition_tokens_and_match_token_roles(tiny, make):
    prompts = encode(tiny.encoder, examples("binary", 9, 0).items)
    groups = torch.cat([token_groups(prompt, make().probe.reads) for prompt in prompts])
    assert bool((groups.sum(1) == 1).all())
    token_roles = np.concatenate([np.array(prompt.token_roles) for prompt in prompts])
    # What stands before a prompt's text is not read, so its first token is of the text.
    first, last, template, content = groups.sum(0).tolist()
    assert first == last == len(prompts)
    assert first + content == (token_roles == TokenRole.PROMPT).sum()
    assert last + template == (token_roles == TokenRole.TEMPLATE).sum()


@pytest.mark.parametrize(
    ("mechanism", "kind"),
    [("attention", "binary"), ("readout", "multiclass"), ("gate", "multilabel")],
)
def test_write_anatomy_writes_all_files_for_every_task_kind(make, tmp_path, mechanism, kind):
    found = examine(make(mechanism, kind=kind), examples(kind, 40, 0))
    paths = write_anatomy(found, tmp_path / "new")
    assert sorted(paths) == sorted((tmp_path / "new").iterdir())
    assert imread(tmp_path / "new" / "anatomy.png").shape[0] > 500
    stored = json.loads((tmp_path / "new" / "anatomy.json").read_text())
    assert stored["score"] == found.score
    for use in stored["use"].values():
        assert sum(use["token_shares"]) == pytest.approx(1)
        assert sum(use["layer_shares"]) == pytest.approx(1)
    report = (tmp_path / "new" / "report.md").read_text()
    assert all(f"| {name}" in report for name in found.use)


def test_command_writes_report_and_examine_rejects_single_class(tiny, make, tmp_path):
    save_probe(make().probe, tmp_path / "probe")
    data = write_rows(tmp_path / "rows.jsonl", 12, 5, labels=TASKS["binary"].labels)
    options = ["--label", "toxic", "--model", saved(tiny, tmp_path / "model")]
    options += ["--data", data, "--out", str(tmp_path / "out")]
    command.main([str(tmp_path / "probe"), *options], standalone_mode=False)
    assert (tmp_path / "out" / "report.md").exists()
    texts = examples("binary", 12, 5)
    alike = texts.select(np.flatnonzero(texts.labels == 1))
    with pytest.raises(SidelightError, match=wordings.NO_ROW_OF_CLASS.format(label="toxic")):
        examine(make(), alike)


def test_plot_thresholds_handles_odd_names_and_absent_labels(tmp_path):
    scores = np.random.default_rng(0).random((200, 4))
    holds = scores > 0.5
    # No character has the last label.
    holds[:, 3] = False
    path = plot_thresholds(holds, scores, ODD_NAMES, tmp_path, thresholds=(0.5,) * 4, title="a $p")
    assert path.name == "thresholds.png"
    assert imread(path).std() > 0.01


def test_worst_spans_page_sorts_texts_and_annotates_span_errors():
    rows = [("all <b> right", 0, 3), ("Call Ann Lee, now", 5, 12), ("Ann and Lee", 0, 3)]
    texts = load_examples(
        [
            {"text": text, "spans": [{"start": start, "end": end, "label": "NAME"}]}
            for text, start, end in rows
        ],
        spans="spans",
    )
    predicted = [[Span(0, 3, "NAME")], [Span(9, 17, "NAME")], [Span(8, 11, "NAME")]]
    page = worst_spans_page(texts, predicted, title="<a>")
    assert "&lt;a&gt;: the worst 2 texts" in page
    assert page.index("0.000, text 3") < page.index("0.400, text 2")
    assert '<span class="missed" title="missed: NAME">Ann </span>' in page
    assert '<span class="found" title="found: NAME">Lee</span>' in page
    assert '<span class="wrong" title="wrong: NAME">, now</span>' in page
    assert "right" not in page


def test_command_writes_threshold_plot_and_worst_spans_page(tiny, tmp_path):
    probe = spans_probe(tiny, "pii")
    probe = probe.changed(task=replace(probe.task, labels=("NUMBER", "SHOUT")))
    save_probe(probe, tmp_path / "probe")
    lines = [json.dumps({"text": row["text"], "pii": row["spans"]}) for row in span_rows(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    options = ["--data", str(tmp_path / "rows.jsonl"), "--spans", "pii"]
    options += ["--model", saved(tiny, tmp_path / "model"), "--out", str(tmp_path / "out")]
    command.main([str(tmp_path / "probe"), *options], standalone_mode=False)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"thresholds.png", "worst.html"}
    assert "pii: the worst" in (tmp_path / "out" / "worst.html").read_text()
