"""The texts of a sitting, with what a linear probe needs of their hidden states.

A linear probe reads two vectors of each text and layer. Only these are kept, where training keeps
the states of all tokens. The model reads each text once, and a fit takes seconds.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import load_file

from sidelight.backbone import TransformersBackbone
from sidelight.data.examples import Example, Examples, LabelledExamples
from sidelight.errors import SidelightError
from sidelight.mechanisms.base import Geometry, build_mechanism, mechanism_spec
from sidelight.mechanisms.linear import Linear
from sidelight.probe import Probe
from sidelight.progress import progress
from sidelight.prompts import Reads
from sidelight.standardisation import Standardisation
from sidelight.states.cache import (
    MEMORY_BYTES,
    ActivationCache,
    Pooled,
    Shard,
    text_name,
    write_tensors,
)
from sidelight.states.extraction import BackboneSource, require_finite, shard_logits
from sidelight.training.dataset import encode_shortened
from sidelight.training.linear import LinearSolution, solve_linear
from sidelight.training.measuring import (
    Calibrated,
    calibrate_examples,
    describe_examples,
    describe_scores,
    text_hashes,
)
from sidelight.training.validation import FOLDS, Folds
from sidelight.types import Task


class Pool:
    """Texts that a model has read.

    Attributes:
        prompts: The token ids of each text, cut to what is read in training.
        given: The probes that were given, and the probabilities that each gives to each text.

    Args:
        backbone: The frozen LLM; it reads what no earlier sitting read.
        examples: The texts.
        task: The labels to decide between.
        reads: The tokens that probes read.
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
        for probe in probes:
            self._require_fits(probe)
        # As in `sidelight train`: of several classes, a large norm says something.
        self._is_normalised = task.kind != "multiclass"
        sizes = backbone.fingerprint
        self._shape = (len(examples), sizes.layers, sizes.width)
        needed = 8 * np.prod(self._shape)
        if needed > memory_bytes:
            raise SidelightError(
                f"{len(examples):,} texts need {needed / 2**30:.1f} GiB of memory for the vectors "
                f"that probes learn from, the limit is {memory_bytes / 2**30:.1f} GiB. Allow more "
                "(--memory), or use fewer texts (--limit)."
            )
        limit = min(max_tokens, backbone.encoder.max_tokens)
        self._max_tokens = limit
        self.prompts = encode_shortened(backbone, examples, reads=reads, limit=limit)
        self.pooled = Pooled(torch.empty(self._shape), torch.empty(self._shape))
        pairs = zip(probes, self._read(root, probes), strict=True)
        self.given = tuple((probe, probe.calibration.apply(own)) for probe, own in pairs)

    def _require_fits(self, probe: Probe) -> None:
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
    ) -> tuple[Probe, Calibrated]:
        """A probe of some of the texts, and what its folds say of those.

        Args:
            rows: Which texts.
            labelled: The same texts with their labels, which ``folds_of`` accepts.
            name: Of the probe.
        """
        folds = folds_of(labelled)
        pooled = self.pooled.chosen(torch.tensor(rows))
        solution = solve_linear(pooled, labelled.labels, self.task, folds=folds)
        assert solution.left_out is not None
        calibrated = calibrate_examples(solution.left_out, labelled, folds=folds)
        probabilities = calibrated.calibration.apply(solution.left_out)
        spec, geometry = mechanism_spec("linear"), Geometry(*self._shape[1:], self.task.outputs)
        scaling = replace(Standardisation.identity(geometry), is_normalised=self._is_normalised)
        mechanism = build_mechanism(spec, geometry).eval().requires_grad_(False)
        mechanism.load_state_dict(solution.standardised(scaling))
        described = describe_examples(labelled)
        probe = Probe(
            name=name,
            task=self.task,
            reads=self.reads,
            prompt_format=self.backbone.encoder.prompt_format,
            spec=spec,
            mechanism=mechanism,
            standardisation=scaling,
            calibration=calibrated.calibration,
            thresholds=calibrated.report.thresholds,
            fingerprint=self.backbone.fingerprint,
            record={
                "training": {**described, "texts": text_hashes(labelled)},
                "validation": {
                    **described,
                    "metrics": calibrated.report.to_dict(),
                    **describe_scores(self.task, probabilities, labelled.labels),
                },
                "folds": len(calibrated.folds),
                "settings": {"strength": solution.strength},
                "max_tokens": self._max_tokens,
                "seed": 0,
                "parameters": sum(values.numel() for values in mechanism.parameters()),
            },
        )
        return probe, calibrated

    def _read(self, root: Path, probes: Sequence[Probe]) -> list[Float[np.ndarray, "text output"]]:
        """Reads the vectors of all texts into ``pooled``, and gives the probes' logits.

        A file a text, written whole, so a killed sitting reads on where it stopped.
        """
        who = (
            self.backbone.fingerprint.digest,
            self._is_normalised,
            *(probe.version for probe in probes),
        )
        folder = root / hashlib.sha256(repr(who).encode()).hexdigest()[:12]
        files = [folder / f"{text_name(prompt, self.reads)}.safetensors" for prompt in self.prompts]
        missing = [row for row, file in enumerate(files) if not file.exists()]
        if missing:
            folder.mkdir(parents=True, exist_ok=True)
            # Never filled: it says what is read of which texts.
            cache = ActivationCache(
                root, self.prompts, reads=self.reads, fingerprint=self.backbone.fingerprint
            )
            tokens = sum(len(self.prompts[row]) for row in missing)
            with progress("Reading", tokens, unit="tokens") as shown:
                for texts in BackboneSource(self.backbone).states(cache, missing, shown):
                    require_finite(texts, dtype=self.backbone.fingerprint.dtype)
                    shard = Shard.joined(texts)
                    pooled = shard.pooled(is_normalised=self._is_normalised)
                    columns = [torch.from_numpy(shard_logits(probe, shard)) for probe in probes]
                    for place, row in enumerate(shard.rows.tolist()):
                        vectors = {
                            "means": pooled.means[place].clone(),
                            "lasts": pooled.lasts[place].bfloat16(),
                        }
                        logits = {f"logits{i}": own[place].clone() for i, own in enumerate(columns)}
                        write_tensors(vectors | logits, files[row])
        logits = [np.empty((len(files), self.task.outputs)) for _ in probes]
        for row, file in enumerate(files):
            stored = load_file(file)
            self.pooled.means[row], self.pooled.lasts[row] = stored["means"], stored["lasts"]
            for number, own in enumerate(logits):
                own[row] = stored[f"logits{number}"].numpy()
        return logits


