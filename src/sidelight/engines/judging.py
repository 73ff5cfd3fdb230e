"""The served probes at work: what they read in each forward pass, and their verdicts.

Probes that read the prompt alone and probes that read the response stand in two banks: the first
are done after prefill, so decode steps run the second only, or no tap at all.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sidelight.bank import Bank, BankState, BankTap
from sidelight.engines.base import Stopwatch
from sidelight.errors import VerdictError
from sidelight.probe import Probe, require_distinct_names
from sidelight.prompts import EncodedPrompt, Reads
from sidelight.types import Verdict


@dataclass(frozen=True)
class Judgement:
    """The outcome for one text.

    Attributes:
        verdicts: What the probes say.
        failed: Names of the probes that gave no verdict.
    """

    verdicts: tuple[Verdict, ...] = ()
    failed: tuple[str, ...] = ()

    def __add__(self, other: "Judgement") -> "Judgement":
        return Judgement(self.verdicts + other.verdicts, self.failed + other.failed)

    def of(self, names: Collection[str]) -> "Judgement":
        """What these probes say."""
        return Judgement(
            tuple(verdict for verdict in self.verdicts if verdict.probe in names),
            tuple(name for name in self.failed if name in names),
        )


class TimedTaps:
    """Several banks' taps as one tap whose time is counted.

    Args:
        taps: Each sees every hidden state.
        stopwatch: Counts the time that they take.
    """

    def __init__(self, taps: Sequence[BankTap], stopwatch: Stopwatch):
        self._taps = taps
        self._stopwatch = stopwatch

    def __call__(self, layer: int, hidden: Float[Tensor, "batch token width"]) -> None:
        """Shows the hidden state to each; keeps nothing."""
        with self._stopwatch.running():
            for tap in self._taps:
                tap(layer, hidden)


class Judges:
    """Some probes that are judged together; possibly none.

    Args:
        probes: Their names are distinct.
        device: Where hidden states are.
    """

    def __init__(self, probes: Sequence[Probe], *, device: torch.device):
        self._bank = Bank(probes, device=device) if probes else None
        self._device = device

    def taps(self) -> list[BankTap]:
        """What has to see the hidden states of a forward pass: one tap, or none without probes."""
        return [self._bank.tap()] if self._bank else []

    def read_prompts(self, taps: Sequence[BankTap], prompts: Sequence[EncodedPrompt]) -> BankState:
        """The state of each prompt after a pass over the prompts, padded on the left."""
        if self._bank is None:
            return BankState(())
        masks = {reads: self._mask(prompts, reads) for reads in self._bank.reads}
        return self._bank.summarise(taps[0].projected(), masks)

    def read_step(self, taps: Sequence[BankTap], state: BankState) -> BankState:
        """The state with one more token of each row's response."""
        if self._bank is None:
            return state
        projected = taps[0].projected()
        mask = torch.ones(projected.shape[:2], dtype=torch.bool, device=self._device)
        step = self._bank.summarise(projected, dict.fromkeys(self._bank.reads, mask))
        return self._bank.merge(state, step)

    def kept(self, state: BankState, rows: Sequence[int]) -> BankState:
        """The state of these rows only."""
        if self._bank is None or list(rows) == list(range(len(state.states[0].lengths))):
            return state
        states = state.split()
        return BankState.pack([states[row] for row in rows])

    def judge(self, state: BankState, rows: Sequence[int]) -> list[Judgement]:
        """The outcome for each of these rows."""
        if self._bank is None or not rows:
            return [Judgement() for _ in rows]
        by_probe = self._bank.logits(self.kept(state, rows))
        return [self._judge_one(logits) for logits in zip(*by_probe, strict=True)]

    def _judge_one(self, logits: Sequence[np.ndarray]) -> Judgement:
        assert self._bank is not None
        outcomes = map(_judge_probe, self._bank.probes, logits)
        return sum(outcomes, start=Judgement())

    def _mask(self, prompts: Sequence[EncodedPrompt], reads: Reads) -> Bool[Tensor, "batch token"]:
        longest = max(len(prompt) for prompt in prompts)
        mask = torch.zeros(len(prompts), longest, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            mask[row, longest - len(prompt) :] = prompt.mask(reads)
        return mask.to(self._device)


@dataclass(frozen=True, eq=False)
class Panel:
    """The probes that are loaded together. A request keeps its panel when others are loaded.

    Attributes:
        probes: All of them.
        early: Those that are done with the prompt.
        late: Those that read the response.
    """

    probes: tuple[Probe, ...]
    early: Judges
    late: Judges

    @classmethod
    def of(cls, probes: Sequence[Probe], *, device: torch.device) -> "Panel":
        """The probes, ready to judge.

        Raises:
            SidelightError: Two share a name.
        """
        require_distinct_names(probes)
        early = [probe for probe in probes if not probe.reads.includes_response]
        late = [probe for probe in probes if probe.reads.includes_response]
        return cls(tuple(probes), Judges(early, device=device), Judges(late, device=device))


def _judge_probe(probe: Probe, logits: np.ndarray) -> Judgement:
    try:
        return Judgement(verdicts=(probe.verdict(logits),))
    except VerdictError:
        return Judgement(failed=(probe.name,))
