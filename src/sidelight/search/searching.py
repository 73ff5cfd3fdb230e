"""Searches a mechanism's settings: proposes a generation, trains it, learns from its scores.

A generation is trained in one call, so that each shard that is read updates all of its trials.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from sidelight.fitting.cross_fitting import Folds, judge_by_folds
from sidelight.mechanisms import Geometry
from sidelight.search.proposals import Proposals
from sidelight.search.trials import Best, Trial
from sidelight.study import Split, Study
from sidelight.training import Job, train_mechanisms, validation_score

GENERATION = 8


def search_settings(
    study: Study,
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
        mechanism, _geometry(study), seed=seed, storage=storage, subject=_subject(study)
    )
    while (missing := trials - len(proposals.finished())) > 0:
        asked = proposals.ask(min(generation, missing))
        jobs = [Job(proposal.spec, seed, proposal.settings) for proposal in asked]
        for proposal, logits in zip(asked, _judge(jobs, study, folds), strict=True):
            proposals.tell(proposal, _score(study, logits))
        on_generation(proposals.finished())
    return proposals.best()


def _judge(jobs: Sequence[Job], study: Study, folds: Folds) -> list[np.ndarray | None]:
    """The logits of the validation texts after each training; None where it diverged."""
    if folds:
        return judge_by_folds(jobs, study, folds)
    trained = train_mechanisms(
        jobs,
        task=study.task,
        training=study.training.training_set(),
        validation=study.validation.training_set(),
        device=study.backbone.device,
    )
    return [None if one is None else one.logits for one in trained]


def _score(study: Study, logits: np.ndarray | None) -> float | None:
    if logits is None:
        return None
    return validation_score(study.task, logits, study.validation.labels)


def _geometry(study: Study) -> Geometry:
    sizes = study.training.states.fingerprint
    return Geometry(sizes.layers, sizes.width, study.task.outputs)


def _subject(study: Study) -> dict[str, str]:
    """What scores depend on; a cache's folder name covers backbone, reads and token ids."""
    splits: dict[str, Split] = {"training set": study.training, "validation set": study.validation}
    return {
        name: f"{split.states.directory.name} {split.examples.content_hash}"
        for name, split in splits.items()
    }
