"""scikit-learn interface: a text classifier for pipelines, cross-validation and grid search."""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from numbers import Real
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_consistent_length, check_is_fitted, column_or_1d

from sidelight.classifier import Classifier
from sidelight.data.examples import LabelledExamples, as_example
from sidelight.engines.transformers.backbone import TransformersBackbone, load_backbone
from sidelight.probes.artifact import save_probe
from sidelight.probes.mechanisms.base import mechanism_spec
from sidelight.progress import quiet
from sidelight.statistics.calibration import CalibrationKind
from sidelight.training.background import load_background
from sidelight.training.fit import fit
from sidelight.training.settings import (
    AUTO,
    TRAINING_MAX_TOKENS,
    FitOptions,
    named_mechanism,
    suggested_settings,
)
from sidelight.types import Task

# Arguments that are settings of the mechanism.
_SETTINGS = "learning_rate", "weight_decay", "epochs", "batch_size", "class_weight"


class SidelightClassifier(ClassifierMixin, BaseEstimator):
    """A probe on a frozen LLM, as a scikit-learn classifier of texts.

    It trains the same probe as ``sidelight.train``. Texts are a list, an array or a Series of
    strings, each a user message. Each fold embeds its texts in separate background traffic.

    Args:
        model: The LLM: ``smollm2``, a folder, or a hub id.
        mechanism: ``auto`` for a readout, or one of ``mechanism_names()``.
        learning_rate: Learning rate of the optimiser; None for this and the next three arguments
            uses the mechanism's defaults.
        weight_decay: Weight decay of the optimiser.
        epochs: Maximum number of epochs.
        batch_size: Texts per step.
        background: Background traffic, as in ``load_background``: a file of texts or chats,
            ``packaged``, or ``none`` to train without context.
        context_tokens: Minimum tokens of background that texts are embedded in; None means 40,000,
            or 400,000 on a GPU.
        none: Whether a multi-class probe predicts ``none`` for background traffic once it is saved
            and served; here, it always chooses among ``classes_``.
        class_weight: ``balanced`` weighs classes by inverse frequency.
        calibration: Kind of calibration; None means temperature scaling for multi-class tasks, else
            Platt scaling.
        max_tokens: Length to which longer texts are truncated for training; prediction never
            truncates.
        keep_cache: Whether the hidden states of training are kept in the cache folder for other
            fits, so that the LLM reads each text only once across folds and settings.
        random_state: Seed of the initial parameters and the order of the data; None means 0.
        verbose: Whether to show progress.

    Attributes:
        classes_: The labels, sorted. With two labels, the second is the positive class.
        probe_: The trained probe.
    """

    def __init__(
        self,
        model: str | Path = "smollm2",
        *,
        mechanism: str = AUTO,
        learning_rate: float | None = None,
        weight_decay: float | None = None,
        epochs: int | None = None,
        batch_size: int | None = None,
        class_weight: Literal["balanced"] | None = None,
        background: str | Path = "packaged",
        context_tokens: int | None = None,
        none: bool = True,
        calibration: CalibrationKind | None = None,
        max_tokens: int = TRAINING_MAX_TOKENS,
        keep_cache: bool = False,
        random_state: int | None = 0,
        verbose: bool = False,
    ):
        self.model = model
        self.mechanism = mechanism
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.epochs = epochs
        self.batch_size = batch_size
        self.class_weight = class_weight
        self.background = background
        self.context_tokens = context_tokens
        self.none = none
        self.calibration: CalibrationKind | None = calibration
        self.max_tokens = max_tokens
        self.keep_cache = keep_cache
        self.random_state = random_state
        self.verbose = verbose

    def __sklearn_tags__(self) -> Any:
        """Scikit-learn's tags: the input is a list of strings."""
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.input_tags.one_d_array = tags.input_tags.string = True
        return tags

    # scikit-learn's names of the arguments.
    def fit(self, X: Any, y: Any) -> "SidelightClassifier":  # noqa: N803
        """Train a probe; problems with the data are reported as warnings.

        Args:
            X: The texts.
            y: Their labels, of two or more classes.

        Raises:
            ValueError: The texts or the labels have the wrong type or shape.
            SidelightError: The model or the settings cannot be used.
        """
        items = [as_example(text) for text in _texts(X)]
        labels = column_or_1d(y)
        _require_labels(labels)
        check_consistent_length(items, labels)
        check_classification_targets(labels)
        classes, numbers = np.unique(labels, return_inverse=True)
        if len(classes) < 2:
            raise ValueError(
                f"Got one class ({classes[0]}), expected two or more. Add texts of another class."
            )
        task = Task(
            "binary" if len(classes) == 2 else "multiclass",
            tuple(str(label) for label in classes),
        )
        examples = LabelledExamples(
            tuple(items), ({},) * len(items), task=task, labels=numbers.astype(np.int64)
        )
        backbone, options = _backbone(str(self.model)), self._options()
        with nullcontext() if self.verbose else quiet():
            result = fit(backbone, examples, None, name="probe", options=options)
        self.classes_, self.probe_ = classes, result.probe
        return self

    def predict_proba(self, X: Any) -> Float[np.ndarray, "text class"]:  # noqa: N803
        """The calibrated probability of each class, in the order of ``classes_``.

        For a probe that also has the class ``none``, probabilities are conditional on the other
        classes.

        Raises:
            ValueError: The input is not a list of strings.
            SidelightError: A text exceeds the model's context length, or the model differs from the
                one used in training.
        """
        check_is_fitted(self)
        examples = [as_example(text) for text in _texts(X)]
        with nullcontext() if self.verbose else quiet():
            logits = self.classifier_.logits(examples)
        probabilities = self.probe_.calibration.apply(logits)
        known = self.probe_.task.label_probabilities(probabilities)[:, : len(self.classes_)]
        return known / known.sum(1, keepdims=True)

    def predict(self, X: Any) -> np.ndarray:  # noqa: N803
        """The most probable class of each text, regardless of the probe's threshold."""
        probabilities = self.predict_proba(X)
        return self.classes_[probabilities.argmax(axis=1)]

    @property
    def classifier_(self) -> Classifier:
        """The probe on its model, for verdicts at the probe's threshold.

        Raises:
            SidelightError: The model differs from the one that the probe was trained on.
        """
        check_is_fitted(self)
        backbone, probe = _backbone(str(self.model)), self.probe_
        probe.card.backbone.require(backbone.fingerprint, probe=probe.name)
        return Classifier(backbone, probe)

    def save(self, directory: str | Path) -> Path:
        """Write the probe as an artifact, to serve or to load with ``sidelight.load``.

        The probe takes the folder's name.
        """
        check_is_fitted(self)
        folder = Path(directory)
        return save_probe(self.probe_.changed(name=folder.resolve().name), folder)

    def _options(self) -> FitOptions:
        spec = mechanism_spec(named_mechanism(self.mechanism))
        # NumPy scalars, such as those of a grid search, cannot be written to a card.
        chosen = {
            name: value.item() if isinstance(value, np.generic) else value
            for name in _SETTINGS
            if (value := getattr(self, name)) is not None
        }
        return FitOptions(
            mechanism=spec,
            settings=suggested_settings(spec.name).changed(
                seed=int(self.random_state or 0), **chosen
            ),
            background=load_background(self.background),
            context_tokens=self.context_tokens,
            none=self.none,
            calibration=self.calibration,
            max_tokens=int(self.max_tokens),
            keep_cache=self.keep_cache,
        )


# Only one, because a second LLM would double the memory.
@lru_cache(maxsize=1)
def _backbone(model: str) -> TransformersBackbone:
    """The model, shared by all classifiers of this process."""
    return load_backbone(model, for_probing=True)


def _texts(values: Any) -> Sequence[str]:
    """The texts of a list, an array or a Series."""
    texts = np.asarray(values, dtype=object)
    if texts.ndim != 1 or not len(texts):
        raise ValueError(
            f"Got texts of shape {texts.shape}, expected a list of one or more strings."
        )
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"Text {number + 1} is {text!r:.80}, expected a string.")
    return texts.tolist()


def _require_labels(labels: np.ndarray) -> None:
    """Refuse missing labels, which NumPy cannot sort or would treat as a class."""
    for number, label in enumerate(labels.tolist()):
        # NaN is not equal to itself.
        if not isinstance(label, str | Real) or label != label:
            raise ValueError(
                f"Label {number + 1} is {label!r:.80}, expected a string or a number. Label the "
                "text, or remove it from X and y."
            )
