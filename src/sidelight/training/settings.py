"""What to train and how: mechanism, optimisation, background, where hidden states go.

Imports no torch, so that the command line checks names at once.
"""

import math
import re
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from sidelight.data.examples import LabelledExamples
from sidelight.errors import SidelightError, checked
from sidelight.models.conversation import Reads
from sidelight.models.fingerprint import Fingerprint, hash_of
from sidelight.models.smollm2 import cache_root
from sidelight.progress import say
from sidelight.statistics.calibration import CalibrationKind
from sidelight.statistics.thresholds import F1, ThresholdRule
from sidelight.storage import has_files, holding, remove_unused
from sidelight.training.background import Background
from sidelight.types import NONE, MechanismSpec, StatesChoice, Task

AUTO = "auto"
# Up to this size, hidden states are kept whole. Of 1.7 GB, compressing and the comparison before it
# take more time than training on less data saves.
MOST_UNCOMPRESSED_BYTES = 10 * 2**30
TRAINING_MAX_TOKENS = 1024
# The prompt, of which each turn is judged.
READS = Reads(scope="each_turn")
# Fewer texts are cross-fitted.
FEW_TEXTS = 1000
# Few texts are trained in smaller batches, so that an epoch has this many steps.
_STEPS_PER_EPOCH = 8


