"""The classifier that users hold: text in, verdicts out; train, evaluate, predict, save, load."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import overload

import numpy as np

from sidelight.data.evaluation import Report, SpanReport
from sidelight.data.examples import (
    Example,
    Examples,
    LabelledExamples,
    SpanExamples,
    as_example,
)
from sidelight.data.guards import guard_of, span_column
from sidelight.data.loading import load_examples
from sidelight.data.readers import InMemory
from sidelight.engines.backend import EngineOptions, backend_of
from sidelight.engines.transformers.backbone import DtypeName
from sidelight.errors import SidelightError, warnings_ignored
from sidelight.guards import probe_folder
from sidelight.models.conversation import PromptFormat
from sidelight.models.fingerprint import accepted_copy
from sidelight.probes.artifact import load_probe, save_probe
from sidelight.probes.bank import Bank
from sidelight.probes.explanation import Explanation, explain
from sidelight.probes.mechanisms.base import mechanism_spec
from sidelight.probes.probe import Probe
from sidelight.scoring import assess, classify, find_spans, probe_logits
from sidelight.states.reader import Backbone
from sidelight.statistics.thresholds import ThresholdRule
from sidelight.training.background import load_background
from sidelight.training.fit import fit
from sidelight.training.settings import (
    AUTO,
    READS,
    FitOptions,
    named_mechanism,
    suggested_settings,
)
from sidelight.training.validation import choose_validation
from sidelight.types import Task, Verdict


@dataclass(frozen=True)
class Classifier:
    """A probe on its backbone.

    Attributes:
        backbone: The frozen LLM.
        probe: What was trained on it.
    """

    backbone: Backbone
    probe: Probe

    def predict(
        self, texts: Sequence[str | Example], *, responses: Sequence[str] | None = None
    ) -> list[Verdict]:
        """The verdict on each text, with its spans if the probe labels spans.

        Args:
            texts: Plain texts, or examples with several messages.
            responses: The answers, one per text, for a probe that reads responses.

        Raises:
            ContextLengthError: A text is longer than the backbone reads; none is cut.
            VerdictError: A verdict cannot be computed.
            SidelightError: The probe labels spans of one message, and a text has several.
        """
        if type(texts) is str:
            raise SidelightError("predict takes a list of texts: write predict([text]).")
        examples = [as_example(text) for text in texts]
        if responses is not None and len(responses) != len(examples):
            raise SidelightError(
                f"Got {len(examples)} texts but {len(responses)} responses; give one for each text."
            )
        if responses is not None:
            pairs = zip(examples, responses, strict=True)
            examples = [replace(example, response=response) for example, response in pairs]
        if self.probe.spans is not None:
            pairs = zip(*find_spans(self.backbone, self.probe, examples), strict=True)
            verdict, labelled = self.probe.verdict, self.probe.labelled_verdict
            return [labelled(verdict(row), spans) for row, spans in pairs]
        outputs = classify(self.backbone, self.probe, examples)
        return [self.probe.verdict(text.logits, turn=text.turn) for text in outputs]

    def explain(self, text: str | Example, *, response: str | None = None) -> Explanation:
        """The verdict on one text, and how its logit divides among tokens and layers.

        It takes the one forward pass that ``predict`` takes.

        Args:
            text: A plain text, or an example with several messages.
            response: The answer, for a probe that reads responses.

        Raises:
            ContextLengthError, VerdictError: As for ``predict``.
        """
        example = as_example(text)
        answer = example.response if response is None else response
        prompt = self.backbone.encoder.encode(example.messages, answer, with_places=True)
        bank = Bank([self.probe], device=self.backbone.device)
        tap = bank.tap()
        with self.backbone.tapped(tap):
            self.backbone.run([prompt], layers=tap.depth)
        return explain(self.probe, tap.projected()[0], prompt)

    @overload
    def evaluate(
        self,
        data: str | Path | InMemory | Examples,
        *,
        text: str = "text",
        label: str = "label",
        response: str | None = None,
    ) -> Report: ...
    @overload
    def evaluate(
        self,
        data: str | Path | InMemory | Examples,
        *,
        text: str = "text",
        response: str | None = None,
        spans: str,
    ) -> SpanReport: ...
    def evaluate(
        self,
        data: str | Path | InMemory | Examples,
        *,
        text: str = "text",
        label: str = "label",
        response: str | None = None,
        spans: str | None = None,
    ) -> Report | SpanReport:
        """Metrics with confidence intervals on labelled data that training did not see.

        Args:
            data: A file, a hub data set, rows, or loaded examples.
            text: Column of the text.
            label: Column of the label.
            response: Column of the answer, for a probe that reads responses.
            spans: Column of the spans in place of labels, for a probe that labels spans; the report
                is then one of spans.

        Raises:
            SidelightError: The data cannot be read, has other labels, or has no responses for a
                probe that reads them; or ``spans`` is given and the probe labels whole texts.
        """
        spans = span_column(data, spans)
        if spans is not None and self.probe.spans is None:
            raise SidelightError(
                f"Probe '{self.probe.name}' labels whole texts, so it finds no spans. Leave spans= "
                "out and name the column with label=, or train a probe with spans=."
            )
        examples = _as_examples(
            data, text=text, label=label, response=response, spans=spans, task=self.probe.task
        )
        if examples.task != self.probe.task:
            raise SidelightError(
                f"Cannot evaluate '{self.probe.name}' on examples with other labels (got "
                f"{examples.task}, wanted {self.probe.task}). "
                "Load them with task=classifier.probe.task."
            )
        assessment = assess(self.backbone, self.probe, examples if spans else examples.of_texts())
        return assessment.headline

    def logits(self, examples: Sequence[Example]) -> np.ndarray:
        """The probe's logits, ``[text, output]``.

        Raises:
            ContextLengthError: A text is longer than the backbone reads.
            VerdictError: A logit is not finite.
        """
        return probe_logits(self.backbone, self.probe, examples)

    def save(self, directory: str | Path) -> Path:
        """Writes the artifact and returns its folder."""
        return save_probe(self.probe, Path(directory))


def train(
    model: str | Path | Backbone,
    data: str | Path | InMemory | Examples,
    *,
    mechanism: str = AUTO,
    text: str = "text",
    label: str = "label",
    response: str | None = None,
    spans: str | None = None,
    positive: str | None = None,
    validation: str | Path | InMemory | Examples | None = None,
    name: str = "probe",
    seed: int = 0,
    background: str | Path = "packaged",
    context_tokens: int | None = None,
    none: bool = True,
    prompt_format: PromptFormat | None = None,
    threshold: str = "f1",
) -> Classifier:
    """Trains a probe on labelled data.

    For other options and the figures of the training, use ``sidelight.training.fit.fit``.
    Doubts about the data come as Python warnings.

    Args:
        model: A backbone, or its name: ``smollm2``, a folder, a hub id, or one that an installed
            engine adds, such as a GGUF file.
        data: A file, a hub data set, rows, loaded examples, or a ready guard (`guard:injection`,
            `guard:injection,mine.jsonl`), whose card says which columns and classes there are.
        mechanism: ``auto`` is a readout, or ``spans`` of labelled spans; else one of
            ``mechanism_names()``.
        text: Column of the text.
        label: Column of the label; several with commas make a multi-label task.
        response: Column of the answer; the probe then reads the answer instead of the prompt.
        spans: Column of spans in place of labels, as ``load_examples`` takes it; the probe then
            says which characters have a label. Its texts are shown alone, without background.
        positive: Positive class of a binary task; None means 1, true or yes, else the rarer label.
        validation: Like ``data``; None holds part of ``data`` out, or cross-fits it if it is small.
        name: How verdicts name the probe.
        seed: Decides initial parameters and the order of the data.
        background: Background traffic, as ``load_background`` takes it: a file of texts or chats,
            ``packaged``, or ``none``.
        context_tokens: The fewest tokens of background traffic that texts are shown in; None:
            40,000, and 400,000 on a GPU.
        none: Whether a probe of several classes says ``none`` to background traffic.
        prompt_format: As for ``load_backbone``; None also takes that of a given backbone.
        threshold: What the thresholds are chosen for: ``f1``, ``fpr=0.01``, ``recall=0.95`` or
            ``cost=10:1``, as ``ThresholdRule`` describes them.

    Raises:
        SidelightError: The data or the model cannot be used; the message names the remedy.
    """
    # Before the model loads, which takes seconds: what is wrong with options or texts.
    spans = span_column(data, spans)
    if (guard := guard_of(data)) is not None:
        response = response or guard.card.columns["response"]
    read = partial(_as_examples, text=text, label=label, response=response, spans=spans)
    training = read(data, positive=positive)
    is_text_option = background not in ("packaged", "none") or positive is not None
    if isinstance(training, SpanExamples) and is_text_option:
        raise SidelightError(
            "background= and positive= are for labels of whole texts. Leave them out, or spans=."
        )
    options = FitOptions(
        mechanism=None if mechanism == AUTO else mechanism_spec(mechanism),
        settings=replace(suggested_settings(named_mechanism(mechanism, type(training))), seed=seed),
        reads=replace(READS, side="response" if response else "prompt"),
        background=load_background(background if training.takes_contexts else "none"),
        threshold=ThresholdRule.parse(threshold),
        context_tokens=context_tokens,
        none=none,
    )
    held_out = None if validation is None else read(validation, task=training.task)
    with warnings_ignored():
        choose_validation(training, held_out, options)
    if not isinstance(model, Backbone):
        backbone = _load_backbone(model, prompt_format, EngineOptions())
    elif prompt_format in (None, model.encoder.prompt_format):
        backbone = model
    else:
        raise SidelightError(
            f"The backbone renders texts as '{model.encoder.prompt_format}', but prompt_format is "
            f"'{prompt_format}'. Load it with load_backbone(..., prompt_format='{prompt_format}')."
        )
    result = fit(backbone, training, held_out, name=name, options=options)
    return Classifier(backbone, result.probe)


def load(
    directory: str | Path,
    *,
    model: str | Path | Backbone | None = None,
    dtype: DtypeName = "auto",
    device: str = "auto",
) -> Classifier:
    """A saved probe on its backbone.

    Args:
        directory: The artifact, or its name: ``guard:injection``, or ``hf:OWNER/NAME@REVISION`` on
            the Hugging Face hub.
        model: The backbone, or its name; None takes the name it was trained under.
        dtype: The dtype of a backbone that is loaded, as ``load_backbone`` takes it.
        device: Its device, as ``load_backbone`` takes it.

    Raises:
        FingerprintMismatchError: ``model`` is another backbone, and no accepted copy of it
            (``SIDELIGHT_QUANTISED``).
        SidelightError: The artifact or the backbone cannot be loaded.
    """
    model_name, digest = None, None
    if model is not None:
        model_name = model.fingerprint.name if isinstance(model, Backbone) else str(model)
        digest = partial(_digest, model)
    probe = load_probe(probe_folder(directory, model_name, digest))
    card, loading = probe.card, EngineOptions(dtype=dtype, device=device)
    named = card.backbone.name if model is None else model
    backbone = (
        named if isinstance(named, Backbone) else _load_backbone(named, card.prompt_format, loading)
    )
    card.backbone.require(backbone.fingerprint, probe=card.name, accepted=accepted_copy())
    return Classifier(backbone, probe)


def _load_backbone(
    model: str | Path, prompt_format: PromptFormat | None, options: EngineOptions
) -> Backbone:
    backend = backend_of(str(model), options)
    return backend.load(backend.find(str(model)), prompt_format)


def _digest(model: str | Path | Backbone) -> str:
    if isinstance(model, Backbone):
        return model.fingerprint.digest
    backend = backend_of(str(model), EngineOptions())
    return backend.read(backend.find(str(model))).fingerprint.digest


def _as_examples(
    data: str | Path | InMemory | Examples,
    *,
    text: str,
    label: str,
    response: str | None,
    spans: str | None,
    positive: str | None = None,
    task: Task | None = None,
) -> LabelledExamples:
    if isinstance(data, Examples):
        if not isinstance(data, LabelledExamples):
            raise SidelightError(
                "These examples have no labels. Name the column with --label (label= in Python)."
            )
        if spans is not None and not isinstance(data, SpanExamples):
            raise SidelightError(
                "These examples have no spans. Load them with load_examples(..., "
                f"spans='{spans}'), or leave spans= out."
            )
        return data
    return load_examples(
        data, text=text, label=label, response=response, spans=spans, positive=positive, task=task
    )
