"""Many probes on one backbone, served by one thin matmul per layer.

The probes' projections are concatenated, so 50 probes run as many matmuls as one. Probes that do
the same to their columns do it in one call. ``Bank`` summarises and judges; ``Panel`` decides which
probes are judged when. Neither holds a request: states are values that the caller keeps, splits,
packs and merges.
"""

import time
from collections.abc import Collection, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sidelight.errors import SidelightError, VerdictError
from sidelight.models.conversation import (
    EncodedPrompt,
    Reads,
    Unit,
    judged_units,
    read_tokens,
    tool_rows,
)
from sidelight.probes.card import require_distinct_names
from sidelight.probes.explanation import Explanation, explain
from sidelight.probes.probe import Probe, ProbeOutput
from sidelight.probes.ragged import Ragged
from sidelight.probes.standardisation import Projection
from sidelight.types import Judgement, TokenLabel, Verdict

NUMBERS_AT_ONCE = 2**21
"""Most numbers that are summarised in one call; more would not fit a processor's cache."""


@dataclass(frozen=True)
class BankState:
    """The state of all probes for one or more requests, so far.

    Attributes:
        states: One for each group of probes, with a segment for each request.
    """

    states: tuple[Ragged, ...]

    def split(self) -> list["BankState"]:
        """Each request by itself."""
        return [BankState(parts) for parts in zip(*(s.split() for s in self.states), strict=True)]

    @staticmethod
    def pack(parts: Sequence["BankState"]) -> "BankState":
        """The requests of all parts, in order."""
        columns = zip(*(part.states for part in parts), strict=True)
        return BankState(tuple(Ragged.pack(column) for column in columns))


class BankTap:
    """Projects each hidden state while it exists and keeps only the columns.

    Attributes:
        depth: How many layers it needs, from the embedding up; it ignores those above.
        seconds: Time that it took of the passes; on a GPU, the time to launch its work.
    """

    def __init__(self, projection: Projection):
        self.seconds = 0.0
        self.depth = projection.depth
        self._projection = projection
        self._passes: list[dict[int, Float[Tensor, "batch token column"]]] = []

    def __call__(self, layer: int, hidden: Float[Tensor, "batch token width"]) -> None:
        """One matmul, in float32: in bf16, what standardisation subtracts would be lost."""
        begin = time.perf_counter()
        if layer == 0:
            self._passes.append({})
        if layer < self.depth:
            columns = self._projection.layer(layer, hidden.flatten(0, 1).float())
            self._passes[-1][layer] = columns.unflatten(0, hidden.shape[:2])
        self.seconds += time.perf_counter() - begin

    def projected(self) -> Float[Tensor, "batch token layer column"]:
        """The columns of all passes since the last call, joined along the tokens.

        Each pass goes on with the same texts. A layer that should have been read and was not has
        NaN, hence no verdict.
        """
        projected = torch.cat([self._stacked(columns) for columns in self._passes], 1)
        self._passes.clear()
        return projected

    def _stacked(
        self, columns: Mapping[int, Float[Tensor, "batch token column"]]
    ) -> Float[Tensor, "batch token layer column"]:
        missing, above = (torch.full_like(columns[0], value) for value in (torch.nan, 0.0))
        layers = range(len(self._projection.weight))
        read = (columns.get(layer, missing) if layer < self.depth else above for layer in layers)
        return torch.stack([*read], 2)


