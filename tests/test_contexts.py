"""The settings in which training shows a text, and that none of them crosses a fold."""

import json
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

import sidelight.training.fit
from sidelight import classifier
from sidelight.cli.show import rate_sentence, traffic_lines
from sidelight.cli.train import _kinds, train
from sidelight.data.examples import Example, LabelledExamples
from sidelight.errors import SidelightError
from sidelight.models.conversation import EncodedPrompt, Message, PlainText, Reads, TokenRole
from sidelight.probes.bank import Bank
from sidelight.probes.card import TrainingRecord, read_card, summary
from sidelight.probes.mechanisms.base import mechanism_spec
from sidelight.statistics.background import Conversations, Detections, Traffic
from sidelight.statistics.calibration import fit_calibration
from sidelight.statistics.thresholds import ThresholdRule, operating_curves
from sidelight.training import contexts, loop
from sidelight.training.background import Background, load_background
from sidelight.training.contexts import Context, ContextSampler, draw_contexts
from sidelight.training.dataset import make_split
from sidelight.training.encoding import TextEncoder
from sidelight.training.fit import calibrate_probe, fit
from sidelight.training.loop import train_mechanisms
from sidelight.training.optimisation import TrainingRun
from sidelight.training.preparing import ProbeDataset, prepare
from sidelight.training.settings import FitOptions, TrainingSettings
from sidelight.training.traffic import (
    conversations_among,
    measure_traffic,
    warn_of_traffic,
)
from worlds.data import planted_rows, write
from worlds.models import INTENT, TOXICITY, saved, score, tiny_backbone, untrained_probe
from worlds.pretended_device import pretended
from worlds.servers import cli

TEXTS = [f"number {i:02d} has a text of its own" for i in range(60)]
EACH_TURN = Reads(scope="each_turn")
# Sentences that tell their conversation.
TRAFFIC = tuple(
    tuple(
        Message(role, f"Ordinary{i} thing said. Ordinary{i} thing done.")
        for role in ("user", "assistant", "user")[: 1 + i % 3]
    )
    for i in range(40)
)


def turns_of(*turns):
    return Example(tuple(Message("user", turn) for turn in turns))


@pytest.fixture
def examples():
    items = tuple(map(turns_of, TEXTS))
    return LabelledExamples(items, ({},) * 60, labels=np.arange(60) % 3 % 2, task=TOXICITY)


@pytest.fixture
def options(tmp_path, monkeypatch):
    monkeypatch.setattr(contexts, "_LEAST_CONTEXT_TOKENS", 20_000)
    return FitOptions(cache_root=tmp_path, reads=EACH_TURN, background=Background(TRAFFIC))


def drawn(backbone, examples, *, by_turn=True, traffic=TRAFFIC, tokens=40_000):
    sampler = ContextSampler(
        backbone.encoder,
        EACH_TURN,
        traffic,
        by_turn=by_turn,
        max_tokens=backbone.encoder.max_tokens,
    )
    return sampler.of_texts(examples, np.arange(len(examples)), tokens=tokens)


def read_text(backbone, prompt):
    ids = [
        token
        for token, role in zip(prompt.token_ids, prompt.token_roles, strict=True)
        if role in (TokenRole.PROMPT, TokenRole.REPLY)
    ]
    return backbone.tokenizer.decode(ids)


def test_read_tokens_of_context_contain_full_labelled_text(tiny, examples):
    contexts = drawn(tiny, examples)
    kinds = Counter(context.kind for context in contexts)
    assert {"inside", "turn"} == {*kinds}
    assert len(contexts) <= 3 * len(examples)
    for context in contexts:
        text = TEXTS[context.text]
        words = read_text(tiny, context.prompt).replace("\n", " ").split(" ")
        if context.kind == "inside":
            assert text in context.example.text
        assert text.replace(" ", "") in "".join(words)
    # Some are read by themselves, others with all that stands around them.
    turns = [c for c in contexts if c.kind == "turn" and len(c.example.messages) > 1]
    wholes = ["Ordinary" in read_text(tiny, c.prompt) for c in turns]
    assert {*wholes} == {True, False}


def test_multiclass_contexts_put_text_in_last_turn(tiny, examples):
    contexts = drawn(tiny, replace(examples, labels=np.arange(60) % 3, task=INTENT), by_turn=False)
    assert {context.kind for context in contexts} == {"turn"}
    assert all(c.example.messages[-1].content == TEXTS[c.text] for c in contexts)


