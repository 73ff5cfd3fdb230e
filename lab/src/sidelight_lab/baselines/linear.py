"""Labels as what regressions and one-against-rest losses aim at.

Linear classifiers of vectors, as regressions give them. Knows matrices, not hidden states.

Logistic regression with an L2 penalty, over several strengths of it. Knows no hidden states.

Gaussian discriminants: classes share one covariance, shrunk as the data require.

Which epoch of a training is kept: the best on validation texts. Knows no layers and no texts.

A network with one hidden layer on one vector per text. Knows no hidden states.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from sidelight.errors import SidelightError
from sidelight.training.objective import make_loss, validation_score
from sidelight.training.settings import TrainingSettings
from sidelight.types import Task


def class_targets(labels: Int[Tensor, "text ..."], task: Task) -> Float[Tensor, "text output"]:
    """1 where a text has an output's class, else 0.

    Args:
        labels: As in ``Examples.labels``.
        task: The classes.
    """
    if task.kind == "multiclass":
        return functional.one_hot(labels, task.outputs).float()
    return labels.to(torch.float32).reshape(len(labels), -1)


@dataclass(frozen=True)
class Rows:
    """Labelled vectors.

    Attributes:
        inputs: One vector per text.
        labels: As in ``Examples.labels``.
    """

    inputs: Float[Tensor, "text feature"]
    labels: Int[Tensor, "text ..."]


@dataclass(frozen=True)
class Scaling:
    """x = (input - mean) / scale, per feature."""

    mean: Float[Tensor, " feature"]
    scale: Float[Tensor, " feature"]

    @staticmethod
    def measured(inputs: Float[Tensor, "text feature"]) -> "Scaling":
        """Mean and standard deviation over texts; a constant feature keeps scale 1."""
        scale, mean = torch.std_mean(inputs, 0, correction=0)
        return Scaling(mean, torch.where(scale > 1e-6, scale, 1.0))

    def __call__(self, inputs: Float[Tensor, "text feature"]) -> Float[Tensor, "text feature"]:
        """The standardised vectors."""
        # In place on the difference: all layers of 16,000 texts are a gigabyte.
        return (inputs - self.mean).div_(self.scale)


@dataclass(frozen=True)
class Linear:
    """logits = inputs @ weight + shift, of raw inputs: the standardisation is folded in."""

    weight: Float[Tensor, "feature output"]
    shift: Float[Tensor, " output"]

    @staticmethod
    def folded(
        weight: Float[Tensor, "feature output"], bias: Float[Tensor, " output"], scaling: Scaling
    ) -> "Linear":
        """From the weights of standardised inputs."""
        raw = weight / scaling.scale[:, None]
        return Linear(raw, bias - scaling.mean @ raw)

    @property
    def parameters(self) -> int:
        """Numbers that were fitted."""
        return self.weight.numel() + self.shift.numel()

    def __call__(self, inputs: Float[Tensor, "text feature"]) -> Float[Tensor, "text output"]:
        """The logits."""
        return inputs @ self.weight + self.shift


@dataclass(frozen=True)
class Chosen:
    """A classifier and its score on validation texts; see ``validation_score``."""

    linear: Linear
    score: float


def best_linear(candidates: Iterable[Linear], validation: Rows, task: Task) -> Chosen:
    """The one with the best validation score; of equals the first."""
    labels = validation.labels.numpy()
    scored = [Chosen(each, _score(each(validation.inputs), labels, task)) for each in candidates]
    return max(scored, key=lambda chosen: chosen.score)


def _score(logits: Float[Tensor, "text output"], labels: np.ndarray, task: Task) -> float:
    return validation_score(task, logits.numpy(), labels)


# From features that hardly count to a nearly free fit, per text and on features of variance 1.
PENALTIES = (10.0, 1.0, 0.1, 0.01, 0.001)


def fit_logistic(
    training: Rows,
    validation: Rows,
    task: Task,
    *,
    penalties: tuple[float, ...] = PENALTIES,
    balanced: bool = True,
    iterations: int = 30,
) -> Chosen:
    """The classifier whose penalty does best on validation rows; see ``logistic_path``."""
    path = logistic_path(
        training, task, penalties=penalties, balanced=balanced, iterations=iterations
    )
    return best_linear(path, validation, task)


def logistic_path(
    training: Rows,
    task: Task,
    *,
    penalties: tuple[float, ...],
    balanced: bool,
    iterations: int,
) -> Iterator[Linear]:
    """One classifier per penalty, each started from the one before.

    Minimises mean loss + penalty / 2 * |weight|^2 over standardised inputs by L-BFGS; labels of a
    multi-label task are independent. The bias is not penalised. With n rows, scikit-learn's C is
    1 / (n * penalty).

    Args:
        training: At least one row; a class may have none.
        task: Binary: sigmoid; multi-class: softmax; multi-label: one sigmoid per label.
        penalties: Strongest first, or starts from the one before help little.
        balanced: Whether classes weigh by their inverse frequency; see ``make_loss``.
        iterations: The most per penalty.
    """
    scaling = Scaling.measured(training.inputs)
    inputs = scaling(training.inputs)
    loss = make_loss(task, training.labels, balanced=balanced)
    # The loss of a multi-label task is a mean over labels; each label's regression needs its own.
    losses = task.outputs if task.kind == "multilabel" else 1
    weight = torch.zeros(inputs.shape[1], task.outputs, requires_grad=True)
    bias = torch.zeros(task.outputs, requires_grad=True)
    for penalty in penalties:

        def objective(penalty: float = penalty) -> Float[Tensor, ""]:
            fit = loss(torch.addmm(bias, inputs, weight), training.labels)
            return losses * fit + penalty / 2 * weight.square().sum()

        _minimise(objective, [weight, bias], iterations)
        yield Linear.folded(weight.detach().clone(), bias.detach().clone(), scaling)


def _minimise(objective: Callable[[], Tensor], parameters: list[Tensor], iterations: int) -> None:
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=iterations, tolerance_grad=1e-5, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = objective()
        value.backward()
        return value

    optimizer.step(closure)  # pyright: ignore[reportArgumentType]


def gaussian_discriminant(
    inputs: Float[Tensor, "text feature"], labels: Int[Tensor, "text ..."], task: Task
) -> Linear:
    """Log posteriors up to a constant; the log-odds for a binary task, and per label otherwise.

    Features are standardised first, so that the covariance shrinks towards equal importance.

    Args:
        inputs: At least one text; a class may have none and is then put at the mean of all.
        labels: As in ``Examples.labels``.
        task: The classes; a multi-label task has a covariance per label.
    """
    scaling = Scaling.measured(inputs)
    scaled = scaling(inputs)
    if task.kind == "multiclass":
        fits = [_discriminant(scaled, labels, classes=task.outputs)]
    else:
        columns = labels.reshape(len(labels), -1).T
        fits = [_log_odds(_discriminant(scaled, column, classes=2)) for column in columns]
    weight = torch.cat([fit.weight for fit in fits], 1)
    return Linear.folded(weight, torch.cat([fit.shift for fit in fits]), scaling)


def shrunk_covariance(
    centred: Float[Tensor, "text feature"],
) -> Float[Tensor, "feature feature"]:
    """Ledoit & Wolf (2004): the covariance, shrunk towards a multiple of the identity, float64.

    Args:
        centred: Deviations from the mean, or from each class's mean.
    """
    texts, features = centred.shape
    covariance = (centred.T @ centred).double() / texts
    size = covariance.trace() / features
    eye = torch.eye(features, dtype=torch.float64)
    spread = (covariance - size * eye).square().sum()
    fourth = centred.square().sum(1).double().square().mean()
    noise = (fourth - covariance.square().sum()).clamp(min=0) / texts
    share = float((noise / spread).clamp(max=1)) if spread > 0 else 1.0
    # A floor, so that texts which are all equal do not make it singular.
    return (1 - share) * covariance + (share * size + 1e-6) * eye


def _discriminant(
    inputs: Float[Tensor, "text feature"], groups: Int[Tensor, " text"], *, classes: int
) -> Linear:
    members = functional.one_hot(groups, classes).float()
    counts = members.sum(0)
    means = (members.T @ inputs) / counts.clamp(min=1)[:, None]
    covariance = shrunk_covariance(inputs - means[groups])
    weight = torch.linalg.solve(covariance, means.T.double()).float()
    # One more text in each class, so that an absent class has a prior.
    prior = ((counts + 1) / (len(inputs) + classes)).log()
    return Linear(weight, prior - (means.T * weight).sum(0) / 2)


def _log_odds(pair: Linear) -> Linear:
    return Linear(pair.weight[:, 1:] - pair.weight[:, :1], pair.shift[1:] - pair.shift[:1])


# With few texts, an epoch repeats them: a handful of steps is too few to judge progress by.
STEPS_AT_LEAST = 40


def train_to_best(
    model: nn.Module,
    epochs: Iterator[None],
    logits: Callable[[], Float[np.ndarray, "text output"]],
    *,
    task: Task,
    labels: np.ndarray,
    settings: TrainingSettings,
) -> float:
    """Trains until patience or epochs run out; the model ends frozen, as of its best epoch.

    Args:
        model: What is trained, in place.
        epochs: Trains for another epoch on each request.
        logits: The model's, of the validation texts.
        task: The classes.
        labels: Of the validation texts, as in ``Examples.labels``.
        settings: For their epochs and patience.

    Returns:
        The best validation score; of equals the first is kept.

    Raises:
        SidelightError: The logits are not finite any more.
    """
    best, state, since = -math.inf, deepcopy(model.state_dict()), 0
    for _ in islice(epochs, settings.epochs):
        score = validation_score(
            task, finite(logits(), learning_rate=settings.learning_rate), labels
        )
        since += 1
        if score > best:
            best, state, since = score, deepcopy(model.state_dict()), 0
        if since >= settings.patience:
            break
    model.load_state_dict(state)
    model.requires_grad_(False)
    return best


def finite(
    logits: Float[np.ndarray, "text output"], *, learning_rate: float
) -> Float[np.ndarray, "text output"]:
    """The same logits.

    Raises:
        SidelightError: One is NaN or infinite; the message names the learning rate.
    """
    if not np.isfinite(logits).all():
        raise SidelightError(
            "Training a baseline diverged: its logits are not finite. "
            f"Lower its learning rate (it was {learning_rate})."
        )
    return logits


def train_small_network(
    training: Rows,
    validation: Rows,
    task: Task,
    *,
    hidden: int,
    settings: TrainingSettings,
    seed: int,
) -> nn.Sequential:
    """Linear, ReLU, linear; by AdamW with a cosine schedule, as of its best epoch on validation.

    Args:
        training: Standardised vectors.
        validation: What early stopping looks at.
        task: The classes.
        hidden: Units of the hidden layer.
        settings: Of the optimisation. An epoch is at least 40 steps.
        seed: Of the initial parameters and the order of the texts.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Linear(training.inputs.shape[1], hidden), nn.ReLU(), nn.Linear(hidden, task.outputs)
        )
    train_to_best(
        network,
        _epochs(network, training, task, settings, seed),
        lambda: network(validation.inputs).detach().numpy(),
        task=task,
        labels=validation.labels.numpy(),
        settings=settings,
    )
    return network


def _epochs(
    network: nn.Module, training: Rows, task: Task, settings: TrainingSettings, seed: int
) -> Iterator[None]:
    """Trains on each request for another epoch."""
    loss = make_loss(task, training.labels, balanced=settings.class_weight == "balanced")
    steps = max(STEPS_AT_LEAST, math.ceil(len(training.labels) / settings.batch_size))
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=settings.epochs * steps)
    batches = _batches(len(training.labels), size=settings.batch_size, seed=seed)
    while True:
        for batch in islice(batches, steps):
            loss(network(training.inputs[batch]), training.labels[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        yield


def _batches(texts: int, *, size: int, seed: int) -> Iterator[Tensor]:
    """Random texts without end; each is seen once before any is seen again."""
    shuffle = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(texts, generator=shuffle).split(size)
