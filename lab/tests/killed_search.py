"""Searches on a small corpus and kills itself in the second generation: for ``test_search.py``."""

import os
import signal
import sys
from pathlib import Path

import torch

from corpora import TASKS, planted
from sidelight.backbone import TransformersBackbone
from sidelight.data.loading import load_examples
from sidelight.states.cache import ActivationCache, Shard
from sidelight.training.dataset import ProbeDataset, Split, make_split
from sidelight.training.settings import FitOptions
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


def split_at(
    backbone: TransformersBackbone, root: Path, count: int, *, seed: int, flipped: bool = False
) -> Split:
    texts, labels = planted("binary", count, seed=seed)
    names = TASKS["binary"].labels
    rows = [
        (text, names[label ^ flipped]) for text, label in zip(texts, labels.tolist(), strict=True)
    ]
    split = make_split(
        backbone,
        load_examples(rows, task=TASKS["binary"]),
        FitOptions(max_tokens=64, cache_root=root),
    )
    return Split(split.examples, split.prompts, ObservedCache(split), split.rows)


def dataset_at(
    backbone: TransformersBackbone, root: Path, *, flipped: bool = False
) -> ProbeDataset:
    """A signal to learn; ``flipped`` validation labels say the opposite."""
    return ProbeDataset(
        backbone,
        split_at(backbone, root, 96, seed=1),
        split_at(backbone, root, 48, seed=2, flipped=flipped),
    )


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
