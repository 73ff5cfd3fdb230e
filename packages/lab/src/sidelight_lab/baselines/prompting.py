"""Prompting: ask the backbone, and predict the label whose name is the most likely answer.

Not single-pass: the question, label names and examples are not part of the served conversation, so
they need a separate forward pass.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float

from sidelight.engines.transformers.backbone import (
    TransformersBackbone,
    cache_prefix,
    run_with_prefix,
)
from sidelight.errors import SidelightError
from sidelight.models.conversation import EncodedPrompt, Message, shared_length
from sidelight.probes.ragged import BATCH_TOKENS, by_length
from sidelight.progress import progress
from sidelight.training.dataset import Split
from sidelight.training.preparing import ProbeDataset
from sidelight.types import Task
from sidelight_lab.baselines.base import Baseline, FittedBaseline

# Longer lists of names appear before the first text only.
_LISTED = 20


@dataclass(frozen=True)
class ZeroShot(Baseline):
    """Prompt with the question and the label names.

    Attributes:
        names: Name of each label in the prompt; None uses the names in the data, which mean nothing
            to the model if they are numbers.
        question: Question about the text.
        max_tokens: Maximum length of a prompt; the text in longer ones is truncated at the end.
        shots: Number of training texts included with their labels as earlier turns, in random order
            and balanced across labels.
        shot_characters: Maximum length of each of these texts, in characters; longer ones are
            truncated.
    """

    title: ClassVar[str] = "Zero-shot prompting"
    is_single_pass: ClassVar[bool] = False
    names: tuple[str, ...] | None = None
    question: str = "Which label describes the text?"
    max_tokens: int = 1024
    shots: int = 0
    shot_characters: int = 400

    def fit(self, dataset: ProbeDataset, *, seed: int) -> FittedBaseline:
        """Draw the examples; nothing is fitted."""
        backbone, names = dataset.reader, self.named(dataset.task)
        assert isinstance(backbone, TransformersBackbone)
        encoder, shots = backbone.encoder, self.examples(dataset, seed=seed)

        def encode(text: str) -> Sequence[int]:
            turns = self.turns(text, names, shots)
            if encoder.prompt_format == "raw":
                # The line break of an empty last turn separates the text from the answer.
                turns.append(Message("assistant", ""))
            limit = min(self.max_tokens, encoder.max_tokens)
            return encoder.encode_any_length(turns).shortened(limit).token_ids

        def logits(split: Split) -> Float[np.ndarray, "text output"]:
            answers = [
                backbone.tokenizer(name, add_special_tokens=False)["input_ids"] for name in names
            ]
            scores = score_answers(backbone, [encode(text) for text in split.texts], answers)
            if split.task.kind == "multiclass":
                return scores
            if split.task.kind == "binary":
                return scores[:, 1:] - scores[:, :1]
            # Log-odds of each label versus all others.
            alternatives = [np.delete(scores, label, 1) for label in range(scores.shape[1])]
            return scores - np.stack([np.logaddexp.reduce(each, 1) for each in alternatives], 1)

        return FittedBaseline(logits, parameters=0)

    def examples(self, dataset: ProbeDataset, *, seed: int) -> list[tuple[str, str]]:
        """Examples included before each text, as pairs of text and answer."""
        names = self.named(dataset.task)
        texts, labels = dataset.training.texts, dataset.training.labels
        return [
            (texts[row][: self.shot_characters], _answer(labels[row], names))
            for row in _balanced(labels, count=self.shots, seed=seed)
        ]

    def turns(
        self, text: str, names: Sequence[str], shots: Sequence[tuple[str, str]]
    ) -> list[Message]:
        """Conversation up to and including the question about a text."""
        turns: list[Message] = []
        for asked, answer in (*shots, (text, "")):
            listed = f"one of: {', '.join(names)}"
            if turns and len(names) > _LISTED:
                listed = "one of these labels"
            # The text comes last, so that truncating a long prompt never removes the question.
            question = f"{self.question} Answer with {listed}.\n\nText: {asked}"
            turns += [Message("user", question), Message("assistant", answer)]
        return turns[:-1]

    def named(self, task: Task) -> tuple[str, ...]:
        """Name of each label in the prompt."""
        chosen = task.labels if self.names is None else self.names
        if len(chosen) != len(task.labels):
            raise SidelightError(
                f"Got {len(chosen)} names for the prompt ({', '.join(chosen)}), but the task has "
                f"{len(task.labels)} labels: {', '.join(task.labels)}. Give one name per label, "
                "in the same order."
            )
        return chosen


@dataclass(frozen=True)
class FewShot(ZeroShot):
    """Prompt with the question, the label names and examples."""

    title: ClassVar[str] = "Few-shot prompting"
    max_tokens: int = 2048
    shots: int = 8


@torch.inference_mode()
def score_answers(
    backbone: TransformersBackbone,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
) -> Float[np.ndarray, "prompt answer"]:
    """Mean log-probability of each answer's tokens after each prompt.

    Args:
        backbone: Model to prompt.
        prompts: Token ids of each prompt, up to the start of the answer.
        answers: Token ids of each possible answer.
    """
    # Leave at least one token of each prompt after the shared prefix.
    shared = min(shared_length(prompts), min(map(len, prompts)) - 1)
    prefix = torch.tensor(prompts[0][:shared], dtype=torch.long, device=backbone.device)
    begun = cache_prefix(backbone.model, prefix)
    pairs = [*product(range(len(prompts)), range(len(answers)))]
    texts = [(*prompts[prompt], *answers[answer]) for prompt, answer in pairs]
    scores = np.empty((len(prompts), len(answers)))
    with progress("Prompting", len(texts), unit="answers") as advance:
        # Padding between the prefix and a text would shift the tokens within a sliding window.
        most = BATCH_TOKENS if backbone.can_share_prefixes else 1
        # Lengths include the prefix, because each row also holds its keys and values.
        for batch in by_length([*map(len, texts)], batch_tokens=most):
            # Pad on the left, so that all answers end at the same position.
            rests = [EncodedPrompt(texts[row][shared:], ()) for row in batch]
            token_ids, present = backbone.pad(rests, side="left")
            longest = max(len(answers[pairs[row][1]]) for row in batch)
            output = run_with_prefix(
                backbone.model,
                deepcopy(begun),
                token_ids,
                present,
                logits_to_keep=torch.arange(-longest - 1, 0, device=backbone.device),
            )
            chances = output.logits.float().log_softmax(-1)[:, :-1]
            chances = chances.gather(2, token_ids[:, -longest:, None])[:, :, 0].cpu().numpy()
            for row, of_text in zip(batch, chances, strict=True):
                scores[pairs[row]] = of_text[-len(answers[pairs[row][1]]) :].mean()
            advance(len(batch))
    return scores


def _balanced(labels: np.ndarray, *, count: int, seed: int) -> list[int]:
    """Rows of training texts, drawn without replacement from each label in turn."""
    random = np.random.default_rng(seed)
    order = random.permutation(len(labels))
    holds = labels.astype(bool) if labels.ndim > 1 else labels[:, None] == np.unique(labels)
    queues = [order[holds[order, label]].tolist() for label in range(holds.shape[1])]
    drawn: list[int] = []
    while len(drawn) < count and any(queues):
        for queue in queues:
            left = [row for row in queue if row not in drawn]
            drawn += left[:1]
            queue[:] = left[1:]
    return random.permutation(drawn[:count]).tolist()


def _answer(label: np.integer[Any] | np.ndarray, names: Sequence[str]) -> str:
    if label.ndim == 0:
        return names[int(label)]
    return ", ".join(names[index] for index in np.flatnonzero(label).tolist()) or "none"
