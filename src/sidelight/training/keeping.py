"""How the hidden states of a training are kept: whole, compressed, or computed in each epoch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sidelight.models.fingerprint import Fingerprint, hash_of
from sidelight.probes.mechanisms.base import Geometry, build_mechanism
from sidelight.progress import progress, say
from sidelight.states.cache import ActivationCache, Memory, token_bytes
from sidelight.states.compression import Compression, kept_directions
from sidelight.states.extraction import extract, require_finite, streamed
from sidelight.states.reader import Reader
from sidelight.training.dataset import Split
from sidelight.training.loop import Candidate, train_mechanisms
from sidelight.training.settings import FitOptions

# Tokens that directions are measured on, and that a probe is tried on with and without them.
_SAMPLE_TOKENS = 8192
# The most that out-of-fold logits of the sample may differ between whole and compressed states:
# root mean square, in standard deviations of the logits.
TOLERANCE = 0.5
_TRIAL_FOLDS = 2
# More than this is computed in each epoch instead, in bytes of compressed states.
MOST_DISK_BYTES = 200 * 2**30
# What reading costs where it is cheaper than a disk: operations per second of a GPU, at the share
# of its peak that inference reaches, and bytes per second of a fast disk.
_GPU_OPERATIONS_PER_S = 1e14
_DISK_BYTES_PER_S = 2e9


@dataclass(frozen=True)
class Keeping:
    """How states are kept.

    Attributes:
        compression: How they are stored; None: whole.
        is_streamed: Whether they are computed whenever they are read.
        warnings: What the user should know, one sentence each.
    """

    compression: Compression | None = None
    is_streamed: bool = False
    warnings: tuple[str, ...] = ()

    def apply(self, reader: Reader, split: Split, *, title: str) -> Split:
        """The split with its states kept so; those on disk are there afterwards.

        Raises:
            SidelightError: The states would not fit the disk, or one is not finite.
        """
        states = split.states
        if self.compression is not None:
            states = states.compressed(self.compression)
        if self.is_streamed:
            return replace(split, states=streamed(reader, states))
        stored = sum(states.path(row).exists() for row in range(len(split)))
        if stored:
            say(f"{title}: the hidden states of {stored:,} of {len(split):,} are on disk already.")
        return replace(split, states=extract(reader, states, title=title))


def choose_keeping(
    reader: Reader, splits: Sequence[Split], candidates: Sequence[Candidate], options: FitOptions
) -> Keeping:
    """Choose how hidden states are kept, from ``options.states`` and the number of tokens.

    ``auto`` keeps states whole if they fit in memory, else compressed on disk. It recomputes them
    in each epoch if they would take over 200 GiB, or a GPU computes them faster than a disk reads.

    Args:
        reader: The frozen LLM, in any engine.
        splits: What trains, then what measures; their states have not been computed.
        candidates: What is trained; without any, states stay whole.
        options: How the user wants them kept.

    Raises:
        SidelightError: A state is not finite, or the compression cannot be written.
    """
    training = splits[0]
    tokens = sum(sum(split.states.lengths) for split in splits)
    whole_bytes = tokens * token_bytes(reader.fingerprint)
    fits = options.states == "auto" and whole_bytes <= options.memory_bytes
    compression, warnings = None, ()
    if not fits and options.states != "whole" and _can_be_compressed(candidates, training):
        compression, warnings = _tried_compression(reader, training, candidates)
    if options.states == "auto" and not fits:
        kept = compression.token_bytes if compression else token_bytes(reader.fingerprint)
        is_fast = reads_faster_than_disk(reader.fingerprint, reader.device, kept)
        is_streamed = tokens * kept > MOST_DISK_BYTES or is_fast
    else:
        is_streamed = options.states == "stream"
    return Keeping(compression, is_streamed, warnings)


def _can_be_compressed(candidates: Sequence[Candidate], training: Split) -> bool:
    """Whether all train on standardised states of one kind, each layer with its own parameters."""
    who = training.states.fingerprint
    geometry = Geometry(who.layers, who.width, training.task.outputs)
    resolved = [settings.resolved_for(len(training), training.task) for _, settings in candidates]
    # Their sizes alone: no memory is taken, and no random number is drawn.
    with torch.device("meta"):
        mechanisms = [build_mechanism(spec, geometry) for spec, _ in candidates]
    return (
        bool(candidates)
        and all(mechanism.layer_parameters() for mechanism in mechanisms)
        and all(settings.standardise for settings in resolved)
        and len({settings.normalise for settings in resolved}) == 1
    )


def reads_faster_than_disk(who: Fingerprint, device: torch.device, kept: int) -> bool:
    """Whether a model on a GPU computes a token's states sooner than a disk reads its bytes.

    Args:
        who: The model.
        device: Where it runs.
        kept: The bytes of a token on disk.
    """
    if device.type == "cpu":
        return False
    # A block of width D has about 12 D^2 parameters, each for two operations.
    operations = 2 * 12 * (who.layers - 1) * who.width**2
    return operations / _GPU_OPERATIONS_PER_S < kept / _DISK_BYTES_PER_S


def _tried_compression(
    reader: Reader, training: Split, candidates: Sequence[Candidate]
) -> tuple[Compression | None, tuple[str, ...]]:
    """The compression that a sample gives; None, with the reason, if it changes the sample's probe.

    The sample's compressed states are written, and so is the compression: after a kill, the same
    training finds both.
    """
    states = training.states
    settings = candidates[0][1].resolved_for(len(training), training.task)
    directions = kept_directions(reader.fingerprint.width)
    rows = _sample(states)
    names = [states.path(row).name for row in rows]
    who = hash_of(states.directory.name, *names, settings.normalise, directions)
    path = states.directory.with_name(f"compression-{who}.safetensors")
    if path.exists():
        return Compression.load(path), ()
    hidden = _read_sample(reader, states, rows)
    compression = Compression.measured(
        torch.cat([*hidden.values()], 1),
        is_normalised=bool(settings.normalise),
        directions=directions,
    )
    difference = _difference(training, hidden, compression, candidates, reader)
    if not difference <= TOLERANCE:
        return None, (
            f"Hidden states are kept whole ({states.token_bytes / 1e3:.0f} KB per token): on "
            f"{len(rows)} sample texts, the logits with and without compression differ by "
            f"{difference:.2f} standard deviations (limit: {TOLERANCE}).",
        )
    compression.save(path)
    compressed = states.compressed(compression)
    compressed.open()
    compressed.write(hidden)
    return compression, ()


def _sample(states: ActivationCache) -> list[int]:
    """Distinct texts in random order that have enough tokens, or all."""
    rows: dict[str, int] = {}
    tokens = 0
    for row in (row for shard in states.shards for row in shard):
        if tokens >= _SAMPLE_TOKENS:
            break
        if rows.setdefault(states.path(row).name, row) == row:
            tokens += states.lengths[row]
    return [*rows.values()]


def _read_sample(
    reader: Reader, states: ActivationCache, rows: Sequence[int]
) -> dict[int, Float[Tensor, "layer _ width"]]:
    hidden: dict[int, Tensor] = {}
    tokens = sum(len(states.prompts[row]) for row in rows)
    with progress("Choosing directions", tokens, unit="tokens") as advance:
        for texts in reader.states(states, rows, advance):
            require_finite(texts, dtype=states.fingerprint.dtype)
            hidden |= texts
    return {row: hidden[row] for row in rows}


def _difference(
    training: Split,
    hidden: dict[int, Float[Tensor, "layer _ width"]],
    compression: Compression,
    candidates: Sequence[Candidate],
    reader: Reader,
) -> float:
    """How much out-of-fold logits of the sample differ between whole and compressed states."""
    sample = training.select(hidden)
    whole = sample.states
    # What is in memory is never looked for on disk.
    memory = {whole.path(i): {"hidden": own} for i, own in enumerate(hidden.values())}
    compressed = whole.compressed(compression)
    small = {
        compressed.path(i): vars(compression.compress(own)) for i, own in enumerate(hidden.values())
    }
    logits: list[np.ndarray] = []
    for states, texts in ((whole, memory), (compressed, small)):
        split = replace(sample, states=states.held(Memory(0, texts)))
        (run,) = train_mechanisms(
            candidates[:1],
            training=split,
            validation=None,
            folds=split.folds(_TRIAL_FOLDS),
            device=reader.device,
        )
        if run is None:
            return float("inf")
        logits.append(run.logits)
    spread = logits[0].std()
    return float(np.sqrt(np.square(logits[1] - logits[0]).mean()) / spread) if spread else 0.0
