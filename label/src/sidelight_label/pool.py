"""The texts of a sitting, with what a linear probe needs of their hidden states.

A linear probe reads two vectors of each text and layer. Only these are kept, where training keeps
the states of all tokens. The model reads each text once, and a fit takes seconds.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import load_file

from sidelight.backbone import TransformersBackbone
from sidelight.data.examples import Examples, LabelledExamples
from sidelight.errors import SidelightError
from sidelight.mechanisms.base import Geometry, build_mechanism, mechanism_spec
from sidelight.mechanisms.linear import Linear
from sidelight.probe import Probe
from sidelight.progress import progress
from sidelight.prompts import Reads
from sidelight.standardisation import Standardisation
from sidelight.states.cache import MEMORY_BYTES, ActivationCache, Pooled, write_tensors
from sidelight.states.extraction import BackboneSource, require_finite, shard_logits
from sidelight.training.dataset import FOLDS, Folds, ProbeDataset, Split, encode_shortened
from sidelight.training.fit import FittedProbe, calibrate, calibrate_probe
from sidelight.training.linear import LinearSolution, solve_linear
from sidelight.training.loop import Trained
from sidelight.training.settings import FitOptions, Job, suggested_settings
from sidelight.types import Task

_SHARD_BYTES = 128 * 2**20


class Pool:
    """Texts that a model has read.

    Attributes:
        examples: The texts.
        prompts: Their token ids, cut to what is read in training.
        task: The labels that are decided between.
        reads: The tokens that probes read.
        pooled: The vectors.
        given: The probes that were given, and what each says of each text.

    Args:
        backbone: The frozen LLM; it reads what no earlier sitting read.
        examples: As above.
        task: As above.
        reads: As above.
        probes: Probes that are given; they judge each text while its states are at hand.
        max_tokens: Longer texts are cut, as in training.
        memory_bytes: The most that the vectors may take.
        root: The folder that gets a folder for the vectors.

    Raises:
        SidelightError: A probe is another model's, of other labels, or reads something else; the
            vectors would not fit the memory; or a text cannot be read.
    """

    def __init__(
        self,
        backbone: TransformersBackbone,
        examples: Examples,
        task: Task,
        *,
        reads: Reads,
        root: Path,
        probes: Sequence[Probe] = (),
        max_tokens: int = 1024,
        memory_bytes: int = MEMORY_BYTES,
    ):
        self.backbone = backbone
        self.examples = examples
        self.task = task
        self.reads = reads
        self._max_tokens = max_tokens
        for probe in probes:
            self.require_fits(probe)
        sizes = backbone.fingerprint
        needed = 8 * len(examples) * sizes.layers * sizes.width
        if needed > memory_bytes:
            raise SidelightError(
                f"{len(examples):,} texts need {needed / 2**30:.1f} GiB of memory for the vectors "
                f"that probes learn from, the limit is {memory_bytes / 2**30:.1f} GiB. Allow more "
                "(--memory), or use fewer texts (--limit)."
            )
        source = BackboneSource(backbone)
        limit = min(max_tokens, source.max_tokens)
        self.prompts = encode_shortened(backbone, examples, reads=reads, limit=limit)
        # Never filled: it says which texts are read together, and names them by a hash.
        self._states = ActivationCache(
            root, self.prompts, reads=reads, fingerprint=sizes, shard_bytes=_SHARD_BYTES
        )
        self.pooled, logits = self._read(source, probes)
        self.given = tuple(
            (probe, probe.calibration.apply(own)) for probe, own in zip(probes, logits, strict=True)
        )

    def require_fits(self, probe: Probe) -> None:
        """Checks that a probe can judge the texts.

        Raises:
            SidelightError: It is another model's, of other labels, or reads something else.
        """
        probe.fingerprint.require(self.backbone.fingerprint, probe=probe.name)
        if probe.task != self.task:
            raise SidelightError(
                f"Probe '{probe.name}' decides between {', '.join(probe.task.labels)} "
                f"({probe.task.kind}), but here the labels are {', '.join(self.task.labels)} "
                f"({self.task.kind}). Name probes of the same labels."
            )
        if probe.reads.parts != self.reads.parts:
            raise SidelightError(
                f"Probe '{probe.name}' reads {probe.reads.side}, but here "
                f"{self.reads.side} is read. Name probes that read the same part of a text."
            )

    def probabilities(self, probe: Probe) -> Float[np.ndarray, "text output"]:
        """Of each text, by a probe that ``fit`` made."""
        assert isinstance(probe.mechanism, Linear)
        solution = LinearSolution.of(probe.mechanism, probe.standardisation)
        return probe.calibration.apply(solution.logits(self.pooled).astype(np.float64))

    def fit(
        self, rows: Sequence[int], labelled: LabelledExamples, *, name: str
    ) -> tuple[FittedProbe, Float[np.ndarray, "row output"]]:
        """A probe of some of the texts, with the probabilities of each by one that left it out.

        Args:
            rows: Which texts.
            labelled: The same texts with their labels, which ``folds_of`` accepts.
            name: Of the probe.
        """
        chosen = torch.tensor(rows)
        own = Pooled(self.pooled.means[chosen], self.pooled.lasts[chosen])
        folds = folds_of(labelled)
        solution = solve_linear(own, labelled.labels, self.task, folds=folds)
        assert solution.left_out is not None
        sizes = self.backbone.fingerprint
        geometry = Geometry(sizes.layers, sizes.width, self.task.outputs)
        scaling = replace(Standardisation.identity(geometry), is_normalised=self._is_normalised)
        spec = mechanism_spec("linear")
        mechanism = build_mechanism(spec, geometry)
        mechanism.load_state_dict(solution.standardised(scaling))
        settings = replace(
            suggested_settings("linear"),
            normalise=self._is_normalised,
            strength=solution.strength,
        )
        trained = Trained(
            job=Job(spec, 0, settings, standardise=False),
            mechanism=mechanism.eval().requires_grad_(False),
            standardisation=scaling,
            logits=solution.left_out,
            history=(),
            best_epoch=1,
        )
        split = Split(
            labelled, tuple(self.prompts[row] for row in rows), self._states, np.array(rows)
        )
        dataset = ProbeDataset(self.backbone, split, split, folds)
        options = FitOptions(mechanisms=(spec,), reads=self.reads, max_tokens=self._max_tokens)
        fitted = calibrate_probe(trained, dataset, name=name, options=options)
        return fitted, calibrate(trained.logits, dataset, bootstrap=0).probabilities

    @property
    def _is_normalised(self) -> bool:
        return bool(suggested_settings("linear").fitted_to(1, self.task).normalise)

    def _read(
        self, source: BackboneSource, probes: Sequence[Probe]
    ) -> tuple[Pooled, list[Float[np.ndarray, "text output"]]]:
        """The vectors of all texts and the logits of the probes: from disk, where they are there.

        A part is written as soon as it is whole, so a killed sitting reads on where it stopped.
        """
        who = repr((self._is_normalised, *(probe.version for probe in probes)))
        folder = self._states.directory / hashlib.sha256(who.encode()).hexdigest()[:12]
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / f"{part:05d}.safetensors" for part in range(len(self._states))]
        missing = [part for part, file in enumerate(files) if not file.exists()]
        if missing:
            plan = self._states.plan
            tokens = sum(len(self.prompts[row]) for part in missing for row in plan.rows[part])
            with progress("Reading", tokens, unit="tokens") as shown:
                for part, shard in source.shards(self._states, missing, shown):
                    require_finite(shard, dtype=self.backbone.fingerprint.dtype)
                    pooled = shard.pooled(is_normalised=self._is_normalised)
                    logits = {
                        f"logits{number}": torch.from_numpy(shard_logits(probe, shard))
                        for number, probe in enumerate(probes)
                    }
                    tensors = {"means": pooled.means, "lasts": pooled.lasts.bfloat16()}
                    write_tensors({"rows": shard.rows, **tensors, **logits}, files[part])
        sizes = self.backbone.fingerprint
        shape = (len(self.examples), sizes.layers, sizes.width)
        pooled = Pooled(torch.empty(shape), torch.empty(shape))
        given = [np.empty((shape[0], self.task.outputs)) for _ in probes]
        for file in files:
            stored = load_file(file)
            rows = stored["rows"]
            pooled.means[rows], pooled.lasts[rows] = stored["means"], stored["lasts"].float()
            for number, logits in enumerate(given):
                logits[rows.numpy()] = stored[f"logits{number}"].numpy()
        return pooled, given


def merged(
    texts: Examples, labelled: LabelledExamples | None
) -> tuple[Examples, dict[int, tuple[str, ...]]]:
    """Each distinct text once, and those that are labelled with their labels.

    Labelled texts that are not among ``texts`` follow them. Of a text that was labelled twice, the
    later labels count.
    """
    parts = [texts] if labelled is None else [texts, labelled]
    places: dict[tuple[object, ...], tuple[int, int]] = {}
    for part, examples in enumerate(parts):
        for row, item in enumerate(examples.items):
            places.setdefault((item.messages, item.response), (part, row))
    items = tuple(parts[part].items[row] for part, row in places.values())
    rows = tuple(parts[part].rows[row] for part, row in places.values())
    decided: dict[int, tuple[str, ...]] = {}
    if labelled is not None:
        number = {key: row for row, key in enumerate(places)}
        for item, names in zip(labelled.items, labelled.label_names(), strict=True):
            decided[number[item.messages, item.response]] = tuple(names)
    return Examples(items, rows), decided


def folds_of(examples: LabelledExamples) -> Folds:
    """The folds to cross-fit by; none if one of them would lack a label."""
    if examples.distinct < FOLDS:
        return ()
    folds = examples.folds(FOLDS, seed=0)
    return folds if all(examples.select(fold).label_counts.all() for fold in folds) else ()
