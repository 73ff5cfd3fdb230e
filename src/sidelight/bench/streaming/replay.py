"""Responses replayed token by token through the state that a server keeps of each."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sidelight.backbones import Backbone
from sidelight.bank import Bank, BankState
from sidelight.batching import by_length
from sidelight.probe import Probe
from sidelight.progress import progress
from sidelight.prompts import EncodedPrompt, Reads

# Responses differ in their number of tokens.
Scores = list[Float[np.ndarray, " _"]]


def running_scores(
    backbone: Backbone,
    probes: Sequence[Probe],
    prompts: Sequence[EncodedPrompt],
    *,
    device: torch.device,
) -> list[Scores]:
    """For each probe and response, the probability of the positive class after each token.

    One pass over each text gives what the probes need of its tokens. These are then merged into
    the state one by one, as while decoding.

    Args:
        backbone: The LLM.
        probes: Binary probes that read the response, with distinct names.
        prompts: Each with its response.
        device: Where hidden states are.
    """
    bank = Bank(probes, device=device)
    tap = bank.tap()
    lengths = [len(prompt) for prompt in prompts]
    found: list[dict[int, np.ndarray]] = [{} for _ in probes]
    with progress("Replaying", sum(lengths), unit="tokens") as shown:
        for batch in by_length(lengths):
            chosen = [prompts[i] for i in batch]
            with backbone.tapped(tap):
                backbone.run(chosen)
            logits = _running_logits(bank, *_responses(tap.projected(), chosen))
            for own, probe, values in zip(found, probes, logits, strict=True):
                for row, index in enumerate(batch):
                    own[index] = _probabilities(probe, values[row])
            shown.advance(sum(lengths[i] for i in batch))
    return [[own[i] for i in range(len(prompts))] for own in found]


def _responses(
    projected: Float[Tensor, "batch token layer column"], prompts: Sequence[EncodedPrompt]
) -> tuple[Float[Tensor, "batch step layer column"], Bool[Tensor, "batch step"]]:
    """The responses' tokens, each beginning at step 0, and which steps a response has."""
    masks = [prompt.mask(Reads("response")).to(projected.device) for prompt in prompts]
    # A batch is padded on the right, so a prompt's own tokens come first.
    tokens = [row[: len(m)][m] for row, m in zip(projected, masks, strict=True)]
    lengths = torch.tensor([len(own) for own in tokens], device=projected.device)
    steps = torch.arange(int(lengths.max()), device=projected.device)
    return pad_sequence(tokens, batch_first=True), steps < lengths[:, None]


def _running_logits(
    bank: Bank,
    tokens: Float[Tensor, "batch step layer column"],
    exists: Bool[Tensor, "batch step"],
) -> list[list[np.ndarray]]:
    """For each probe and row, the logits after each of the row's own steps, ``[step, output]``."""
    state: BankState | None = None
    steps: list[list[np.ndarray]] = []
    for step in range(tokens.shape[1]):
        masks = dict.fromkeys(bank.reads, exists[:, step : step + 1])
        one = bank.summarise(tokens[:, step : step + 1], masks)
        state = one if state is None else bank.merge(state, one)
        steps.append(bank.logits(state))
    lengths = exists.sum(1).tolist()
    by_probe = [np.stack(own, axis=1) for own in zip(*steps, strict=True)]  # [row, step, output]
    return [[rows[i, :length] for i, length in enumerate(lengths)] for rows in by_probe]


def _probabilities(
    probe: Probe, logits: Float[np.ndarray, "token 1"]
) -> Float[np.ndarray, " token"]:
    return probe.calibration.apply(logits)[:, 0]
