"""Asks the backbone itself: the label whose name is the likeliest answer.

Not single-pass: the question, the label names and the shots are not part of the conversation that
is served, so they need a forward pass of their own.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache

from sidelight.backbone import TransformersBackbone, cache_name, run_after, run_once
from sidelight.errors import SidelightError
from sidelight.progress import progress
from sidelight.prompts import EncodedPrompt, Message, shared_length
from sidelight.ragged import BATCH_TOKENS, by_length
from sidelight.training.dataset import ProbeDataset, Split
from sidelight.types import Task
from sidelight_lab.baselines.base import Baseline, FittedBaseline

_QUESTION = "Which label describes the text?"
# More names than these are listed before the first text only.
_LISTED = 20


@dataclass(frozen=True)
class ZeroShot(Baseline):
    """The question and the label names, no examples.

    Attributes:
        names: What each label is called in the prompt; None takes the data's own names, which say
            nothing where they are numbers.
        question: What is asked of the text.
        max_tokens: Longer prompts lose the end of their text.
    """

    title: ClassVar[str] = "Zero-shot prompting"
    is_single_pass: ClassVar[bool] = False
    names: tuple[str, ...] | None = None
    question: str = _QUESTION
    max_tokens: int = 1024

    def fit(self, dataset: ProbeDataset, *, seed: int) -> FittedBaseline:
        """Fits nothing."""
        names = _names(self.names, dataset.task)
        asking = _Asking(self.question, names)
        return _Prompted(0, dataset.backbone, dataset.task, asking, self.max_tokens)


@dataclass(frozen=True)
class FewShot(Baseline):
    """Training texts and their labels as earlier turns of the conversation.

    Attributes:
        shots: Examples in all, as many of each label as can be, in random order.
        names: As in ``ZeroShot``.
        question: As in ``ZeroShot``.
        max_tokens: As in ``ZeroShot``.
        shot_characters: Of each example at most; the rest is cut.
    """

    title: ClassVar[str] = "Few-shot prompting"
    is_single_pass: ClassVar[bool] = False
    shots: int = 8
    names: tuple[str, ...] | None = None
    question: str = _QUESTION
    max_tokens: int = 2048
    shot_characters: int = 400

    def fit(self, dataset: ProbeDataset, *, seed: int) -> FittedBaseline:
        """Draws the examples."""
        names = _names(self.names, dataset.task)
        texts, labels = dataset.training.texts, dataset.training.labels
        chosen = _balanced(labels, count=self.shots, seed=seed)
        shots = [
            (texts[row][: self.shot_characters], _answer(labels[row], names)) for row in chosen
        ]
        asking = _Asking(self.question, names, tuple(shots))
        return _Prompted(0, dataset.backbone, dataset.task, asking, self.max_tokens)


@dataclass(frozen=True)
class _Asking:
    """How a text is put to the model.

    Attributes:
        question: Asked before every text.
        names: The answers to choose from.
        shots: Texts and their answers.
    """

    question: str
    names: tuple[str, ...]
    shots: tuple[tuple[str, str], ...] = field(default=())

    def turns(self, text: str) -> list[Message]:
        texts = [*(shot for shot, _ in self.shots), text]
        asked = [self._ask(own, is_first=place == 0) for place, own in enumerate(texts)]
        earlier = [
            turn
            for ask, (_, answer) in zip(asked, self.shots, strict=False)
            for turn in (Message("user", ask), Message("assistant", answer))
        ]
        return [*earlier, Message("user", asked[-1])]

    def _ask(self, text: str, *, is_first: bool) -> str:
        # The text comes last: what is cut from a long prompt is then never the question.
        lists = is_first or len(self.names) <= _LISTED
        names = f"one of: {', '.join(self.names)}" if lists else "one of these labels"
        return f"{self.question} Answer with {names}.\n\nText: {text}"


@dataclass(frozen=True)
class _Prompted(FittedBaseline):
    backbone: TransformersBackbone
    task: Task
    asking: _Asking
    max_tokens: int

    def logits(self, split: Split) -> Float[np.ndarray, "text output"]:
        encode = self.backbone.tokenizer
        answers = [
            encode(name, add_special_tokens=False)["input_ids"] for name in self.asking.names
        ]
        prompts = [self._encode(text) for text in split.texts]
        scores = score_answers(self.backbone, [prompt.token_ids for prompt in prompts], answers)
        return _as_logits(scores, self.task)

    def _encode(self, text: str) -> EncodedPrompt:
        encoder = self.backbone.encoder
        turns = self.asking.turns(text)
        if encoder.prompt_format == "raw":
            # An empty last turn: its line break separates the text from the answer.
            turns.append(Message("assistant", ""))
        limit = min(self.max_tokens, encoder.max_tokens)
        return encoder.encode_any_length(turns).shortened(limit)


@torch.inference_mode()
def score_answers(
    backbone: TransformersBackbone,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
) -> Float[np.ndarray, "prompt answer"]:
    """The mean log-probability of each answer's tokens after each prompt.

    Args:
        backbone: What answers.
        prompts: Token ids, up to where the answer begins.
        answers: Token ids of each possible answer.
    """
    # One token at least is left after what all share.
    shared = min(shared_length(prompts), min(map(len, prompts)) - 1)
    prefix = torch.tensor(prompts[0][:shared], dtype=torch.long, device=backbone.device)
    begun = run_once(backbone.model, prefix)
    rests = [prompt[shared:] for prompt in prompts]
    scores = np.empty((len(prompts), len(answers)))
    with progress("Prompting", sum(map(len, rests)), unit="tokens") as shown:
        # Padding between the prefix and a text would shift what a sliding window sees.
        most = BATCH_TOKENS if backbone.can_share_prefixes else 1
        # The whole lengths: a row has keys and values of the prefix too.
        for batch in by_length([len(prompt) for prompt in prompts], batch_tokens=most):
            token_ids, present = _left_padded([rests[row] for row in batch])
            found = _score_batch(
                backbone,
                deepcopy(begun),
                token_ids.to(backbone.device),
                present.to(backbone.device),
                answers,
            )
            scores[batch] = found.cpu().numpy()
            shown.advance(sum(len(rests[row]) for row in batch))
    return scores


def _score_batch(
    backbone: TransformersBackbone,
    cache: DynamicCache,
    token_ids: Int[Tensor, "text token"],
    present: Bool[Tensor, "text token"],
    answers: Sequence[Sequence[int]],
) -> Float[Tensor, "text answer"]:
    """The prompts' keys and values are computed once, and each answer is run after them.

    Args:
        backbone: What answers.
        cache: Of what all prompts begin with; it is used up.
        token_ids: The rest of each prompt, padded on the left.
        present: Where there is a token.
        answers: Token ids of each possible answer.
    """
    model = backbone.model
    shared = cache.get_seq_length()
    last = backbone.last_position
    output = run_after(model, cache, token_ids, present, logits_to_keep=last)
    first = output.logits[:, -1].float().log_softmax(-1)
    held = cache.get_seq_length()
    before = torch.cat([present.new_ones(len(present), shared), present], 1)
    scores: list[Tensor] = []
    for answer in answers:
        total = first[:, answer[0]]
        if len(answer) > 1:
            fed = torch.tensor(answer[:-1], device=present.device).expand(len(present), -1)
            mask = torch.cat([before, torch.ones_like(fed, dtype=torch.bool)], 1)
            later = model(
                input_ids=fed,
                attention_mask=mask.long(),
                position_ids=(mask.cumsum(1) - 1)[:, held:],
                use_cache=True,
                **{cache_name(model): cache},
            ).logits
            cache.crop(-fed.shape[1])
            wanted = torch.tensor(answer[1:], device=present.device).expand(len(present), -1)
            chosen = later.float().log_softmax(-1).gather(2, wanted[:, :, None])
            total = total + chosen.sum((1, 2))
        scores.append(total / len(answer))
    return torch.stack(scores, 1)


def _left_padded(
    rows: Sequence[Sequence[int]],
) -> tuple[Int[Tensor, "text token"], Bool[Tensor, "text token"]]:
    """On the left, so that every row's answer begins at the same place."""
    longest = max(map(len, rows))
    token_ids = torch.zeros(len(rows), longest, dtype=torch.long)
    present = torch.zeros(len(rows), longest, dtype=torch.bool)
    for index, row in enumerate(rows):
        token_ids[index, longest - len(row) :] = torch.tensor(row)
        present[index, longest - len(row) :] = True
    return token_ids, present


