"""Storage of the hidden states of a training run: uncompressed, compressed, or recomputed in each
epoch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sidelight.errors import warn
from sidelight.models.fingerprint import Fingerprint, hash_of
from sidelight.probes.mechanisms.base import Geometry, build_mechanism
from sidelight.progress import progress, say
from sidelight.states.cache import ActivationCache, Memory, token_bytes
from sidelight.states.compression import (
    Compression,
    compressed_token_bytes,
    directions_bytes,
    directions_of_width,
)
from sidelight.states.extraction import extract, require_finite, streamed
from sidelight.states.reader import Reader
from sidelight.training.dataset import Split
from sidelight.training.loop import Candidate, train_mechanisms
from sidelight.training.settings import MOST_UNCOMPRESSED_BYTES, FitOptions

# Tokens for measuring directions, and for comparing a probe with and without compression.
_SAMPLE_TOKENS = 8192
# Maximum difference of out-of-fold logits between uncompressed and compressed states: root mean
# square, in standard deviations of the logits.
TOLERANCE = 0.5
_TRIAL_FOLDS = 2
# Minimum number of texts for the comparison, unless they have this many times the tokens.
_TRIAL_TEXTS, _MOST_LONG = 32, 4
# Above this size of compressed states in bytes, states are recomputed in each epoch.
MOST_DISK_BYTES = 200 * 2**30
# Operations per second of a GPU at the share of its peak that inference reaches, and bytes per
# second of a fast disk.
_GPU_OPERATIONS_PER_S = 1e14
_DISK_BYTES_PER_S = 2e9


@dataclass(frozen=True)
class Keeping:
    """How states are stored.

    Attributes:
        compression: Compression of the states; None if uncompressed.
        is_streamed: Whether states are recomputed whenever they are read.
    """

    compression: Compression | None = None
    is_streamed: bool = False

    def apply(self, reader: Reader, split: Split) -> Split:
        """The split with states that are stored in this way; ``store`` writes them."""
        states = split.states
        if self.compression is not None:
            states = states.compressed(self.compression)
        return replace(split, states=streamed(reader, states) if self.is_streamed else states)


def store(reader: Reader, split: Split, *, title: str) -> None:
    """Write the missing states of a split, unless they are recomputed whenever they are read.

    Raises:
        SidelightError: The states would not fit on the disk, or a state is not finite.
    """
    states = split.states
    stored = (
        0 if states.is_streamed else sum(states.path(row).exists() for row in range(len(split)))
    )
    if stored:
        say(f"{title}: the hidden states of {stored:,} of {len(split):,} are on disk already.")
    extract(reader, states, title=title)


def choose_keeping(
    reader: Reader,
    training: Split,
    candidates: Sequence[Candidate],
    options: FitOptions,
    *,
    tokens: int,
) -> Keeping:
    """Choose how to store hidden states, from ``options.states`` and the number of tokens.

    ``auto`` stores up to 10 GiB uncompressed, and larger states compressed on disk. It recomputes
    states in each epoch if they would take more than 200 GiB, or if a GPU computes them faster than
    a disk reads them.

    Args:
        reader: The frozen LLM, in any engine.
        training: What the probe is trained on, before its states are computed.
        candidates: Mechanisms to train; without any, states stay uncompressed.
        options: Options of the user.
        tokens: Number of tokens whose states are stored.

    Raises:
        SidelightError: A state is not finite, or the compression cannot be written.
    """
    who = replace(reader.fingerprint, layers=training.states.layers)
    # Without candidates, or if other training runs share states, they are stored uncompressed on
    # disk.
    is_temporary = bool(candidates) and not options.keep_cache
    fits = tokens * token_bytes(who) <= MOST_UNCOMPRESSED_BYTES
    if options.states == "whole" or (options.states == "auto" and (fits or not is_temporary)):
        return Keeping()
    can_compress = (
        is_temporary
        and directions_bytes(who) <= options.memory_bytes
        and _can_be_compressed(candidates, training)
    )
    bytes_per_token = compressed_token_bytes(who) if can_compress else token_bytes(who)
    is_streamed = options.states == "stream" or (
        options.states == "auto"
        and (
            tokens * bytes_per_token > MOST_DISK_BYTES
            or reads_faster_than_disk(who, reader.device, bytes_per_token)
        )
    )
    if not can_compress:
        return Keeping(None, is_streamed)
    compression = _tried_compression(reader, training, candidates, is_streamed)
    return Keeping(compression, is_streamed)


def _can_be_compressed(candidates: Sequence[Candidate], training: Split) -> bool:
    """Whether all use the same standardised states and separate parameters per layer."""
    who = training.states.fingerprint
    geometry = Geometry(who.layers, who.width, training.task.outputs)
    resolved = [settings.resolved_for(len(training), training.task) for _, settings in candidates]
    # Only sizes are needed: no memory is allocated, and no random numbers are drawn.
    with torch.device("meta"):
        mechanisms = [build_mechanism(spec, geometry) for spec, _ in candidates]
    return (
        all(mechanism.layer_parameters() for mechanism in mechanisms)
        and all(settings.standardise for settings in resolved)
        and len({settings.normalise for settings in resolved}) == 1
    )


def reads_faster_than_disk(who: Fingerprint, device: torch.device, bytes_per_token: int) -> bool:
    """Whether a model on a GPU computes a token's states faster than a disk reads them.

    Args:
        who: The model.
        device: Device that runs it.
        bytes_per_token: Size of a token's states on disk.
    """
    if device.type == "cpu":
        return False
    return gpu_pass_s(who.layers - 1, who.width) < bytes_per_token / _DISK_BYTES_PER_S


def gpu_pass_s(blocks: int, width: int) -> float:
    """Estimated seconds for a GPU to compute the states of a token."""
    # A block of width D has about 12 D^2 parameters, each for two operations.
    return 2 * 12 * blocks * width**2 / _GPU_OPERATIONS_PER_S


def _tried_compression(
    reader: Reader, training: Split, candidates: Sequence[Candidate], is_streamed: bool
) -> Compression | None:
    """Fit and test a compression on a sample; None, with a warning, if it changes a probe.

    Directions are measured on some texts and tested on others. The compression is written, as are
    the sample's compressed states unless states are streamed, so that the same training run finds
    both after an interruption.
    """
    states = training.states
    settings = candidates[0][1].resolved_for(len(training), training.task)
    directions = directions_of_width(reader.fingerprint.width)
    measured, tried = _samples(training)
    rows = [*measured, *tried]
    names = [states.path(row).name for row in rows]
    labels = training.labels[rows].tolist()
    who = hash_of(states.directory.name, *names, labels, candidates, directions)
    path = states.directory.with_name(f"compression-{who}.safetensors")
    if path.exists():
        return Compression.load(path)
    hidden = _read_sample(reader, states, rows)
    compression = Compression.measured(
        [hidden[row] for row in measured],
        is_normalised=bool(settings.normalise),
        directions=directions,
    )
    tried_states = {row: hidden[row] for row in tried}
    difference = _difference(training, tried_states, compression, candidates, reader)
    if difference is None or not difference <= TOLERANCE:
        reason = (
            f"{len(tried)} texts are too few to compare logits with and without compression"
            if difference is None
            else f"on {len(tried)} sample texts, the logits with and without compression differ by "
            f"{difference:.2f} standard deviations (limit: {TOLERANCE})"
        )
        size = f"{states.token_bytes / 1e3:.0f} KB per token"
        warn(f"Hidden states are stored uncompressed ({size}): {reason}.")
        return None
    compression.save(path)
    if not is_streamed:
        compressed = states.compressed(compression)
        compressed.open()
        compressed.write(hidden)
    return compression


def _samples(training: Split) -> tuple[list[int], list[int]]:
    """Distinct texts in random order: some for measuring directions, and others for testing them.

    The latter alternate between texts with and without a label.
    """
    states = training.states
    rows: dict[str, int] = {}
    for row in (row for shard in states.shards for row in shard):
        rows.setdefault(states.path(row).name, row)
    order = [*rows.values()]
    measured = _first(states, order[: (len(order) + 1) // 2], least=1)
    rest = order[len(measured) :]
    has_label = [bool(np.any(labels)) for labels in training.labels]
    labelled = [row for row in rest if has_label[row]]
    unlabelled = [row for row in rest if not has_label[row]]
    mixed = [row for pair in zip_longest(labelled, unlabelled) for row in pair if row is not None]
    return measured, _first(states, mixed, least=_TRIAL_TEXTS)


def _first(states: ActivationCache, rows: Sequence[int], *, least: int) -> list[int]:
    """The first rows with enough tokens, and with the minimum number of texts if these are not too
    long.
    """
    tokens = np.cumsum([states.lengths[row] for row in rows])
    enough = int(np.searchsorted(tokens, _SAMPLE_TOKENS)) + 1
    most = int(np.searchsorted(tokens, _MOST_LONG * _SAMPLE_TOKENS)) + 1
    return [*rows[: max(enough, min(least, most))]]


def _read_sample(
    reader: Reader, states: ActivationCache, rows: Sequence[int]
) -> dict[int, Float[Tensor, "layer _ width"]]:
    hidden: dict[int, Tensor] = {}
    tokens = sum(len(states.prompts[row]) for row in rows)
    with progress("Choosing directions", tokens, unit="tokens") as advance:
        for texts in reader.states(states, rows, advance):
            require_finite(texts, dtype=states.fingerprint.dtype)
            hidden |= {
                row: states_of_text[: states.layers] for row, states_of_text in texts.items()
            }
    return hidden


def _difference(
    training: Split,
    hidden: Mapping[int, Float[Tensor, "layer _ width"]],
    compression: Compression,
    candidates: Sequence[Candidate],
    reader: Reader,
) -> float | None:
    """The difference of out-of-fold logits between uncompressed and compressed states.

    Returns:
        Root mean square difference, in standard deviations; infinite if a training run diverged,
        and None with too few texts for folds.
    """
    sample = training.select(hidden)
    folds = sample.folds(_TRIAL_FOLDS) if hidden else ()
    if not folds:
        return None
    uncompressed = sample.states
    compressed = uncompressed.compressed(compression)
    texts = [*hidden.values()]
    # States in memory are never looked up on disk.
    large = {uncompressed.path(row): {"hidden": hidden} for row, hidden in enumerate(texts)}
    small = {
        compressed.path(row): vars(compression.compress(hidden)) for row, hidden in enumerate(texts)
    }
    logits: list[np.ndarray] = []
    for states, tensors in ((uncompressed, large), (compressed, small)):
        (run,) = train_mechanisms(
            candidates[:1],
            split=replace(sample, states=states.in_memory(Memory(0, tensors))),
            left_out=folds,
            device=reader.device,
        )
        if run is None:
            return float("inf")
        logits.append(run.logits)
    difference = np.sqrt(np.square(logits[1] - logits[0]).mean())
    return float(difference / max(logits[0].std(), 1e-9))
