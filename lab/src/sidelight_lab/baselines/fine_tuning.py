"""A classifier that runs a whole model: token ids in, logits out. Knows no text and no training.

Trains a classifier that runs a whole model, and keeps its best epoch.

Knows token ids and labels; which parameters are trained is for the caller to say (those that
require gradients).
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from sidelight.backbone import can_share, run_after, run_once
from sidelight.progress import progress
from sidelight.prompts import shared_unread
from sidelight.ragged import by_length
from sidelight.storage import replacing
from sidelight.training.dataset import Split
from sidelight.training.objective import make_loss, validation_score
from sidelight.types import Task
from sidelight_lab.baselines.linear import finite

Pooling = Literal["mean", "last"]


@dataclass(frozen=True, eq=False)
class Padded:
    """Some texts, padded on the right.

    Attributes:
        prefix: Tokens that all of them begin with; not repeated in the other attributes.
        token_ids: Any id where there is no token.
        present: Where there is a token.
        read: Which tokens the pooling looks at.
    """

    prefix: Int[Tensor, " prefix"]
    token_ids: Int[Tensor, "text token"]
    present: Bool[Tensor, "text token"]
    read: Bool[Tensor, "text token"]


@dataclass(frozen=True, eq=False)
class Sequences:
    """Texts as token ids.

    Attributes:
        prefix: Tokens that all texts begin with and the pooling does not look at, such as a chat
            template's system prompt: a causal model runs them once for a whole batch.
        token_ids: Of each text, after the prefix.
        read: For each text, which of its tokens the pooling looks at.
    """

    prefix: Int[Tensor, " prefix"]
    token_ids: tuple[Int[Tensor, " _"], ...]
    read: tuple[Bool[Tensor, " _"], ...]

    @staticmethod
    def of(split: Split) -> "Sequences":
        """The backbone's tokens; read are those that a probe would read."""
        shared = shared_unread(split.prompts, split.states.reads)
        read = tuple(prompt.mask(split.states.reads) for prompt in split.prompts)
        return Sequences(
            torch.tensor(split.prompts[0].token_ids[:shared], dtype=torch.long),
            tuple(torch.tensor(prompt.token_ids[shared:]) for prompt in split.prompts),
            tuple(mask[shared:] for mask in read),
        )

    @property
    def lengths(self) -> list[int]:
        """Tokens of each text after the prefix."""
        return [len(ids) for ids in self.token_ids]

    def padded(self, texts: Sequence[int], *, device: torch.device) -> Padded:
        """A batch of these texts."""
        ids = pad_sequence([self.token_ids[text] for text in texts], batch_first=True)
        present = [torch.ones_like(self.read[text]) for text in texts]
        return Padded(
            self.prefix.to(device),
            ids.to(device),
            pad_sequence(present, batch_first=True).to(device),
            pad_sequence([self.read[text] for text in texts], batch_first=True).to(device),
        )


