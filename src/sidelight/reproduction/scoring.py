"""The logits of many probes on cached hidden states: the test's forward pass is not run twice."""

from collections.abc import Sequence

import numpy as np
import torch

from sidelight.cache import Shard
from sidelight.probe import Probe
from sidelight.progress import progress
from sidelight.ragged import Ragged
from sidelight.standardisation import Projection
from sidelight.study import Split

# Texts of one matmul: what is projected of them fits memory with any number of columns.
_CHUNK = 64


@torch.inference_mode()
def score_split(probes: Sequence[Probe], split: Split, *, device: torch.device) -> list[np.ndarray]:
    """For each probe ``[text, output]``, in float32 as when serving.

    Args:
        probes: Of the split's backbone.
        split: A whole data set, as ``make_split`` gives it.
        device: Where to compute.
    """
    assert len(split) == len(split.states.prompts)
    logits = [np.empty((len(split), probe.task.outputs)) for probe in probes]
    projections = [probe.projection() for probe in probes]
    with progress("Scoring", len(split), unit="texts") as shown:
        for index in range(len(split.states)):
            for chunk in _chunks(split.states.read(index)):
                states = _on(chunk, device)
                for own, probe, projection in zip(logits, probes, projections, strict=True):
                    own[chunk.rows] = _logits(probe, projection, states)
                shown.advance(len(chunk.rows))
    return logits


def _logits(probe: Probe, projection: Projection, states: Shard) -> np.ndarray:
    device = states.hidden.device
    columns = torch.baddbmm(
        projection.shift.float().to(device)[:, None],
        states.hidden,
        projection.weight.float().to(device),
    )  # (L, T, M)
    mechanism = probe.mechanism.to(device).eval()
    state = mechanism.summarise(Ragged(columns.transpose(0, 1), states.lengths))
    return mechanism.finish(state).double().cpu().numpy()


def _chunks(shard: Shard) -> list[Shard]:
    lengths, rows = shard.lengths.split(_CHUNK), shard.rows.split(_CHUNK)
    hidden = shard.hidden.split([int(own.sum()) for own in lengths], 1)
    return [Shard(*parts) for parts in zip(hidden, lengths, rows, strict=True)]


def _on(shard: Shard, device: torch.device) -> Shard:
    return Shard(shard.hidden.to(device).float(), shard.lengths.to(device), shard.rows)
