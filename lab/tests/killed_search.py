"""Searches on a small corpus and kills itself in the second generation: for ``test_search.py``."""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
from planted_data import split_of

from sidelight.backbone import TransformersBackbone
from sidelight.states.cache import ActivationCache, Shard
from sidelight.training.dataset import ProbeDataset, Split
from sidelight_lab.search import search_settings
from tiny import tiny_backbone

PLAN = {"trials": 6, "generation": 3, "seed": 0}


class ObservedCache(ActivationCache):
    """A cache that calls ``on_read`` before each read."""

    def __init__(self, split: Split):
        self.__dict__.update(split.states.__dict__)
        self.on_read = lambda: None

    def read(self, index: int) -> Shard:
        self.on_read()
        return super().read(index)


def dataset_at(
    backbone: TransformersBackbone, root: Path, *, flipped: bool = False
) -> ProbeDataset:
    """A signal to learn; ``flipped`` validation labels say the opposite."""
    training, validation = (
        replace(own, states=ObservedCache(own))
        for own in (split_of(backbone, root, "binary", *texts) for texts in ((96, 1), (48, 2)))
    )
    if flipped:
        labels = 1 - validation.labels
        validation = replace(validation, examples=replace(validation.examples, labels=labels))
    return ProbeDataset(backbone, training, validation)


def main(root: str, storage: str) -> None:
    torch.set_num_threads(1)
    dataset = dataset_at(tiny_backbone(), Path(root))

    def die_at_the_next_read(_trials: object) -> None:
        dataset.training.states.on_read = lambda: os.kill(os.getpid(), signal.SIGKILL)

    search_settings(
        dataset, "gate", storage=Path(storage), on_generation=die_at_the_next_read, **PLAN
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