@pytest.mark.parametrize("role", ["system", "developer"])
@pytest.mark.parametrize("by_turn", [True, False])
def test_contexts_contain_no_system_or_developer_turns(tiny, examples, role, by_turn):
    traffic = tuple((Message(role, "Rules."), *turns) for turns in TRAFFIC)
    contexts = drawn(tiny, examples, by_turn=by_turn, traffic=traffic)
    turns = [context for context in contexts if context.kind == "turn"]
    assert any(len(context.example.messages) > 1 for context in turns)
    for context in turns:
        assert role not in {message.role for message in context.example.messages}


def test_contexts_respect_token_budget_and_are_deterministic(tiny, examples):
    few, more = (drawn(tiny, examples, tokens=tokens) for tokens in (500, 2000))
    assert 500 <= sum(len(c.prompt) for c in few) < 500 + tiny.encoder.max_tokens
    assert [c.prompt for c in more[: len(few)]] == [c.prompt for c in few]
    # Each text has one before any has two.
    assert len({c.text for c in few}) == len(few)


def words_of_traffic(items):
    return {word for item in items for word in item.text.split() if word.startswith("Ordinary")}


def assert_parted(split, count):
    """That no background and no text is in two folds."""
    folds = [split.examples.select(fold) for fold in split.folds(count)]
    assert len(folds) == count
    texts = [{item.text for item in fold.items if item.text in TEXTS} for fold in folds]
    for members_of_folds in (texts, [words_of_traffic(fold.items) for fold in folds]):
        assert len(set().union(*members_of_folds)) == sum(map(len, members_of_folds))
        assert all(members_of_folds)


@pytest.mark.slow
def test_contexts_and_background_stay_in_fold_of_their_text(tiny, examples, options):
    dataset = prepare(tiny, examples, None, options=options)
    assert dataset.validation.examples.content_hash == examples.content_hash
    training = dataset.training
    assert sorted(np.concatenate(dataset.folds)) == [*range(len(training))]
    assert len(dataset.contexts) == len(training) - 60
    fold_of = np.empty(len(training), dtype=int)
    for fold, rows in enumerate(dataset.folds):
        fold_of[rows] = fold
    for row, context in enumerate(dataset.contexts, start=60):
        used = {word for word in context.example.text.split() if word.startswith("Ordinary")}
        conversations = {int(word.removeprefix("Ordinary")) for word in used}
        assert {number % len(dataset.folds) for number in conversations} <= {fold_of[row]}
        if context.text is None:
            assert context.kind == "background"
            assert training.labels[row] == 0
        else:
            assert training.labels[row] == examples.labels[context.text]
            assert fold_of[row] == fold_of[context.text]
    assert_parted(training, 3)


@pytest.mark.slow
def test_validation_texts_share_no_background_with_training_texts(tiny, examples, options):
    held_out, rest = examples.select(range(20)), examples.select(range(20, 60))
    dataset = prepare(tiny, rest, held_out, options=options)
    sides = [dataset.training.examples.items[40:], dataset.scored.examples.items[20:]]
    seen = [*map(words_of_traffic, sides)]
    assert all(seen)
    assert not seen[0] & seen[1]
    # Folds that are drawn later keep to it too.
    assert_parted(dataset.training, 5)
    assert len(dataset.validation) == 20


def with_long_system_prompts(examples, rows):
    items = [*examples.items]
    for row in rows:
        turns = Message("system", "Be brief. " * 20), *items[row].messages
        items[row] = Example(turns, place=f"chats.jsonl, line {row + 1}")
    return replace(examples, items=tuple(items))


