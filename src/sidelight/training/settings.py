"""Training options: mechanism, optimisation, background, and storage of hidden states.

Does not import torch, so that the command line can check names immediately.
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

from sidelight.data.examples import LabelledExamples, SpanExamples
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
# Up to this size, hidden states are stored uncompressed. For 1.7 GB, compression and its test take
# more time than training on less data saves.
MOST_UNCOMPRESSED_BYTES = 10 * 2**30
TRAINING_MAX_TOKENS = 1024
# The prompt, with each turn classified.
READS = Reads(scope="each_turn")
# With few texts, batches are smaller, so that an epoch has this many steps.
_STEPS_PER_EPOCH = 8


@dataclass(frozen=True)
class TrainingSettings:
    """Optimisation by AdamW with a cosine schedule and early stopping.

    Attributes:
        learning_rate: Learning rate at the start of the cosine.
        weight_decay: Decoupled weight decay, per step relative to the learning rate.
        epochs: Maximum passes over the data; the cosine ends with the last one.
        least_steps: Minimum number of steps; with few texts, batches are smaller and there are more
            epochs. 0 leaves ``epochs`` and ``batch_size`` unchanged.
        batch_size: Texts per step. If a shard on disk has fewer, a batch spans several shards.
        patience: Training stops after this many epochs without a better validation score; more
            epochs give proportionally more patience.
        class_weight: ``balanced`` weighs each class by its inverse frequency; the chosen threshold
            handles imbalance in either case.
        standardise: Whether hidden states are standardised per layer.
        layer_weights: ``predictive`` weighs layers by how well each predicts held-out training
            texts (see ``training/scaling.py``), if states are standardised.
        normalise: Whether hidden states are divided by their root mean square, so that no token
            outweighs others by its norm; see ``Standardisation``. None enables it except for
            multi-class tasks, which lose accuracy (measured in packages/lab/docs/experiments).
        layers: Number of hidden states that the probe reads, from the embedding up; the projections
            of the others are exactly zero. None reads all.
        prefixes: Whether a probe of responses is also trained on a random prefix of each, because
            it has to give scores during generation.
        seed: Seed of the initial parameters and the order of the data, but not of the split.
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
        """A copy with other values. Explicit epochs or batch sizes also apply to few texts."""
        exact = {"least_steps": 0} if {"epochs", "batch_size"} & values.keys() else {}
        return replace(self, **{**exact, **values})

    def resolved_for(self, texts: int, task: Task) -> "TrainingSettings":
        """Resolve open settings for the training texts and labels.

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


# After this time, the states of a training run without a process are considered abandoned.
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


def named_mechanism(mechanism: str, examples: type[LabelledExamples] = LabelledExamples) -> str:
    """Resolve ``auto`` to the default mechanism for these examples.

    Raises:
        SidelightError: The examples have spans, but the mechanism labels no tokens.
    """
    if mechanism == AUTO:
        return examples.default_mechanism
    from sidelight.probes.mechanisms.base import labels_tokens

    if issubclass(examples, SpanExamples) and not labels_tokens(mechanism):
        raise SidelightError(
            f"Spans need a mechanism that labels tokens, such as 'spans' (got: '{mechanism}'). "
            "Leave --mechanism out (mechanism= in Python)."
        )
    return mechanism


def suggested_settings(mechanism: str) -> TrainingSettings:
    """The settings that performed well for a mechanism on validation data, or general ones."""
    return SUGGESTED.get(mechanism, TrainingSettings())


@dataclass(frozen=True)
class FitOptions:
    """The options of a training run.

    Attributes:
        mechanism: Mechanism; None is a readout, or for spans, a mechanism whose lookahead is chosen
            on held-out texts.
        settings: Optimisation settings; None uses ``suggested_settings``.
        reads: The tokens that the probe reads; see ``reads_of``.
        background: Background traffic that texts are also embedded in; see ``contexts.py``. Without
            any, texts are shown alone.
        context_tokens: Minimum tokens of contexts; None means 40,000, or 400,000 on a GPU. With
            many texts, contexts have 0.6 times the texts' tokens.
        none: Whether a multi-class probe predicts ``none`` for background traffic, if there is
            background to train on.
        calibration: Kind of calibration; None uses ``suggested_calibration``.
        threshold: Objective of the thresholds.
        max_tokens: Length to which longer training texts are truncated, with a warning.
        cache_root: Folder for the hidden states during training; None is the user's cache.
        keep_cache: Whether the hidden states are kept for other training runs, which share the
            states of a text; otherwise a training run has its own folder and removes it.
        states: How to store hidden states: ``disk`` writes them once, compressed if the mechanism
            allows it; ``stream`` recomputes them in each epoch and writes none; ``whole`` writes
            them uncompressed. ``auto`` stores up to 10 GiB uncompressed, and otherwise decides by
            size and device; see ``training/keeping.py``.
        early_exit: Whether training chooses the smallest depth that is as good on held-out texts as
            the ``layers`` of the settings; see ``training/depth.py``.
        memory_bytes: Maximum memory for hidden states during training; the rest is read from disk
            in each epoch. A CPU without bfloat16 arithmetic also holds one batch in float32.
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
        """Hash of everything that determines a probe: texts, options, model and engine.

        Two training runs with the same hash produce the same probe, up to rounding.
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
        """Folder of the hidden states: the shared one, or that of one training run.

        Args:
            run: Identifies the training across restarts; omit for the shared folder.
        """
        folder = self.cache_root or cache_root() / "activations"
        return folder / f"run-{hash_of(*run)}" if run and not self.keep_cache else folder

    @contextmanager
    def temporary_states(self, *run: object) -> Generator[Path]:
        """Yield the folder of a training run's states, removed if the block ends without an error.

        No other process removes it in the meantime. States of abandoned training runs are removed
        first, because they take gigabytes and only the same training run would use them.

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
            # A repetition of the same training run reuses what exists.
            if not has_files(states):
                remove_unused(states)
            raise
        remove_unused(states)

    def reads_of(self, task: Task) -> Reads:
        """The tokens that a probe with these labels reads.

        Each turn is classified if labels can apply to part of a text. A multi-class label belongs
        to the user's last turn, because earlier turns may have other classes, or to the single
        response.
        """
        if self.reads.includes_response:
            return replace(self.reads, scope="conversation")
        if task.kind == "multiclass" and self.reads.scope == "each_turn":
            return replace(self.reads, scope="last_turn")
        return self.reads

    def resolved_for(self, examples: LabelledExamples) -> "FitOptions":
        """Resolve the options for these examples.

        Raises:
            SidelightError: The mechanism labels no tokens, or the probe would read the other side.
        """
        named_mechanism(AUTO if self.mechanism is None else self.mechanism.name, type(examples))
        return replace(self, reads=examples.reads(self.reads))

    def with_none(self, task: Task) -> Task:
        """With ``none`` as the last of several classes, if the probe is to learn it.

        Raises:
            SidelightError: The file already has a class with this name.
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
