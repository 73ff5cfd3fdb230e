"""Logistic regression with an L2 penalty, over several strengths of it. Knows no hidden states."""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from sidelight.baselines.linear import Chosen, Linear, Rows, Scaling, best_linear
from sidelight.training import make_loss
from sidelight.types import Task

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