class _ProbeGroup:
    """Probes with equal ``summary_kind``, ``reads`` and number of columns, or a single probe.

    They are summarised together: their columns are stacked as extra layers, in pieces that fit a
    processor's cache.

    Args:
        indices: The probes' indices in their bank.
        probes: The probes.
    """

    def __init__(self, indices: Sequence[int], probes: Sequence[Probe]):
        self.indices = tuple(indices)
        self.reads = probes[0].reads
        self.mechanisms = [probe.mechanism for probe in probes]

    def summarise(self, columns: Float[Tensor, "row layer column"], lengths: Tensor) -> Ragged:
        """The state of each segment, from the probes' columns side by side."""
        if len(self.indices) == 1:
            return self.mechanisms[0].summarise(Ragged(columns, lengths))
        side_by_side = columns.unflatten(2, (len(self.indices), -1)).flatten(1, 2)
        numbers_per_layer = columns.numel() // side_by_side.shape[1]
        layers_at_once = max(1, NUMBERS_AT_ONCE // max(1, numbers_per_layer))
        states = [
            self.mechanisms[0].summarise(Ragged(piece, lengths)).values
            for piece in side_by_side.split(layers_at_once, 1)
        ]
        return Ragged.one_row_each(torch.cat(states, 1))

    def logits(self, state: Ragged) -> list[Float[Tensor, "segment output"]]:
        """The logits of each probe of the group."""
        members = len(self.indices)
        if members == 1:
            return [self.mechanisms[0].finish(state)]
        parts = state.values.unflatten(1, (-1, members)).unbind(2)
        return [
            mechanism.finish(Ragged(values, state.lengths))
            for mechanism, values in zip(self.mechanisms, parts, strict=True)
        ]


class Bank:
    """The probes that are served together.

    Args:
        probes: Probes of one backbone, with distinct names.
        device: Where the backbone's hidden states are.

    Attributes:
        projection: What a tap computes, for engines that project hidden states themselves.

    Raises:
        SidelightError: No probe, or two of the same name.
    """

    def __init__(self, probes: Sequence[Probe], *, device: torch.device | str = "cpu"):
        if not probes:
            raise SidelightError("A bank needs one or more probes, got none. Name one.")
        require_distinct_names([probe.name for probe in probes])
        self.probes = tuple(probes)
        for probe in probes:
            probe.mechanism.to(device).eval()
        projections = [probe.projection() for probe in probes]
        widths = [projection.weight.shape[2] for projection in projections]
        self._groups = _groups(probes, widths)
        self._widths = [sum(widths[index] for index in group.indices) for group in self._groups]
        # The columns are laid out group by group.
        in_order = [index for group in self._groups for index in group.indices]
        ends = accumulate(widths[index] for index in in_order)
        self._columns = {
            probes[index].name: slice(end - widths[index], end)
            for index, end in zip(in_order, ends, strict=True)
        }
        self.projection = Projection.joined([projections[i] for i in in_order]).to(device)

    @property
    def reads(self) -> frozenset[Reads]:
        """The tokens that the probes read; some may read alike."""
        return frozenset(group.reads for group in self._groups)

    def tap(self) -> BankTap:
        """A tap for ``Backbone.tapped``."""
        return BankTap(self.projection)

    def columns_of(
        self, probe: str, columns: Float[Tensor, "token layer column"]
    ) -> Float[Tensor, "token layer probe_column"]:
        """A probe's own columns, among those of all."""
        return columns[..., self._columns[probe]]

    @torch.inference_mode()
    def summarise(
        self, columns: Float[Tensor, "token layer column"], parts: Sequence[bytes]
    ) -> BankState:
        """The state of each text; arguments as for ``prompt_logits``."""
        device = columns.device
        masks, lengths = dict[Reads, Tensor](), dict[Reads, Tensor]()
        for reads in self.reads:
            is_read = [read_tokens(own, reads) for own in parts]
            masks[reads] = torch.from_numpy(np.concatenate(is_read)).to(device)
            lengths[reads] = torch.tensor([int(own.sum()) for own in is_read], device=device)
        states = [
            group.summarise(part[masks[group.reads]], lengths[group.reads])
            for group, part in zip(self._groups, columns.split(self._widths, -1), strict=True)
        ]
        return BankState(tuple(states))

    @torch.inference_mode()
    def merge(self, left: BankState, right: BankState) -> BankState:
        """The state of each request after both its runs of tokens."""
        pairs = zip(self._groups, left.states, right.states, strict=True)
        return BankState(tuple(group.mechanisms[0].merge(a, b) for group, a, b in pairs))

    @torch.inference_mode()
    def logits(self, state: BankState) -> list[np.ndarray]:
        """For each probe ``[request, output]``, float64."""
        by_index: dict[int, np.ndarray] = {}
        for group, part in zip(self._groups, state.states, strict=True):
            logits = (each.cpu().double().numpy() for each in group.logits(part))
            by_index.update(zip(group.indices, logits, strict=True))
        return [by_index[index] for index in range(len(by_index))]

    @torch.inference_mode()
    def text_logits(self, state: BankState) -> list[list[ProbeOutput]]:
        """For each probe, its logits of each request, and of its tokens where it labels them."""
        by_probe = [[ProbeOutput(logits) for logits in of_probe] for of_probe in self.logits(state)]
        for group, part in zip(self._groups, state.states, strict=True):
            if (labelled := group.mechanisms[0].token_logits(part)) is not None:
                (index,) = group.indices
                tokens = (each.values.cpu().double().numpy() for each in labelled.split())
                pairs = zip(by_probe[index], tokens, strict=True)
                by_probe[index] = [replace(logits, tokens=own) for logits, own in pairs]
        return by_probe

    def judge(
        self, outputs: Sequence[Sequence[ProbeOutput]], is_plain: Sequence[bool]
    ) -> list[Judgement]:
        """For each text, what the probes say; those without a verdict are named as failed.

        Args:
            outputs: For each probe, its logits of each text.
            is_plain: For each text, whether it is plain text, on which probes of chats fail.
        """
        by_text = zip(*outputs, strict=True)
        return [self._judgement(*each) for each in zip(by_text, is_plain, strict=True)]

    def judge_tools(self, columns: Float[Tensor, "token layer column"], parts: bytes) -> Judgement:
        """The judgement of the turns of tools in a prompt alone, if there are any."""
        tokens, turns = tool_rows(parts)
        if not len(tokens):
            return Judgement()
        chosen = columns[torch.from_numpy(tokens).to(columns.device)]
        own_parts = bytes(np.frombuffer(parts, np.uint8)[tokens])
        (judged,) = self.judge(self.prompt_logits(chosen, [own_parts]), [False])
        verdicts = (replace(each, turn=int(turns[each.turn or 0])) for each in judged.verdicts)
        return Judgement(tuple(verdicts), judged.failed)

    def prompt_logits(
        self, columns: Float[Tensor, "token layer column"], parts: Sequence[bytes]
    ) -> list[list[ProbeOutput]]:
        """For each probe, its logits of each prompt, by turns where ``probe.judges_turns``.

        Args:
            columns: Those of all tokens, one prompt after the other.
            parts: For each prompt, the ``Part`` of every token.
        """
        wholes = self.text_logits(self.summarise(columns, parts))
        units = [judged_units(prompt) for prompt in parts]
        if not any(probe.judges_turns for probe in self.probes) or not any(units):
            return wholes
        unit_logits = self._unit_logits(columns, parts, units)
        return [
            [
                probe.highest(logits, of_prompt, whole)
                for logits, of_prompt, whole in zip(by_prompt, units, of_probe, strict=True)
            ]
            for probe, by_prompt, of_probe in zip(self.probes, unit_logits, wholes, strict=True)
        ]

    def _unit_logits(
        self,
        columns: Float[Tensor, "token layer column"],
        parts: Sequence[bytes],
        units: Sequence[Sequence[Unit]],
    ) -> list[list[Float[np.ndarray, "unit output"]]]:
        """For each probe and prompt, the logits of the prompt's units."""
        rows: list[np.ndarray] = []
        unit_parts: list[bytes] = []
        start = 0
        for prompt, of_prompt in zip(parts, units, strict=True):
            for unit in of_prompt:
                rows.append(start + unit.tokens)
                unit_parts.append(bytes(np.frombuffer(prompt, np.uint8)[unit.tokens]))
            start += len(prompt)
        chosen = columns[torch.from_numpy(np.concatenate(rows)).to(columns.device)]
        ends = [*accumulate(map(len, units))]
        logits = self.logits(self.summarise(chosen, unit_parts))
        return [np.split(of_probe, ends[:-1]) for of_probe in logits]

    def _judgement(self, logits: Sequence[ProbeOutput], is_plain: bool) -> Judgement:
        verdicts: list[Verdict] = []
        failed: list[str] = []
        token_labels: dict[str, Sequence[TokenLabel]] = {}
        for probe, each in zip(self.probes, logits, strict=True):
            if not probe.can_judge(is_plain=is_plain):
                failed.append(probe.name)
                continue
            try:
                verdict = probe.verdict(each.logits, turn=each.turn)
            except VerdictError:
                failed.append(probe.name)
                continue
            if probe.spans is not None:
                token_labels[probe.name] = labels = probe.token_labels(each)
                # Any of them may be a word, until an engine says where they stand.
                marked = {label for _, label, _ in labels}
                verdict = probe.labelled_verdict(verdict, None, marked)
            verdicts.append(verdict)
        return Judgement(tuple(verdicts), tuple(failed), token_labels)


class Panel:
    """The probes of an engine, in two banks that are judged at different times.

    Probes that read the prompt alone are judged when it ends. Probes that read the response can be
    judged at any of its tokens, from a state that grows token by token.

    Args:
        probes: Probes of one backbone, with distinct names; possibly none.
        device: Where the backbone's hidden states are.

    Attributes:
        probes: All of them, in the given order.
        early: Those that read the prompt alone; None if there are none.
        late: Those that read the response; None if there are none.

    Raises:
        SidelightError: Two probes share a name.
    """

    def __init__(self, probes: Sequence[Probe], *, device: torch.device | str = "cpu"):
        require_distinct_names([probe.name for probe in probes])
        self.probes = tuple(probes)
        early = [probe for probe in probes if not probe.reads.includes_response]
        late = [probe for probe in probes if probe.reads.includes_response]
        self.early = Bank(early, device=device) if early else None
        self.late = Bank(late, device=device) if late else None

    @cached_property
    def projection(self) -> Projection | None:
        """The projection to the columns of all probes, ``early`` before ``late``, if any."""
        parts = [bank.projection for bank in (self.early, self.late) if bank]
        if len(parts) < 2:
            return parts[0] if parts else None
        return Projection.joined(parts)

    def prompt_tap(self) -> BankTap | None:
        """A tap for a pass over prompts; None if there are no probes."""
        return BankTap(self.projection) if self.projection else None

    def response_tap(self) -> BankTap | None:
        """A tap for a pass over tokens of responses; None if no probe reads them."""
        return self.late.tap() if self.late else None

    def judge_prompts(
        self,
        columns: Float[Tensor, "token layer column"],
        parts: Sequence[bytes],
        is_plain: Sequence[bool],
    ) -> list[Judgement]:
        """For each prompt, what the early probes say.

        Args:
            columns: The columns of all probes for all tokens, one prompt after the other.
            parts: For each prompt, the ``Part`` of every token.
            is_plain: As for ``Bank.judge``.
        """
        if (bank := self.early) is None:
            return [Judgement()] * len(parts)
        columns = columns[..., : bank.projection.weight.shape[2]]
        judged = bank.judge(bank.prompt_logits(columns, parts), is_plain)
        pieces = zip(columns.split([*map(len, parts)]), parts, strict=True)
        tools = (bank.judge_tools(*piece) for piece in pieces)
        pairs = zip(judged, tools, strict=True)
        return [whole | Judgement(failed=own.failed, tools=own) for whole, own in pairs]

    def read(
        self,
        columns: Float[Tensor, "token layer column"],
        parts: Sequence[bytes],
        before: Sequence[BankState | None],
    ) -> list[BankState | None]:
        """For each text, what the late probes know after some more tokens.

        Args:
            columns: The columns of all probes, or of the late ones alone, for all tokens, one text
                after the other.
            parts: For each text, the ``Part`` of every new token.
            before: What the late probes knew about each text; None at its beginning.
        """
        if self.late is None:
            return [None] * len(parts)
        width = self.late.projection.weight.shape[2]
        new = self.late.summarise(columns[..., columns.shape[2] - width :], parts)
        states = [state for state in before if state is not None]
        if len(states) == len(before):
            # All texts go on: one merge.
            return [*self.late.merge(BankState.pack(states), new).split()]
        # Some begin here, as in a prefill or a step of vLLM.
        return [
            state if old is None else self.late.merge(old, state)
            for old, state in zip(before, new.split(), strict=True)
        ]

    def judge_responses(
        self, states: Sequence[BankState | None], is_plain: Sequence[bool]
    ) -> list[Judgement]:
        """For each text, what the late probes say about as much as they have read.

        Args:
            states: As ``read`` gives them.
            is_plain: As for ``Bank.judge``, of the prompts that the texts begin with.
        """
        present = [state for state in states if state is not None]
        if self.late is None or not present:
            return [Judgement()] * len(states)
        assert len(present) == len(states)
        return self.late.judge(self.late.text_logits(BankState.pack(present)), is_plain)

    def explain(
        self,
        columns: Float[Tensor, "token layer column"],
        prompt: EncodedPrompt,
        names: Collection[str],
    ) -> tuple[Explanation, ...]:
        """Why these probes say what they say of one text; one without a verdict is left out.

        Args:
            columns: Of all probes, for every token.
            prompt: The text, with any response, and the places of its tokens.
            names: Names of probes; others are ignored.
        """
        explanations: list[Explanation] = []
        for bank in filter(None, (self.early, self.late)):
            width = bank.projection.weight.shape[2]
            part, columns = columns[..., :width], columns[..., width:]
            for probe in bank.probes:
                if probe.name in names:
                    with suppress(VerdictError):
                        own = bank.columns_of(probe.name, part)
                        explanations.append(explain(probe, own, prompt))
        return tuple(explanations)


def _groups(probes: Sequence[Probe], widths: Sequence[int]) -> list[_ProbeGroup]:
    """Groups probes that read the same tokens and do the same to the same number of columns."""
    indices: dict[Hashable, list[int]] = {}
    for index, probe in enumerate(probes):
        kind = probe.mechanism.summary_kind()
        key = index if kind is None else (kind, probe.reads, widths[index])
        indices.setdefault(key, []).append(index)
    return [
        _ProbeGroup(members, [probes[index] for index in members]) for members in indices.values()
    ]