@pytest.mark.slow
def test_texts_crowded_out_by_system_prompt_are_dropped_and_counted(
    tiny, examples, options, warned
):
    held_out = with_long_system_prompts(examples.select(range(20)), [3])
    rest = with_long_system_prompts(examples.select(range(20, 60)), [5, 7])
    options = replace(options, max_tokens=200, background=Background())
    dataset = prepare(tiny, rest, held_out, options=options)
    assert (len(dataset.training.without_contexts()), len(dataset.validation)) == (38, 19)
    assert rest.items[5] not in dataset.training.without_contexts().examples.items
    warnings = warned()
    for message in (
        "2 of 40 training texts were left out",
        "1 of 20 validation texts were left out",
    ):
        (warning,) = (each for each in warnings if message in each)
        assert re.search(r"The first is chats\.jsonl, line [46]\. .*--set max_tokens", warning)
    # Other texts that are longer are cut, and evaluation reads all of them whole.
    assert sum("left out" in warning for warning in warnings) == 2
    report = classifier.Classifier(tiny, untrained_probe(tiny, "toxicity")).evaluate(rest)
    assert report.rows == 40


@pytest.mark.slow
def test_card_counts_only_contexts_of_training_texts(tiny, examples, options, tmp_path):
    held_out, rest = examples.select(range(20)), examples.select(range(20, 60))
    options = replace(options, mechanism=mechanism_spec("pooling"))
    dataset = prepare(tiny, rest, held_out, options=options)
    counts = Counter(
        context.kind for context in dataset.training.contexts if context.kind != "without_context"
    )
    assert counts != Counter(context.kind for context in dataset.contexts)
    fit(tiny, rest, held_out, name="p", options=options, out=tmp_path / "p")
    probe_card = read_card(tmp_path / "p")
    assert probe_card.training.contexts == counts
    card = summary(probe_card)
    assert f"40 texts, and in {counts.total():,} contexts" in card["trained on"]


@pytest.mark.slow
def test_response_probes_are_not_compared_with_background(tiny, examples, options, warned):
    items = tuple(replace(item, response="Ordinary0 thing said.") for item in examples.items)
    # A text of the background, which a probe of prompts leaves out.
    items = (Example(TRAFFIC[0], response="Fine."), *items[1:])
    examples = replace(examples, items=items)
    options = replace(options, reads=Reads("response"))
    prepare(tiny, examples, None, options=options)
    assert not any("background" in warning for warning in warned())
    prepare(tiny, examples, None, options=replace(options, reads=EACH_TURN))
    assert any("background conversations contain" in each for each in warned())


@pytest.mark.slow
def test_background_containing_validation_texts_is_excluded(tiny, examples, options, warned):
    """As negatives, they would train the probe on what calibrates it."""
    words = ("apple", "boat", "cloud", "door", "eagle", "flute", "grass", "house", "ink", "jug")
    texts = [f"{word} {word.upper()} {word[::-1]}" for word in words]
    validation = replace(examples.select(range(10)), items=tuple(map(turns_of, texts)))
    copies = tuple((Message("user", text),) for text in texts)
    with_copies = replace(options, background=Background((*copies, *TRAFFIC)))
    dataset = prepare(tiny, examples, validation, options=with_copies)
    assert any("10 background conversations contain" in warning for warning in warned())
    drawn = {c.example.text for c in dataset.split.contexts if c.kind == "background"}
    assert drawn
    assert not drawn & {*texts}


@pytest.mark.slow
def test_texts_have_no_contexts_without_background(tiny, examples, tmp_path):
    dataset = prepare(tiny, examples, None, options=FitOptions(cache_root=tmp_path))
    assert (dataset.contexts, len(dataset.training), dataset.training.contexts) == ((), 60, ())
    # Plain text is a context without background, which says nothing of background traffic.
    both = tiny_backbone(prompt_format="both")
    spec = mechanism_spec("pooling")
    options = FitOptions(mechanism=spec, context_tokens=2_000, cache_root=tmp_path)
    fitted = fit(both, examples, None, name="p", options=options)
    assert len(fitted.traffic.background) == 0


@pytest.mark.slow
def test_only_dual_format_probes_train_on_and_classify_plain_text(tiny, examples, tmp_path):
    backbone = tiny_backbone(prompt_format="both")
    dataset = prepare(backbone, examples, None, options=FitOptions(cache_root=tmp_path))
    is_plain = [prompt.is_plain for prompt in dataset.training.states.prompts]
    assert is_plain.count(True) >= 60
    assert not any(prompt.is_plain for prompt in dataset.validation.states.prompts)
    probes = [untrained_probe(tiny, "p"), untrained_probe(tiny, "q").changed(prompt_format="both")]
    texts = (turns_of("a text").messages, PlainText("a text"))
    of_chats, of_both = score(tiny, Bank(probes), [tiny.encoder.encode(text) for text in texts])
    assert [*np.isfinite(of_chats[:, 0])] == [True, False]
    assert np.isfinite(of_both).all()


