"""Search for a mechanism's options and training settings on validation data, from cached states.

Optuna proposes configurations in generations. The probes of one generation are trained together, so
that a shard is read once for all of them, and their scores are written to a journal on disk. Each
proposal has its own seed and depends on the earlier trials. An interrupted search therefore resumes
with the same proposals.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from sidelight.errors import SidelightError
from sidelight.models.fingerprint import hash_of
from sidelight.probes.mechanisms.base import Geometry, build_mechanism, mechanism_spec
from sidelight.training.loop import Candidate, train_mechanisms
from sidelight.training.optimisation import validation_score
from sidelight.training.preparing import ProbeDataset
from sidelight.training.settings import TrainingSettings, suggested_settings
from sidelight.types import MechanismSpec, OptionValue, Task

# Random trials before the estimator has enough scores to learn from.
_RANDOM_TRIALS = 12
# A diverged training run has no score; a pruned trial ranks below all others.
_FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
_KNOWN = (*_FINISHED, TrialState.RUNNING)
# Attributes of a search in the storage, in addition to parameters and scores.
_SUBJECT = "subject"
_BATCH_SIZES = (8, 16, 32, 64)
_MOST_EPOCHS = 12


def score_name(task: Task) -> str:
    """Return the name of the metric that ``validation_score`` computes for a task."""
    return {"binary": "AUPRC", "multilabel": "mean AUPRC"}.get(task.kind, "accuracy")


@dataclass(frozen=True)
class Space:
    """The search space of one mechanism.

    The paper searches learning rates of 1e-5 to 1e-3, weight decays of 0 to 0.05, batch sizes of 8
    to 64 and at most 10 epochs (Meyoyan & Del Corro 2026). Standardised states tolerate more weight
    decay, and a readout improves until its twelfth epoch.

    Attributes:
        learning_rate: Range of the learning rate; drawn uniformly on a logarithmic scale.
        weight_decay: Range of the weight decay; drawn uniformly on a linear scale.
        options: Values to try for each option; a missing option keeps its default.
    """

    learning_rate: tuple[float, float] = (1e-5, 5e-2)
    weight_decay: tuple[float, float] = (0.0, 0.5)
    options: Mapping[str, tuple[OptionValue, ...]] = field(default_factory=dict)

    def distributions(self, specs: Sequence[MechanismSpec]) -> dict[str, BaseDistribution]:
        """Return the distributions of a trial; early stopping may end before the drawn epochs."""
        return {
            "options": CategoricalDistribution([*map(_options_name, specs)]),
            "learning rate": FloatDistribution(*self.learning_rate, log=True),
            "weight decay": FloatDistribution(*self.weight_decay),
            "epochs": IntDistribution(1, _MOST_EPOCHS),
            "batch size": CategoricalDistribution(_BATCH_SIZES),
        }

    def default_parameters(self, specs: Sequence[MechanismSpec]) -> dict[str, Any]:
        """Return the mechanism's default options and settings, clipped to the space."""
        mechanism = specs[0].name
        default, settings = mechanism_spec(mechanism), suggested_settings(mechanism)
        return {
            "options": _options_name(default if default in specs else specs[0]),
            "learning rate": float(np.clip(settings.learning_rate, *self.learning_rate)),
            "weight decay": float(np.clip(settings.weight_decay, *self.weight_decay)),
            "epochs": min(settings.epochs, _MOST_EPOCHS),
            "batch size": min(_BATCH_SIZES, key=lambda size: abs(size - settings.batch_size)),
        }


# Heads of a single layer learn best above the paper's rates.
# A mechanism without an entry uses the default space.
SPACES: Mapping[str, Space] = {
    "pooling": Space(options={"kind": ("mean", "max")}),
    "gate": Space(options={"activation": ("tanh", "identity")}),
    "attention": Space(
        learning_rate=(1e-5, 1e-3),
        options={"factor": (4, 8, 16, 32, 64), "heads": (4, 8, 16), "pooling": ("mean", "max")},
    ),
    "readout": Space(learning_rate=(1e-5, 1e-2), options={"heads": (1, 2, 4, 8)}),
    "fusion": Space(learning_rate=(1e-4, 1e-2), options={"rank": (16, 32, 64, 128)}),
    "blend": Space(learning_rate=(1e-4, 1e-2), options={"fusions": (1, 2), "rank": (16, 32, 64)}),
}