@dataclass(frozen=True)
class TrainingSettings:
    """Optimisation by AdamW with a cosine schedule and early stopping.

    Attributes:
        learning_rate: The rate at the start of the cosine.
        weight_decay: Decoupled, per step relative to the learning rate.
        epochs: The most passes over the data; the cosine ends with the last of them.
        least_steps: Few texts are trained in smaller batches and for more epochs, so that there
            are this many steps; 0 takes ``epochs`` and ``batch_size`` as they are.
        batch_size: Texts per step. If a shard on disk holds fewer, several shards make one.
        patience: Training stops after this many epochs without a better validation score; more
            epochs give proportionally more patience.
        class_weight: ``balanced`` weighs each class by its inverse frequency; the threshold that
            validation chooses handles imbalance either way.
        standardise: Whether hidden states are standardised per layer.
        layer_weights: ``predictive`` weighs layers by how well each predicts held-out training
            texts (see ``training/scaling.py``), if states are standardised.
        normalise: Whether hidden states are divided by their root mean square, so that no token
            outweighs others by its norm; see ``Standardisation``. None: unless there are several
            classes, which lose accuracy by it (measured in packages/lab/docs/experiments).
        layers: How many hidden states the probe reads, from the embedding up; the projections of
            the others are exactly zero. None: all.
        prefixes: Whether a probe of responses also learns from a random beginning of each, since
            it has to give scores while a response is being written.
        seed: Decides initial parameters and the order of the data, and not how it is split.
    """

    learning_rate: Annotated[float, Field(ge=0, lt=1)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
    epochs: PositiveInt = 8
    least_steps: NonNegativeInt = 96
    batch_size: PositiveInt = 32
    patience: PositiveInt = 3
    class_weight: Literal["none", "balanced"] = "none"
    standardise: bool = True
    layer_weights: Literal["equal", "predictive"] = "equal"
    normalise: bool | None = None
    layers: PositiveInt | None = None
    prefixes: bool = True
    seed: NonNegativeInt = 0

    def __post_init__(self) -> None:
        """Refuse what the optimiser cannot use."""
        for each in fields(self):
            value = getattr(self, each.name)
            checked(each.type, value, f"Cannot train with {each.name} = {value!r}", strict=True)

    def changed(self, **values: Any) -> "TrainingSettings":
        """The same with other values. Given epochs or batch sizes also hold for few texts."""
        exact = {"least_steps": 0} if {"epochs", "batch_size"} & values.keys() else {}
        return replace(self, **{**exact, **values})

    def resolved_for(self, texts: int, task: Task) -> "TrainingSettings":
        """Settings that suit the training texts and labels, where none are given.

        Few texts get smaller batches and more epochs.
        """
        is_normalised = task.kind != "multiclass" if self.normalise is None else self.normalise
        chosen = replace(self, normalise=is_normalised)
        if not self.least_steps:
            return chosen
        batch_size = min(self.batch_size, max(1, texts // _STEPS_PER_EPOCH))
        epochs = max(self.epochs, math.ceil(self.least_steps / math.ceil(texts / batch_size)))
        patience = math.ceil(self.patience * epochs / self.epochs)
        return replace(chosen, batch_size=batch_size, epochs=epochs, patience=patience)


# From then on, the states of a training that no process runs are abandoned.
ABANDONED_S = 7 * 86400
_RUN = re.compile(r"run-[0-9a-f]{16}(-[0-9a-f]{16})?")

# Chosen on ToxicChat validation data.
SUGGESTED = {
    "pooling": TrainingSettings(learning_rate=2e-2, weight_decay=0.1, epochs=4),
    "gate": TrainingSettings(learning_rate=1e-2, weight_decay=0.1, epochs=4),
    "attention": TrainingSettings(learning_rate=1e-3, weight_decay=0.1, epochs=3),
    "readout": TrainingSettings(weight_decay=0.3, epochs=12, layer_weights="predictive"),
    # Every token is an example.
    "spans": TrainingSettings(learning_rate=2e-3, epochs=4, least_steps=240),
}


def named_mechanism(mechanism: str, *, of_spans: bool = False) -> str:
    """The mechanism, where ``auto`` is a readout, or ``spans`` of labelled spans.

    Raises:
        SidelightError: Spans are labelled, and it labels no tokens.
    """
    if mechanism == AUTO:
        return "spans" if of_spans else "readout"
    from sidelight.probes.mechanisms.base import labels_tokens

    if of_spans and not labels_tokens(mechanism):
        raise SidelightError(
            f"Spans need a mechanism that labels tokens, such as 'spans' (got: '{mechanism}'). "
            "Leave --mechanism out (mechanism= in Python)."
        )
    return mechanism


def suggested_settings(mechanism: str) -> TrainingSettings:
    """The settings that did well for a mechanism on validation data, or general ones."""
    return SUGGESTED.get(mechanism, TrainingSettings())


@dataclass(frozen=True)
class FitOptions:
    """What to train, and from what.

    Attributes:
        mechanism: None is a readout; of spans, held-out texts choose how far a probe looks ahead.
        settings: How it is optimised; None takes ``suggested_settings``.
        reads: The tokens that the probe reads; see ``reads_of``.
        background: Background traffic, which texts are also shown in; see ``contexts.py``. Without
            any, they are shown alone.
        context_tokens: The fewest tokens of contexts; None: 40,000, and 400,000 on a GPU. Of many
            texts, contexts have more: .6 of the texts' tokens.
        none: Whether a probe of several classes says ``none`` to background traffic, where there is
            background to learn it from.
        calibration: How logits become probabilities; None takes ``suggested_calibration``.
        threshold: What the thresholds are chosen for.
        max_tokens: Longer training texts are cut, and counted.
        cache_root: Folder for the hidden states while training; None is the user's cache.
        keep_cache: Whether the hidden states stay for other trainings, which share those of a text;
            else a training has them in a folder of its own, which it removes.
        states: How hidden states are kept: ``disk`` writes them once, compressed where the
            mechanism allows; ``stream`` computes them in each epoch and writes none; ``complete``
            writes them as they are. ``auto`` keeps up to 10 GiB whole, and chooses
            for more by size and device: see ``training/keeping.py``.
        early_exit: Whether training chooses the smallest depth that is as good on held-out texts as
            the ``layers`` of the settings; see ``training/depth.py``.
        memory_bytes: The most that hidden states may take in memory while training; more are read
            from disk again in each epoch. A CPU without bfloat16 arithmetic also holds one batch in
            float32.
    """

    mechanism: MechanismSpec | None = None
    settings: TrainingSettings | None = None
    reads: Reads = READS
    background: Background = field(default_factory=Background)
    context_tokens: PositiveInt | None = None
    none: bool = True
    calibration: CalibrationKind | None = None
    threshold: ThresholdRule = F1
    max_tokens: int = TRAINING_MAX_TOKENS
    cache_root: Path | None = None
    keep_cache: bool = False
    states: StatesChoice = "auto"
    early_exit: bool = False
    memory_bytes: int = 2**30

    def training_sha256(
        self,
        training: LabelledExamples,
        validation: LabelledExamples | None,
        *,
        name: str,
        model: Fingerprint,
        engine: str,
    ) -> str:
        """Hash of everything that decides a probe: texts, options, model and engine.

        Two trainings with the same hash make the same probe, up to rounding.
        """
        elsewhere = ("cache_root", "keep_cache", "memory_bytes", "early_exit")
        options = [getattr(self, f.name) for f in fields(self) if f.name not in elsewhere]
        # Packaged probes were trained before it existed.
        options += ["early_exit"] if self.early_exit else []
        texts = [
            None if examples is None else examples.content_hash
            for examples in (training, validation)
        ]
        weights = None if training.weights is None else training.weights.tolist()
        decides = [*options, *texts, weights, name, model.digest, model.dtype, engine]
        return sha256("\0".join(map(repr, decides)).encode(errors="surrogatepass")).hexdigest()

    def states_folder(self, *run: object) -> Path:
        """Folder of the hidden states: the shared one, or that of one training.

        Args:
            run: Identifies the training across restarts; omit for the shared folder.
        """
        folder = self.cache_root or cache_root() / "activations"
        return folder / f"run-{hash_of(*run)}" if run and not self.keep_cache else folder

    @contextmanager
    def temporary_states(self, *run: object) -> Generator[Path]:
        """The folder of one training's states, which is removed if the block ends without an error.

        No other process removes it meanwhile. States of trainings that were abandoned are removed
        first, since they take gigabytes and only the same training would use them.

        Args:
            run: As for ``states_folder``.
        """
        states = self.states_folder(*run)
        if self.keep_cache:
            yield states
            return
        try:
            with holding(states):
                abandoned = (
                    path for path in states.parent.glob("run-*") if _RUN.fullmatch(path.name)
                )
                removed = sum(remove_unused(path, idle_s=ABANDONED_S) for path in abandoned)
                if removed:
                    say(
                        f"Removed the hidden states of {removed} abandoned training runs, unused "
                        f"for {ABANDONED_S // 86400} days."
                    )
                yield states
        except BaseException:
            # The same training goes on with what there is.
            if not has_files(states):
                remove_unused(states)
            raise
        remove_unused(states)

    def reads_of(self, task: Task) -> Reads:
        """The tokens that a probe of these labels reads.

        Each turn is judged if a part of a text can have its labels. One of several classes is that
        of the user's last turn, since those before may have others; and there is one response.
        """
        if self.reads.includes_response:
            return replace(self.reads, scope="conversation")
        if task.kind == "multiclass" and self.reads.scope == "each_turn":
            return replace(self.reads, scope="last_turn")
        return self.reads

    def resolved_for(self, examples: LabelledExamples) -> "FitOptions":
        """The same for these texts: of spans, whatever the template writes has no label.

        Raises:
            SidelightError: The mechanism labels no tokens, or the probe would read the other side.
        """
        if examples.spans is None:
            return self
        named_mechanism(AUTO if self.mechanism is None else self.mechanism.name, of_spans=True)
        side = "prompt" if examples.items[0].response is None else "response"
        if self.reads.side != side:
            raise SidelightError(
                f"The spans are labelled in each {side}, but the probe would read: "
                f"{self.reads.side}. Set reads={side} (--set reads={side}), or leave reads out."
            )
        return replace(self, reads=Reads(side, template=False))

    def with_none(self, task: Task) -> Task:
        """With ``none`` as the last of several classes, if the probe is to learn it.

        Raises:
            SidelightError: The file has a class of this name.
        """
        has_background = self.background.conversations and not self.reads.includes_response
        if task.kind != "multiclass" or not self.none or not has_background:
            return task
        if NONE in task.labels:
            raise SidelightError(
                f"The file has a class '{NONE}', which training adds for background traffic. "
                "Train with --set none=false (none=False in Python) to use the file's class, or "
                "rename it."
            )
        return replace(task, labels=(*task.labels, NONE))