def test_command_line_and_python_options_reach_training(tmp_path, monkeypatch):
    asked = []

    def fit(backbone, *_, options, **_named):
        asked.append([backbone.encoder.prompt_format, len(options.background.conversations)])
        raise SidelightError("asked")

    for module in (sidelight.training.fit, classifier):
        monkeypatch.setattr(module, "fit", fit)
    data, model = tmp_path / "train.jsonl", saved(tiny_backbone(), tmp_path / "model")
    write(data, planted_rows("binary", 60))
    traffic = tmp_path / "traffic.jsonl"
    traffic.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS[:7]))
    line = ["train", "--data", str(data), "--model", model, "--positive", "toxic"]
    for flags, named in (
        (["--background", "none"], {"background": "none"}),
        (
            ["--set", "format=both", "--background", str(traffic)],
            {"prompt_format": "both", "background": traffic},
        ),
    ):
        assert cli(*line, "--out", str(tmp_path / "p"), *flags) == 2
        with pytest.raises(SidelightError, match="asked"):
            classifier.train(model, data, positive="toxic", **named)
    packaged = len(load_background("packaged").conversations)
    assert asked == [["chat", 0]] * 2 + [["both", 7 + packaged]] * 2


def single_context(words, kind="background", text=None):
    """A context of so many words around a text."""
    return Context(kind, turns_of("w " * words), EncodedPrompt((), ()), words, text)


def conversations(logits):
    """Each in a part of its own."""
    return Conversations(logits, np.arange(len(logits)))


@pytest.mark.parametrize(("rule", "most"), [("f1", 3), ("fpr=0.1", 10), ("recall=0.9", 100)])
def test_thresholds_limit_background_false_positives(tiny, rule, most):
    rule, before = ThresholdRule.parse(rule), (0.3,)
    highest = np.random.default_rng(0).normal(0, 2, size=(100, 1))
    none = fit_calibration("none", highest, np.arange(100) % 2, TOXICITY)
    background = conversations(highest)
    (after,) = background.thresholds_at_fpr(before, none, rule)
    chance = none.apply(highest)
    assert after >= before[0]
    assert (chance >= after).sum() <= most
    # No higher than it must be.
    assert after == before[0] or (chance >= after - 0.05).sum() > most
    assert background.thresholds_at_fpr((0.999,), none, rule) == (0.999,)
    # What every conversation reaches is no threshold.
    assert conversations(highest + 1e3).thresholds_at_fpr(before, none, rule)[0] < 1
    # A recalibration keeps to what training has kept of it.
    probe = untrained_probe(tiny, "p")
    changed = probe.changed(training=TrainingRecord(traffic=Traffic(background, 0)))
    assert changed.card.background.thresholds_at_fpr(before, none, rule) == (after,)
    assert probe.card.background.thresholds_at_fpr(before, none, rule) == before
    # Nine conversations cannot tell four or ten in a hundred: where a rate is asked for, all pass.
    (of_few,) = conversations(highest[:9]).thresholds_at_fpr(before, none, rule)
    assert of_few == before[0] if rule.kind != "fpr" else of_few > chance[:9].max()


def test_flagged_conversations_are_counted_at_out_of_fold_thresholds():
    """Of a part that is unlike all others, all are flagged, whatever the served threshold is."""
    logits, folds = np.zeros((100, 1)), np.arange(100) // 20
    logits[folds == 3] = 5.0
    none = fit_calibration("none", logits, np.arange(100) % 2, TOXICITY)
    rule = ThresholdRule()
    background = Conversations(logits, folds)
    (served,) = background.thresholds_at_fpr((0.3,), none, rule)
    assert (none.apply(logits) >= served).sum() == 0
    assert background.count_flagged(TOXICITY, (0.3,), none, rule) == 20
    applied = background.left_out_thresholds((0.3,), none, rule)
    assert applied[3] < served == applied[0]
    # What costs more than a rate is not raised.
    costs = ThresholdRule.parse("recall=0.9")
    assert (background.left_out_thresholds((0.3,), none, costs) == 0.3).all()