def _as_logits(scores: np.ndarray, task: Task) -> Float[np.ndarray, "text output"]:
    """Log-odds among the answers, except multi-class, where the scores are logits already."""
    if task.kind == "multiclass":
        return scores
    if task.kind == "binary":
        return scores[:, 1:] - scores[:, :1]
    others = [np.delete(scores, label, 1) for label in range(scores.shape[1])]
    return scores - np.stack([np.logaddexp.reduce(each, 1) for each in others], 1)


def _names(names: tuple[str, ...] | None, task: Task) -> tuple[str, ...]:
    chosen = task.labels if names is None else names
    if len(chosen) != len(task.labels):
        raise SidelightError(
            f"Got {len(chosen)} names for the prompt ({', '.join(chosen)}), but the task has "
            f"{len(task.labels)} labels: {', '.join(task.labels)}. Give each a name, in order."
        )
    return chosen


def _balanced(labels: np.ndarray, *, count: int, seed: int) -> list[int]:
    """Rows of training texts: labels in turn, each time one that has not been drawn."""
    random = np.random.default_rng(seed)
    order = random.permutation(len(labels))
    classes = labels.shape[1] if labels.ndim > 1 else int(labels.max()) + 1
    holds = labels.astype(bool) if labels.ndim > 1 else np.eye(classes, dtype=bool)[labels]
    queues = [[row for row in order if holds[row, label]] for label in range(classes)]
    drawn: list[int] = []
    while len(drawn) < count and any(queues):
        for queue in queues:
            fresh = next((row for row in queue if row not in drawn), None)
            queue[:] = [] if fresh is None else [row for row in queue if row != fresh]
            if fresh is not None and len(drawn) < count:
                drawn.append(int(fresh))
    return [drawn[index] for index in random.permutation(len(drawn))]


def _answer(label: np.integer[Any] | np.ndarray, names: Sequence[str]) -> str:
    if label.ndim == 0:
        return names[int(label)]
    return ", ".join(names[index] for index in np.flatnonzero(label).tolist()) or "none"
