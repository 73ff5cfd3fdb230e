"""A network with one hidden layer on one vector per text. Knows no hidden states."""

import math
from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor, nn

from sidelight.baselines.early_stopping import STEPS_AT_LEAST, train_to_best
from sidelight.baselines.linear import Rows
from sidelight.training import TrainingSettings, make_loss
from sidelight.types import Task


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