def test_few_conversations_yield_no_false_positive_rate():
    sentence = rate_sentence(0, 99, TOXICITY)
    assert "too few" in sentence
    assert "%" not in sentence
    # `eval` and `guard` say it too, which have no such option.
    remedy = re.search(
        r"sidelight (\w+) (--set) context_tokens=N, with (--data) guard:NAME", sentence
    )
    assert {*remedy.groups()[1:]} <= {o for each in train.params for o in each.opts}
    assert remedy[1] == train.name
    assert "context_tokens" in _kinds()
    assert rate_sentence(4, 100, TOXICITY) == (
        "False positives: 4.0 % of 100 conversations from held-out sources (95 % CI 1.6 to 9.8 %)"
    )


@pytest.mark.slow
def test_texts_without_context_carry_most_training_weight(tiny, examples, options):
    dataset = prepare(tiny, examples, None, options=replace(options, context_tokens=6_000)).training
    assert len(dataset.without_context) < 0.6 * len(dataset)
    assert dataset.weights.mean() == pytest.approx(1)
    assert dataset.weights[dataset.without_context].sum() == pytest.approx(0.7 * len(dataset))
    for fold in dataset.folds(5):
        assert dataset.without(fold).weights.mean() == pytest.approx(1)
    assert (dataset.without_contexts().weights == 1).all()
    # Where contexts are few, no text counts less than it would by itself.
    few = dataset.select(
        [*dataset.without_context, *np.setdiff1d(range(len(dataset)), dataset.without_context)[:5]]
    )
    assert (few.weights == 1).all()


@pytest.mark.slow
def test_contexts_inherit_text_weight_but_background_is_unweighted(tiny, examples, options):
    options = replace(options, context_tokens=6_000)
    weights = np.random.default_rng(0).uniform(1, 10, len(examples))
    plain = prepare(tiny, examples, None, options=options)
    dataset = prepare(tiny, replace(examples, weights=weights), None, options=options)
    texts = [1.0 if context.text is None else weights[context.text] for context in dataset.contexts]
    assert 1.0 in texts
    relative = dataset.training.weights / plain.training.weights
    np.testing.assert_allclose(relative / relative[0] * weights[0], [*weights, *texts])
    assert dataset.training.weights.mean() == pytest.approx(1)


@pytest.mark.slow
def test_training_loss_uses_text_weights(tiny, examples, options, monkeypatch):
    dataset = prepare(tiny, examples, None, options=replace(options, context_tokens=6_000)).training
    heard: list[float] = []
    loss = TrainingRun.loss

    def counted(run, tokens, targets):
        heard.extend(targets.weights.tolist())
        return loss(run, tokens, targets)

    monkeypatch.setattr(TrainingRun, "loss", counted)
    settings = TrainingSettings(epochs=1, least_steps=0, standardise=False)
    train_mechanisms([(mechanism_spec("pooling"), settings)], split=dataset)
    np.testing.assert_allclose(sorted(heard), sorted(dataset.weights), rtol=1e-6)


@pytest.mark.slow
def test_contexts_match_requested_token_count(tiny, examples, options):
    few, more = (
        prepare(tiny, examples, None, options=replace(options, context_tokens=tokens)).contexts
        for tokens in (3_000, 6_000)
    )
    for drawn, tokens in ((few, 3_000), (more, 6_000)):
        total = sum(len(context.prompt) for context in drawn)
        # Each group ends with a whole context.
        assert tokens <= total <= tokens + 5 * 256
    assert {c.group for c in more if c.kind == "background"} == {0, 1, 2, 3, 4}


def test_gpu_draws_more_context_tokens(examples, options, monkeypatch):
    monkeypatch.setattr(contexts, "_LEAST_CONTEXT_TOKENS", 5_000)
    monkeypatch.setattr(contexts, "_LEAST_CONTEXT_TOKENS_ON_GPU", 10_000)
    counts = []
    with pretended() as device:
        for where in ("cpu", device):
            backbone = tiny_backbone()
            backbone.model.to(where)
            groups = [(np.arange(60), options.background)]
            drawn = draw_contexts(
                backbone, examples, groups, options, TextEncoder(backbone.encoder)
            )
            counts.append(sum(len(context.prompt) for context in drawn))
    assert counts[0] < 6_000 < counts[1]