def possible_specs(
    mechanism: str, geometry: Geometry, options: Mapping[str, tuple[OptionValue, ...]]
) -> list[MechanismSpec]:
    """Return the combinations of options with which the mechanism can be built for a geometry."""
    possible: list[MechanismSpec] = []
    refusal = ""
    for values in product(*options.values()):
        spec = mechanism_spec(mechanism, dict(zip(options, values, strict=True)))
        try:
            # The meta device allocates nothing; parameters for a large backbone take gigabytes.
            with torch.device("meta"):
                build_mechanism(spec, geometry)
        except SidelightError as error:
            refusal = str(error)
        else:
            possible.append(spec)
    if not possible:
        raise SidelightError(
            f"None of the searched options of '{mechanism}' fits hidden states of width "
            f"{geometry.width}. Search other mechanisms. The last error: {refusal}"
        )
    return possible


def _options_name(spec: MechanismSpec) -> str:
    return json.dumps(dict(spec.options))


@dataclass(frozen=True)
class Trial:
    """One trained configuration."""

    number: int  # position in the search, from 0
    spec: MechanismSpec
    settings: TrainingSettings
    score: float | None  # average precision, or multi-class accuracy; None if training diverged


def search_settings(
    dataset: ProbeDataset,
    mechanism: str,
    *,
    trials: int,
    seed: int,
    storage: Path,
    generation: int = 8,
    on_generation: Callable[[tuple[Trial, ...]], None] = lambda _trials: None,
) -> tuple[Trial, ...]:
    """Return all trials of a mechanism in order; ``best_of`` selects the best of them.

    The first trial uses the mechanism's defaults and the next ones are random. After that, a
    tree-structured Parzen estimator proposes trials (Bergstra et al. 2011). An interrupted search
    resumes where it stopped and ends with the same result.

    Args:
        dataset: The texts; those that training leaves out are scored.
        mechanism: Name of the mechanism.
        trials: Total number of trials, including those already in the storage.
        seed: Seed of the proposals, the initial parameters and the order of the data.
        storage: Journal file of the trials; several mechanisms may share it.
        generation: Number of trials that are proposed and trained together. A larger generation
            shares each read among more trials, but these are proposed without each other's scores
            and need more memory.
        on_generation: Called with all trials so far after each generation.

    Raises:
        SidelightError: The mechanism is unknown, no options fit this backbone, the storage belongs
            to another search, or every training run diverged.
    """
    sizes = dataset.training.states.fingerprint
    geometry = Geometry(sizes.layers, sizes.width, dataset.task.outputs)
    space = SPACES.get(mechanism_spec(mechanism).name, Space())
    specs = possible_specs(mechanism, geometry, space.options)
    sides = {"training set": dataset.training, "validation set": dataset.validation}
    # The folder name of a cache covers the backbone, the reads and the token ids.
    subject = {
        name: f"{split.states.key} {split.examples.content_hash}" for name, split in sides.items()
    }
    subject["left-out texts"] = hash_of(*(rows.tolist() for rows in dataset.left_out))
    subject |= {"seed": str(seed), "space": repr(space)}
    study = _open_study(mechanism, storage, subject)
    if not study.get_trials(deepcopy=False, states=(*_KNOWN, TrialState.WAITING)):
        study.enqueue_trial(space.default_parameters(specs))
    distributions = space.distributions(specs)
    while (missing := trials - len(_trials(study, _FINISHED))) > 0:
        count = min(generation, missing)
        # Untrained trials of an interrupted search come first.
        while len(asked := _trials(study, (TrialState.RUNNING,))[:count]) < count:
            _propose(study, distributions, seed)
        candidates = [(trial.spec, trial.settings) for trial in asked]
        for trial, logits in zip(asked, _evaluate(candidates, dataset), strict=True):
            if logits is None:
                study.tell(trial.number, state=TrialState.PRUNED)
            else:
                labels = dataset.validation.labels
                study.tell(trial.number, validation_score(dataset.task, logits, labels))
        on_generation(_tried(study))
    tried = _tried(study)
    best_of(tried)
    return tried


