"""What a search tried, and what it found. Knows figures, not how they were searched.

What to try next, by optuna, and its memory on disk. Knows parameters and scores, not training.

Each proposal is drawn with a seed of its own, from the trials before it: a search that goes on
after a kill proposes what it would have proposed, and not its first random trials again.

Searches a mechanism's settings: proposes a generation, trains it, learns from its scores.

A generation is trained in one call, so that each shard that is read updates all of its trials.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import optuna
from optuna.importance import get_param_importances
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from sidelight.errors import SidelightError
from sidelight.mechanisms.base import Geometry, MechanismSpec, mechanism_spec
from sidelight.training.cross_fitting import Folds, judge_by_folds
from sidelight.training.dataset import ProbeDataset, Split
from sidelight.training.loop import train_mechanisms
from sidelight.training.objective import validation_score
from sidelight.training.settings import Job, TrainingSettings
from sidelight_lab.search.space import defaults, draw_settings, draw_spec, possible_specs, space_of


@dataclass(frozen=True)
class Trial:
    """One configuration that was trained.

    Attributes:
        number: Place in the search, from 0.
        spec: The mechanism and its options.
        settings: Of the optimisation.
        score: On validation data, what early stopping maximises; None where training diverged.
    """

    number: int
    spec: MechanismSpec
    settings: TrainingSettings
    score: float | None


@dataclass(frozen=True)
class Best:
    """The configuration with the highest score on validation data.

    The highest of many scores is too high an estimate of what another data set would give.

    Attributes:
        spec: The mechanism and its options.
        settings: Of the optimisation.
        score: Average precision, or accuracy for a multi-class task.
        trials: All that was tried, in order.
        importance: Share of the scores' differences that each parameter explains; empty while
            there are too few trials to say.
    """

    spec: MechanismSpec
    settings: TrainingSettings
    score: float
    trials: tuple[Trial, ...]
    importance: Mapping[str, float] = field(default_factory=dict)


def best_of(trials: Sequence[Trial], importance: Mapping[str, float] | None = None) -> Best:
    """The first of the trials with the highest score.

    Raises:
        SidelightError: Every training diverged.
    """
    scores = [-1.0 if trial.score is None else trial.score for trial in trials]
    score = max(scores)
    if score < 0:
        raise SidelightError(
            f"All {len(trials)} trainings diverged: no score can be compared. Look for hidden "
            "states that are not finite, or load the backbone with --dtype float32."
        )
    found = trials[scores.index(score)]
    return Best(found.spec, found.settings, score, tuple(trials), importance or {})


# Before the estimator has enough scores to learn from.
_RANDOM_TRIALS = 12
_ENOUGH_FOR_IMPORTANCE = 16
# A training that diverged has no score; as pruned it ranks below all that have one.
_FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
_UNFINISHED = (TrialState.RUNNING,)
# Names of what the storage keeps beside parameters and scores.
_SUBJECT, _CONFIGURATION = "subject", "configuration"


@dataclass(frozen=True)
class Proposal:
    """A configuration to train.

    Attributes:
        number: Of the trial in the storage.
        spec: The mechanism and its options.
        settings: Of the optimisation.
    """

    number: int
    spec: MechanismSpec
    settings: TrainingSettings


class Proposals:
    """Asks for one mechanism's trials, and tells how they went.

    Args:
        mechanism: Its name, under which the storage keeps its trials.
        geometry: Sizes that its options have to fit.
        seed: Of every draw.
        storage: Journal file; made if absent.
        subject: What scores depend on, by name; a search of another subject does not go on.

    Raises:
        SidelightError: Unknown mechanism, no option that fits, or a storage of another search.
    """

    def __init__(
        self,
        mechanism: str,
        geometry: Geometry,
        *,
        seed: int,
        storage: Path,
        subject: Mapping[str, str],
    ):
        self._mechanism = mechanism
        self._space = space_of(mechanism)
        self._specs = possible_specs(mechanism, geometry, self._space.options)
        self._seed = seed
        self._study = _opened(mechanism, storage)
        self._claim({**subject, "seed": str(seed), "space": repr(self._space)}, storage)
        self._resume()

    def ask(self, count: int) -> list[Proposal]:
        """Configurations to train; first what a killed search left untrained."""
        left = [self._read(trial) for trial in self._trials(_UNFINISHED)][:count]
        return [*left, *(self._propose() for _ in range(count - len(left)))]

    def tell(self, proposal: Proposal, score: float | None) -> None:
        """Stores a score on validation data; None for a training that diverged."""
        if score is None:
            self._study.tell(proposal.number, state=TrialState.PRUNED)
        else:
            self._study.tell(proposal.number, score)

    def finished(self) -> tuple[Trial, ...]:
        """What has been told, in the order of asking."""
        proposals = [(self._read(trial), trial.value) for trial in self._trials(_FINISHED)]
        return tuple(
            Trial(place, proposal.spec, proposal.settings, score)
            for place, (proposal, score) in enumerate(proposals)
        )

    def best(self) -> Best:
        """The best so far.

        Raises:
            SidelightError: Every training diverged.
        """
        enough = len(self._trials((TrialState.COMPLETE,))) >= _ENOUGH_FOR_IMPORTANCE
        return best_of(self.finished(), get_param_importances(self._study) if enough else {})

    def _propose(self) -> Proposal:
        drawn = len(self._trials((*_FINISHED, *_UNFINISHED)))
        self._study.sampler = optuna.samplers.TPESampler(
            seed=int(np.random.SeedSequence([self._seed, drawn]).generate_state(1)[0]),
            n_startup_trials=_RANDOM_TRIALS,
            multivariate=True,
            constant_liar=True,
        )
        trial = self._study.ask()
        spec = draw_spec(trial, self._space, self._specs)
        settings = draw_settings(trial, self._space, self._mechanism)
        # Written last, so that a trial that has it is whole.
        configuration = {"options": dict(spec.options), "settings": asdict(settings)}
        trial.set_user_attr(_CONFIGURATION, configuration)
        return Proposal(trial.number, spec, settings)

    def _read(self, trial: FrozenTrial) -> Proposal:
        stored = trial.user_attrs[_CONFIGURATION]
        spec = mechanism_spec(self._mechanism, stored["options"])
        return Proposal(trial.number, spec, TrainingSettings(**stored["settings"]))

    def _trials(self, states: Sequence[TrialState]) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False, states=tuple(states))

    def _claim(self, subject: Mapping[str, str], storage: Path) -> None:
        stored = self._study.user_attrs.get(_SUBJECT)
        if stored is None:
            self._study.set_user_attr(_SUBJECT, dict(subject))
            return
        different = [name for name in subject if stored.get(name) != subject[name]]
        if different:
            raise SidelightError(
                f"{storage} holds a search of '{self._mechanism}' with another "
                f"{' and another '.join(different)}, whose scores cannot be compared with new "
                "ones. Name another folder, or delete it."
            )

    def _resume(self) -> None:
        """Forgets what a kill left half drawn; the defaults come first."""
        for trial in self._trials(_UNFINISHED):
            if _CONFIGURATION not in trial.user_attrs:
                self._study.tell(trial.number, state=TrialState.FAIL)
        if not self._trials((*_FINISHED, *_UNFINISHED, TrialState.WAITING)):
            self._study.enqueue_trial(defaults(self._mechanism, self._space, self._specs))


def _opened(name: str, storage: Path) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage.parent.mkdir(parents=True, exist_ok=True)
    if storage.exists():
        # A write that the power failed in has no line end; optuna would go on in the same line.
        whole = storage.read_bytes().rfind(b"\n") + 1
        if whole < storage.stat().st_size:
            os.truncate(storage, whole)
    journal = JournalStorage(JournalFileBackend(str(storage)))
    return optuna.create_study(
        storage=journal, study_name=name, direction="maximize", load_if_exists=True
    )


GENERATION = 8


def search_settings(
    dataset: ProbeDataset,
    mechanism: str,
    *,
    trials: int,
    seed: int,
    storage: Path,
    folds: Folds = (),
    generation: int = GENERATION,
    on_generation: Callable[[tuple[Trial, ...]], None] = lambda _trials: None,
) -> Best:
    """The options and settings of a mechanism that do best on validation data.

    The first trial is the mechanism's defaults, the next are random, and then a tree-structured
    Parzen estimator proposes (Bergstra et al. 2011). A search that was killed goes on with what it
    had not trained, and ends as if it had not been killed.

    Args:
        study: Parameters are fitted to its training texts, scores are of its validation texts.
        mechanism: Its name.
        trials: How many in all, including those that the storage holds already.
        seed: Of proposals, initial parameters and the order of the data.
        storage: File that keeps the trials; several mechanisms may share it.
        folds: Of ``choose_folds``, for a study with all texts on both sides: each fold is judged by
            what the others taught, as ``fit`` judges so few texts. None: validation texts judge.
        generation: Trials that are proposed and trained together. More of them share each read,
            but they do not know each other's scores, and need more memory.
        on_generation: Called after each generation with all trials so far.

    Raises:
        SidelightError: Unknown mechanism, no option that fits this backbone, a storage of another
            search, or every training diverged.
    """
    proposals = Proposals(
        mechanism, _geometry(dataset), seed=seed, storage=storage, subject=_subject(dataset)
    )
    while (missing := trials - len(proposals.finished())) > 0:
        asked = proposals.ask(min(generation, missing))
        jobs = [Job(proposal.spec, seed, proposal.settings) for proposal in asked]
        for proposal, logits in zip(asked, _judge(jobs, dataset, folds), strict=True):
            proposals.tell(proposal, _score(dataset, logits))
        on_generation(proposals.finished())
    return proposals.best()


def _judge(jobs: Sequence[Job], dataset: ProbeDataset, folds: Folds) -> list[np.ndarray | None]:
    """The logits of the validation texts after each training; None where it diverged."""
    if folds:
        return judge_by_folds(jobs, dataset, folds)
    trained = train_mechanisms(
        jobs,
        task=dataset.task,
        training=dataset.training.training_set(),
        validation=dataset.validation.training_set(),
        device=dataset.backbone.device,
    )
    return [None if one is None else one.logits for one in trained]


def _score(dataset: ProbeDataset, logits: np.ndarray | None) -> float | None:
    if logits is None:
        return None
    return validation_score(dataset.task, logits, dataset.validation.labels)


def _geometry(dataset: ProbeDataset) -> Geometry:
    sizes = dataset.training.states.fingerprint
    return Geometry(sizes.layers, sizes.width, dataset.task.outputs)


def _subject(dataset: ProbeDataset) -> dict[str, str]:
    """What scores depend on; a cache's folder name covers backbone, reads and token ids."""
    splits: dict[str, Split] = {
        "training set": dataset.training,
        "validation set": dataset.validation,
    }
    return {
        name: f"{split.states.directory.name} {split.examples.content_hash}"
        for name, split in splits.items()
    }
