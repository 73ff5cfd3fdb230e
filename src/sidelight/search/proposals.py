"""What to try next, by optuna, and its memory on disk. Knows parameters and scores, not training.

Each proposal is drawn with a seed of its own, from the trials before it: a search that goes on
after a kill proposes what it would have proposed, and not its first random trials again.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import optuna
from optuna.importance import get_param_importances
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from sidelight.errors import SidelightError
from sidelight.mechanisms import Geometry, MechanismSpec, mechanism_spec
from sidelight.search.drawing import defaults, draw_settings, draw_spec
from sidelight.search.space import possible_specs, space_of
from sidelight.search.trials import Best, Trial, best_of
from sidelight.training import TrainingSettings

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