class SequenceClassifier(nn.Module):
    """A linear head on the pooled last hidden states of a model.

    Args:
        body: A model of ``transformers`` without its language-model head.
        width: Of its hidden states.
        outputs: Logits.
        pooling: ``mean`` of the tokens that are read, or the ``last`` of them.
        adapters: Parameters that hooks on ``body`` use, for the optimiser to find.
    """

    def __init__(
        self,
        body: Any,
        *,
        width: int,
        outputs: int,
        pooling: Pooling = "mean",
        adapters: nn.Module | None = None,
    ):
        super().__init__()
        self.body = body
        self.adapters = adapters
        self.head = nn.Linear(width, outputs)
        self._pool = {"mean": _means, "last": _lasts}[pooling]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head.weight.device

    def forward(self, batch: Padded) -> Float[Tensor, "text output"]:
        """The logits, in float32; the body runs in bf16 whatever its weights are stored in."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            hidden = self._hidden(batch)
        return self.head(self._pool(hidden.float(), batch.read))

    def _hidden(self, batch: Padded) -> Float[Tensor, "text token width"]:
        skipped = len(batch.prefix)
        if skipped and can_share(self.body):
            begun = run_once(self.body, batch.prefix)
            return run_after(self.body, begun, batch.token_ids, batch.present).last_hidden_state
        prefix = batch.prefix.expand(len(batch.token_ids), -1)
        output = self.body(
            input_ids=torch.cat([prefix, batch.token_ids], 1),
            attention_mask=torch.cat([torch.ones_like(prefix), batch.present.long()], 1),
        )
        return output.last_hidden_state[:, skipped:]


@torch.inference_mode()
def score_sequences(
    model: SequenceClassifier, sequences: Sequences, *, title: str
) -> Float[np.ndarray, "text output"]:
    """The logits of all texts, in their order."""
    model.eval()
    lengths = sequences.lengths
    logits = np.empty((len(lengths), model.head.out_features), dtype=np.float32)
    with progress(title, sum(lengths), unit="tokens") as shown:
        for texts in by_length(lengths):
            logits[texts] = model(sequences.padded(texts, device=model.device)).cpu().numpy()
            shown.advance(sum(lengths[text] for text in texts))
    return logits


def _means(
    hidden: Float[Tensor, "text token width"], read: Bool[Tensor, "text token"]
) -> Float[Tensor, "text width"]:
    weight = read.float() / read.sum(1, keepdim=True)
    return (hidden * weight[:, :, None]).sum(1)


def _lasts(
    hidden: Float[Tensor, "text token width"], read: Bool[Tensor, "text token"]
) -> Float[Tensor, "text width"]:
    positions = torch.arange(read.shape[1], device=read.device)
    last = torch.where(read, positions, -1).amax(1)
    return hidden[torch.arange(len(hidden), device=read.device), last]


# Padded tokens of one forward and backward pass: what is kept for the backward pass is large.
_PASS_TOKENS = 2048
# Texts are sorted by length within as many batches, so that a batch has little padding.
_BATCHES_SORTED = 16


@dataclass(frozen=True)
class FineTuning:
    """Optimisation by AdamW: linear warm-up, then a cosine to zero.

    Attributes:
        learning_rate: At the end of the warm-up.
        weight_decay: Decoupled; not on biases and norms.
        epochs: Passes over the data; the one with the best validation score is kept.
        batch_size: Texts per step, of similar length.
        warm_up: Share of the steps.
        clip: Largest norm of the gradient.
    """

    learning_rate: float
    weight_decay: float = 0.01
    epochs: int = 3
    batch_size: int = 32
    warm_up: float = 0.06
    clip: float = 1.0


@dataclass(frozen=True, eq=False)
class Labelled:
    """Token ids and labels of one split.

    Attributes:
        sequences: The texts.
        labels: As in ``Examples.labels``.
    """

    sequences: Sequences
    labels: np.ndarray


@dataclass(frozen=True, eq=False)
class FineTuneTask:
    """What a classifier is to learn, and from what.

    Attributes:
        task: The classes.
        training: What the parameters are fitted to.
        validation: What the epoch is chosen on.
        settings: Of the optimisation.
        seed: Of dropout and the order of the texts.
        title: Of progress bars.
    """

    task: Task
    training: Labelled
    validation: Labelled
    settings: FineTuning
    seed: int
    title: str

    def key(self, *also: object) -> str:
        """A checkpoint's name: it covers data, settings, this package's version and ``also``."""
        settings = (version("sidelight"), self.task, self.settings, self.seed, also)
        digest = hashlib.sha256(repr(settings).encode())
        for part in (self.training, self.validation):
            digest.update(part.sequences.prefix.numpy().tobytes())
            digest.update(np.ascontiguousarray(part.labels).tobytes())
            for ids in part.sequences.token_ids:
                digest.update(ids.numpy().tobytes() + b"|")
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Tuned:
    """How a fine-tuning went.

    Attributes:
        history: The validation score of each epoch.
        seconds_before: Of the epochs that a checkpoint held.
    """

    history: tuple[float, ...]
    seconds_before: float


def fine_tune(
    model: SequenceClassifier, lesson: FineTuneTask, *, checkpoint: Path | None = None
) -> Tuned:
    """Trains the parameters that require gradients; the model ends with its best epoch's.

    Args:
        model: What is trained, in place.
        lesson: What to learn.
        checkpoint: A file that is written after each epoch, and gone on from if it is there; in the
            end it holds what was learnt.

    Raises:
        SidelightError: The logits are not finite any more.
    """
    with torch.random.fork_rng():
        run = _Run(model, lesson)
        if checkpoint is not None and checkpoint.exists():
            run.load(checkpoint)
        while len(run.progress.history) < lesson.settings.epochs:
            run.train_epoch()
            run.end_epoch()
            if checkpoint is not None:
                run.save(checkpoint)
    run.restore_best()
    return Tuned(tuple(run.progress.history), run.seconds_before)


@dataclass
class _Progress:
    best: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    history: list[float] = field(default_factory=list[float])


class _Run:
    def __init__(self, model: SequenceClassifier, lesson: FineTuneTask):
        self._model = model
        self._lesson = lesson
        self._labels = torch.from_numpy(lesson.training.labels)
        self._loss = make_loss(lesson.task, self._labels, balanced=False)
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._optimizer = _optimizer(list(self._trained.values()), lesson.settings)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, self._rate)
        self.progress = _Progress()
        self.seconds_before = 0.0
        self._start = perf_counter()

    def _rate(self, step: int) -> float:
        """The learning rate's factor at a step."""
        settings = self._lesson.settings
        total = settings.epochs * math.ceil(len(self._labels) / settings.batch_size)
        warm = max(1, round(settings.warm_up * total))
        if step < warm:
            return (step + 1) / (warm + 1)
        return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (step - warm) / max(1, total - warm)))

    def train_epoch(self) -> None:
        lesson = self._lesson
        epoch = len(self.progress.history)
        # Its own seed per epoch: one that goes on from a checkpoint is the same as one that ran on.
        torch.manual_seed(lesson.seed * 7919 + epoch)
        self._model.train()
        lengths = lesson.training.sequences.lengths
        title = f"{lesson.title}, epoch {epoch + 1} of {lesson.settings.epochs}"
        with progress(title, sum(lengths), unit="tokens") as shown:
            for batch in _batches(lengths, size=lesson.settings.batch_size):
                self._step(batch)
                shown.advance(sum(lengths[text] for text in batch))

    def _step(self, batch: Sequence[int]) -> None:
        sequences = self._lesson.training.sequences
        lengths = [len(sequences.token_ids[text]) for text in batch]
        for group in by_length(lengths, batch_tokens=_PASS_TOKENS):
            texts = [batch[index] for index in group]
            logits = self._model(sequences.padded(texts, device=self._model.device))
            loss = self._loss(logits, self._labels[texts].to(logits.device))
            (loss * (len(texts) / len(batch))).backward()
        torch.nn.utils.clip_grad_norm_(self._trained.values(), self._lesson.settings.clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._schedule.step()

    def end_epoch(self) -> None:
        """Scores the validation texts; keeps the parameters if they are the best so far."""
        lesson, history = self._lesson, self.progress.history
        title = f"{lesson.title}, validation"
        logits = score_sequences(self._model, lesson.validation.sequences, title=title)
        checked = finite(logits, learning_rate=lesson.settings.learning_rate)
        history.append(validation_score(lesson.task, checked, lesson.validation.labels))
        if history.index(max(history)) == len(history) - 1:
            self.progress.best = {name: p.detach().clone() for name, p in self._trained.items()}

    @torch.no_grad()
    def restore_best(self) -> None:
        for name, parameter in self._trained.items():
            parameter.copy_(self.progress.best[name])
        self._model.eval().requires_grad_(False)

    def save(self, path: Path) -> None:
        """Tensors by name, and the rest as JSON in the file's header: nothing is pickled."""
        tensors = _prefixed("best", self.progress.best)
        seconds = self.seconds_before + perf_counter() - self._start
        told: dict[str, Any] = {"history": self.progress.history, "seconds": seconds}
        if len(self.progress.history) < self._lesson.settings.epochs:
            optimizer = self._optimizer.state_dict()
            tensors |= _prefixed("trained", {name: p.detach() for name, p in self._trained.items()})
            for index, moments in optimizer["state"].items():
                tensors |= _prefixed(f"moments.{index}", moments)
            told |= {"groups": optimizer["param_groups"], "steps": self._schedule.last_epoch}
        with replacing(path) as partial:
            save_file(tensors, partial, {"told": json.dumps(told)})

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """What ``save`` stored."""
        with safe_open(path, "pt", device=str(self._model.device)) as file:
            told = json.loads(file.metadata()["told"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.progress = _Progress(_with_prefix("best", tensors), told["history"])
        self.seconds_before = told["seconds"]
        if "groups" not in told:
            return
        for name, parameter in self._trained.items():
            parameter.copy_(tensors[f"trained.{name}"])
        count = sum(len(group["params"]) for group in told["groups"])
        moments = {index: _with_prefix(f"moments.{index}", tensors) for index in range(count)}
        self._optimizer.load_state_dict({"state": moments, "param_groups": told["groups"]})
        self._schedule.last_epoch = told["steps"]


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor.contiguous() for name, tensor in tensors.items()}


def _with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    start = f"{prefix}."
    return {name[len(start) :]: own for name, own in tensors.items() if name.startswith(start)}


def _optimizer(parameters: Sequence[Tensor], settings: FineTuning) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate)


def _batches(lengths: Sequence[int], *, size: int) -> Iterator[list[int]]:
    """Random groups of texts of similar length, in random order."""
    order = torch.randperm(len(lengths)).tolist()
    stretch = size * _BATCHES_SORTED
    ordered = [
        text
        for start in range(0, len(order), stretch)
        for text in sorted(order[start : start + stretch], key=lengths.__getitem__)
    ]
    batches = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    for index in torch.randperm(len(batches)).tolist():
        yield batches[index]