@pytest.mark.slow
def test_background_containing_labelled_texts_is_excluded(tiny, examples, options, warned):
    copies = tuple((Message("user", text.upper()),) for text in TEXTS[:10])
    with_copies = replace(options, background=Background((*copies, *TRAFFIC)))
    dataset = prepare(tiny, examples, None, options=with_copies)
    assert any("10 background conversations" in warning for warning in warned())
    drawn_texts = {
        context.example.text for context in dataset.contexts if context.kind == "background"
    }
    assert not drawn_texts & {text.upper() for text in TEXTS}


@pytest.mark.slow
def test_card_reports_metrics_at_served_threshold_without_background_texts(tiny, examples, options):
    positives = [text for text, label in zip(TEXTS, examples.labels, strict=True) if label]
    alike = tuple((Message("user", f"{text}. Ordinary{i}"),) for i, text in enumerate(positives))
    settings = TrainingSettings(epochs=2, batch_size=16, least_steps=0)
    changed = replace(options, settings=settings, context_tokens=8_000)
    changed = replace(changed, background=Background(TRAFFIC + alike * 3))
    fitted = fit(tiny, examples, None, name="p", options=changed)
    assert len(fitted.traffic.worst) == 3
    # Background texts, which may be private or under a licence of their own, stay out of artifacts.
    record = fitted.probe.card.to_json()
    texts = {turn.content for turns in changed.background.conversations for turn in turns}
    assert not [text for text in texts if len(text) > 3 and text in record]
    assert fitted.probe.card.training.flagged == (
        fitted.traffic.flagged,
        len(fitted.traffic.background),
    )
    assert fitted.report.thresholds == fitted.probe.thresholds
    assert fitted.probe.card.training.validation.report.thresholds == fitted.probe.thresholds


def test_traffic_is_measured_by_conversation_and_length():
    contexts = [single_context(words) for words in (20, 150, 30, 31)]
    contexts += [single_context(10, "inside", 0), single_context(120, "turn", 1)]
    contexts += [single_context(10, "plain", 0)]
    chance = np.array([[0.9], [0.2], [0.7], [0.1], [0.8], [0.4], [0.1]])
    labels = np.array([0] * 4 + [1] * 3)
    background = conversations_among(contexts, chance)
    thresholds = np.array([[0.5]])
    traffic = measure_traffic(TOXICITY, contexts, background, chance, labels, thresholds)
    assert (len(traffic.background), traffic.flagged) == (4, 2)
    assert {kind: (each.negatives, each.flagged) for kind, each in traffic.kinds.items()} == {
        "up to 30 words": (2, 2),
        "to 150": (2, 0),
        "longer": (0, 0),
        "one turn": (4, 2),
        "several turns": (0, 0),
    }
    short, middle, _ = traffic.surroundings.values()
    assert short == Detections(positives=1, found=1, negatives=3, flagged=2)
    assert middle == Detections(positives=1, found=0, negatives=1, flagged=0)
    assert [probability for probability, _ in traffic.worst] == [0.9, 0.7, 0.2]
    # What is kept with a probe holds no text, which may be private.
    assert "w w" in traffic_lines(traffic, TOXICITY)
    assert "w w" not in json.dumps(traffic.to_dict())


@pytest.mark.slow
def test_multiclass_probes_classify_background_as_none(tiny, options):
    kinds = ("pay pay", "give back", "late")
    texts = [f"{kinds[i % 3]} number {i:02d} {kinds[i % 3]}" for i in range(60)]
    labelled = LabelledExamples(
        tuple(map(turns_of, texts)), ({},) * 60, labels=np.arange(60) % 3, task=INTENT
    )
    brief = TrainingSettings(learning_rate=0.05, epochs=2, batch_size=16, least_steps=0)
    changed = replace(options, settings=brief, context_tokens=10_000)
    fitted = fit(tiny, labelled, None, name="p", options=changed)
    assert fitted.probe.task.labels == (*INTENT.labels, "none")
    assert len(fitted.traffic.background) == len(TRAFFIC)
    assert fitted.traffic.flagged <= 0.1 * len(TRAFFIC)
    sentence = rate_sentence(3, 100, fitted.probe.task)
    assert sentence.startswith("Classes other than 'none': 3.0 % of 100 conversations")
    # The figures are those of the classes that texts have.
    assert [*fitted.report.per_class] == [*INTENT.labels]
    assert fitted.report.metrics["accuracy"].value > 0.9
    assert fitted.probe.card.background.logits.shape == (len(TRAFFIC), 4)
    assert fitted.probe.card.training.flagged == (fitted.traffic.flagged, len(TRAFFIC))
    without = fit(tiny, labelled, None, name="p", options=replace(changed, none=False))
    assert (without.probe.task, without.traffic) == (INTENT, None)
    # A file may have such a class itself.
    with_none = replace(labelled, task=replace(INTENT, labels=("billing", "none", "refund")))
    with pytest.raises(SidelightError, match="--set none=false"):
        fit(tiny, with_none, None, name="p", options=changed)
    assert fit(tiny, with_none, None, name="p", options=replace(changed, none=False))