def _open_study(name: str, storage: Path, subject: Mapping[str, str]) -> optuna.Study:
    """Open the mechanism's study in the journal, and drop incompletely drawn trials.

    The subject identifies what was scored. Opening a study with another subject raises an error.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage.parent.mkdir(parents=True, exist_ok=True)
    if storage.exists():
        # An interrupted write has no final newline, and optuna would append to the same line.
        complete_bytes = storage.read_bytes().rfind(b"\n") + 1
        if complete_bytes < storage.stat().st_size:
            os.truncate(storage, complete_bytes)
    journal = JournalStorage(JournalFileBackend(str(storage)))
    study = optuna.create_study(
        storage=journal, study_name=name, direction="maximize", load_if_exists=True
    )
    stored = study.user_attrs.get(_SUBJECT)
    if stored is None:
        study.set_user_attr(_SUBJECT, dict(subject))
        stored = subject
    different = [key for key in subject if stored.get(key) != subject[key]]
    if different:
        raise SidelightError(
            f"{storage} contains a search of '{name}' with another "
            f"{' and another '.join(different)}, whose scores are not comparable. Name another "
            "folder, or delete this file."
        )
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        # The batch size is drawn last.
        if "batch size" not in trial.params:
            study.tell(trial.number, state=TrialState.FAIL)
    return study


def _propose(study: optuna.Study, distributions: dict[str, BaseDistribution], seed: int) -> None:
    """Draw a trial with its own seed."""
    drawn = len(study.get_trials(deepcopy=False, states=_KNOWN))
    study.sampler = optuna.samplers.TPESampler(
        seed=int(np.random.SeedSequence([seed, drawn]).generate_state(1)[0]),
        n_startup_trials=_RANDOM_TRIALS,
        multivariate=True,
        constant_liar=True,
    )
    study.ask(distributions)


def _evaluate(candidates: Sequence[Candidate], dataset: ProbeDataset) -> list[np.ndarray | None]:
    """Return the validation logits of each candidate; None for a diverged training run."""
    trained = train_mechanisms(
        candidates,
        split=dataset.split,
        left_out=dataset.left_out,
        device=dataset.reader.device,
    )
    texts = len(dataset.validation)
    return [None if one is None else one.logits[:texts] for one in trained]


def _trials(study: optuna.Study, states: Sequence[TrialState]) -> list[Trial]:
    """Return the study's trials in these states, with their numbers in the storage.

    Settings that are not searched have the mechanism's suggested values.
    """
    seed = int(study.user_attrs[_SUBJECT]["seed"])
    found: list[Trial] = []
    for trial in study.get_trials(deepcopy=False, states=tuple(states)):
        spec = mechanism_spec(study.study_name, json.loads(trial.params["options"]))
        searched = {
            name.replace(" ", "_"): value
            for name, value in trial.params.items()
            if name != "options"
        }
        settings = suggested_settings(spec.name).changed(seed=seed, **searched)
        found.append(Trial(trial.number, spec, settings, trial.value))
    return found


def _tried(study: optuna.Study) -> tuple[Trial, ...]:
    """Return the trained trials, renumbered without those that an interruption left incomplete."""
    trials = _trials(study, _FINISHED)
    return tuple(replace(trial, number=place) for place, trial in enumerate(trials))


def best_of(trials: Sequence[Trial]) -> Trial:
    """Return the first trial with the highest score, which is an optimistic estimate.

    Raises:
        SidelightError: Every training run diverged.
    """
    scored = [trial for trial in trials if trial.score is not None]
    if not scored:
        raise SidelightError(
            f"All {len(trials)} trainings diverged, so there are no scores to compare. Check for "
            "hidden states that are not finite, or load the backbone with --dtype float32."
        )
    return max(scored, key=lambda trial: trial.score or 0.0)