def merged(
    texts: Examples, labelled: LabelledExamples | None
) -> tuple[Examples, dict[int, tuple[str, ...]]]:
    """Each distinct text once, and those that are labelled with their labels.

    Labelled texts that are not among ``texts`` follow them. Of a text that was labelled twice, the
    later labels count.
    """
    distinct: dict[object, tuple[Example, Mapping[str, Any]]] = {}
    for part in [texts] if labelled is None else [texts, labelled]:
        for item, row in zip(part.items, part.rows, strict=True):
            distinct.setdefault((item.messages, item.response), (item, row))
    items, rows = (tuple(values) for values in zip(*distinct.values(), strict=True))
    decided: dict[int, tuple[str, ...]] = {}
    if labelled is not None:
        numbers = {key: number for number, key in enumerate(distinct)}
        for item, names in zip(labelled.items, labelled.label_names(), strict=True):
            decided[numbers[item.messages, item.response]] = tuple(names)
    return Examples(items, rows), decided


def folds_of(examples: LabelledExamples) -> Folds:
    """The folds to cross-fit by; none if one of them would lack a label."""
    if examples.distinct < FOLDS:
        return ()
    folds = examples.folds(FOLDS, seed=0)
    return folds if all(examples.select(fold).label_counts.all() for fold in folds) else ()