@pytest.mark.parametrize(
    ("flagged", "threshold", "told"),
    [(2, 0.5, ""), (2, 0.8, "finds 10 of 20 'toxic' texts"), (30, 0.5, "flags 30.0%")],
)
def test_costly_background_traffic_triggers_warning_with_remedy(flagged, threshold, told, warned):
    scores = np.r_[np.full(10, 0.9), np.full(10, 0.7), np.full(180, 0.2)]
    curves = operating_curves(TOXICITY, scores[:, None], np.arange(200) < 20)
    traffic = Traffic(conversations(np.zeros((100, 1))), flagged)
    warn_of_traffic(traffic, curves, [threshold], ThresholdRule())
    doubts = warned()
    assert len(doubts) == bool(told)
    assert all(told in doubt and "--background FILE" in doubt for doubt in doubts)
    assert all("--threshold fpr=" in doubt for doubt in doubts)


@pytest.mark.slow
def test_training_scores_match_served_scores(tiny, options, monkeypatch):
    # A probe that learns that parts are harmless gives the whole the highest logit here.
    monkeypatch.setattr(loop, "_SEGMENT_SHARE", 0.0)
    items = [turns_of("one", "two two two two", f"number {i} three") for i in range(20)]
    labelled = LabelledExamples(tuple(items), ({},) * 20, labels=np.arange(20) % 2, task=TOXICITY)
    split = make_split(tiny, labelled, options)
    candidate = mechanism_spec("readout"), TrainingSettings(learning_rate=0.03, epochs=4)
    dataset = ProbeDataset.held_out(tiny, split, split)
    (trained,) = train_mechanisms([candidate], split=dataset.split, left_out=dataset.left_out)
    fitted = calibrate_probe([trained], dataset, name="p", options=options)
    prompts = [tiny.encoder.encode(item.messages) for item in items]
    (served,) = score(tiny, Bank([fitted.probe]), prompts)
    (as_conversation,) = score(tiny, Bank([fitted.probe.changed(reads=Reads())]), prompts)
    assert np.abs(served - as_conversation).max() > 0.1
    # States are stored in bf16.
    np.testing.assert_allclose(trained.logits, served, atol=0.05 * served.std())


@pytest.mark.slow
def test_segments_of_negative_texts_replace_them_in_training(tiny, options, monkeypatch):
    items = [turns_of("one", "two two two two", f"number {i} three") for i in range(20)]
    labelled = LabelledExamples(tuple(items), ({},) * 20, labels=np.arange(20) % 2, task=TOXICITY)
    split = make_split(tiny, labelled, options)
    read: dict[int, list[int]] = {0: [], 1: []}
    loss = TrainingRun.loss

    def heard(run, tokens, targets):
        labels, lengths = targets.labels.values.tolist(), tokens.lengths.tolist()
        for label, length in zip(labels, lengths, strict=True):
            read[label].append(length)
        return loss(run, tokens, targets)

    monkeypatch.setattr(TrainingRun, "loss", heard)
    candidate = mechanism_spec("readout"), TrainingSettings(epochs=8, least_steps=0)
    train_mechanisms([candidate], split=split)
    wholes = {*split.states.lengths}
    lengths = {len(segment) for segments in split.segments for segment in segments} - wholes
    assert {*read[1]} <= wholes
    assert {*read[0]} & lengths == lengths
    assert {*read[0]} <= lengths | wholes
    # Seven of ten, of 80 that were read; some parts are as long as a whole.
    assert 0.4 < np.mean([length in lengths for length in read[0]]) < 0.9
