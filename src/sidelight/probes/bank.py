"""Many probes on one backbone, served by one thin matmul per layer.

The probes' projections are concatenated, so 50 probes run as many matmuls as one. Probes that do
the same to their projections do it in one call. ``Bank`` summarises and classifies; ``ProbeBanks``
decides which probes run when. Neither holds a request: states are values that the caller keeps,
splits, packs and merges.
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
    PromptTokens,
    Reads,
    Segment,
    read_tokens,
    split_segments,
    tool_rows,
)
from sidelight.probes.card import require_distinct_names
from sidelight.probes.explanation import Explanation, explain
from sidelight.probes.probe import Probe, ProbeOutput
from sidelight.probes.ragged import Ragged
from sidelight.probes.standardisation import Projection
from sidelight.types import TokenLabel, Verdict, Verdicts

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
        return [BankState(states) for states in zip(*(s.split() for s in self.states), strict=True)]

    @staticmethod
    def pack(states: Sequence["BankState"]) -> "BankState":
        """The requests of all parts, in order."""
        by_group = zip(*(state.states for state in states), strict=True)
        return BankState(tuple(Ragged.pack(group_states) for group_states in by_group))


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
            projections = self._projection.layer(layer, hidden.flatten(0, 1).float())
            self._passes[-1][layer] = projections.unflatten(0, hidden.shape[:2])
        self.seconds += time.perf_counter() - begin

    def projected(self) -> Float[Tensor, "batch token layer projection"]:
        """The columns of all passes since the last call, joined along the tokens.

        Each pass goes on with the same texts. A layer that should have been read and was not has
        NaN, hence no verdict.
        """
        projected = torch.cat([self._stacked(projections) for projections in self._passes], 1)
        self._passes.clear()
        return projected

    def _stacked(
        self, projections: Mapping[int, Float[Tensor, "batch token column"]]
    ) -> Float[Tensor, "batch token layer projection"]:
        missing, above = (torch.full_like(projections[0], value) for value in (torch.nan, 0.0))
        layers = range(len(self._projection.weight))
        read = (
            projections.get(layer, missing) if layer < self.depth else above for layer in layers
        )
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

    def summarise(
        self, projections: Float[Tensor, "row layer projection"], lengths: Tensor
    ) -> Ragged:
        """The state of each segment, from the probes' columns side by side."""
        if len(self.indices) == 1:
            return self.mechanisms[0].summarise(Ragged(projections, lengths))
        side_by_side = projections.unflatten(2, (len(self.indices), -1)).flatten(1, 2)
        numbers_per_layer = projections.numel() // side_by_side.shape[1]
        layers_at_once = max(1, NUMBERS_AT_ONCE // max(1, numbers_per_layer))
        states = [
            self.mechanisms[0].summarise(Ragged(chunk, lengths)).values
            for chunk in side_by_side.split(layers_at_once, 1)
        ]
        return Ragged.one_row_each(torch.cat(states, 1))

    def logits(self, state: Ragged) -> list[Float[Tensor, "segment output"]]:
        """The logits of each probe of the group."""
        members = len(self.indices)
        if members == 1:
            return [self.mechanisms[0].finish(state)]
        split_values = state.values.unflatten(1, (-1, members)).unbind(2)
        return [
            mechanism.finish(Ragged(values, state.lengths))
            for mechanism, values in zip(self.mechanisms, split_values, strict=True)
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
        self._projections = {
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

    def projections_of(
        self, probe: str, projections: Float[Tensor, "token layer projection"]
    ) -> Float[Tensor, "token layer probe_projection"]:
        """A probe's own columns, among those of all."""
        return projections[..., self._projections[probe]]

    @torch.inference_mode()
    def summarise(
        self, projections: Float[Tensor, "token layer projection"], token_roles: Sequence[bytes]
    ) -> BankState:
        """The state of each text; arguments as for ``prompt_logits``."""
        device = projections.device
        masks, lengths = dict[Reads, Tensor](), dict[Reads, Tensor]()
        for reads in self.reads:
            is_read = [read_tokens(text_roles, reads) for text_roles in token_roles]
            masks[reads] = torch.from_numpy(np.concatenate(is_read)).to(device)
            lengths[reads] = torch.tensor(
                [int(text_roles.sum()) for text_roles in is_read], device=device
            )
        states = [
            group.summarise(group_projections[masks[group.reads]], lengths[group.reads])
            for group, group_projections in zip(
                self._groups, projections.split(self._widths, -1), strict=True
            )
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
        for group, group_state in zip(self._groups, state.states, strict=True):
            logits = (each.cpu().double().numpy() for each in group.logits(group_state))
            by_index.update(zip(group.indices, logits, strict=True))
        return [by_index[index] for index in range(len(by_index))]

    @torch.inference_mode()
    def text_logits(self, state: BankState) -> list[list[ProbeOutput]]:
        """For each probe, its logits of each request, and of its tokens where it labels them."""
        by_probe = [[ProbeOutput(logits) for logits in of_probe] for of_probe in self.logits(state)]
        for group, group_state in zip(self._groups, state.states, strict=True):
            if (labelled := group.mechanisms[0].token_logits(group_state)) is not None:
                (index,) = group.indices
                tokens = (each.values.cpu().double().numpy() for each in labelled.split())
                pairs = zip(by_probe[index], tokens, strict=True)
                by_probe[index] = [
                    replace(logits, tokens=token_logits) for logits, token_logits in pairs
                ]
        return by_probe

    def classify(
        self, outputs: Sequence[Sequence[ProbeOutput]], prompts: Sequence[PromptTokens]
    ) -> list[Verdicts]:
        """For each text, what the probes say; those without a verdict are named as failed.

        Args:
            outputs: For each probe, its logits of each text.
            prompts: The texts, or the prompts that they begin with.
        """
        by_text = zip(*outputs, strict=True)
        return [self._verdicts(*each) for each in zip(by_text, prompts, strict=True)]

    def classify_tools(
        self, projections: Float[Tensor, "token layer projection"], prompt: PromptTokens
    ) -> Verdicts:
        """The verdicts on the turns of tools in a prompt alone, if there are any."""
        token_roles = bytes(prompt.token_roles)
        tokens, turns = tool_rows(token_roles)
        if not len(tokens):
            return Verdicts()
        chosen = projections[torch.from_numpy(tokens).to(projections.device)]
        tool_roles = bytes(np.frombuffer(token_roles, np.uint8)[tokens])
        (found,) = self.classify(self.prompt_logits(chosen, [tool_roles]), [prompt])
        verdicts = (replace(each, turn=int(turns[each.turn or 0])) for each in found.verdicts)
        return Verdicts(tuple(verdicts), found.failed)

    def prompt_logits(
        self, projections: Float[Tensor, "token layer projection"], token_roles: Sequence[bytes]
    ) -> list[list[ProbeOutput]]:
        """For each probe, its logits of each prompt, by turns where ``probe.classifies_turns``.

        Args:
            projections: Those of all tokens, one prompt after the other.
            token_roles: For each prompt, the ``TokenRole`` of every token.
        """
        wholes = self.text_logits(self.summarise(projections, token_roles))
        segments = [split_segments(prompt) for prompt in token_roles]
        if not any(probe.classifies_turns for probe in self.probes) or not any(segments):
            return wholes
        segment_logits = self._segment_logits(projections, token_roles, segments)
        return [
            [
                probe.highest(logits, of_prompt, text_output)
                for logits, of_prompt, text_output in zip(
                    by_prompt, segments, of_probe, strict=True
                )
            ]
            for probe, by_prompt, of_probe in zip(self.probes, segment_logits, wholes, strict=True)
        ]

    def _segment_logits(
        self,
        projections: Float[Tensor, "token layer projection"],
        token_roles: Sequence[bytes],
        segments: Sequence[Sequence[Segment]],
    ) -> list[list[Float[np.ndarray, "segment output"]]]:
        """For each probe and prompt, the logits of the prompt's units."""
        rows: list[np.ndarray] = []
        segment_roles: list[bytes] = []
        start = 0
        for prompt, of_prompt in zip(token_roles, segments, strict=True):
            for segment in of_prompt:
                rows.append(start + segment.tokens)
                segment_roles.append(bytes(np.frombuffer(prompt, np.uint8)[segment.tokens]))
            start += len(prompt)
        chosen = projections[torch.from_numpy(np.concatenate(rows)).to(projections.device)]
        ends = [*accumulate(map(len, segments))]
        logits = self.logits(self.summarise(chosen, segment_roles))
        return [np.split(of_probe, ends[:-1]) for of_probe in logits]

    def _verdicts(self, logits: Sequence[ProbeOutput], prompt: PromptTokens) -> Verdicts:
        verdicts: list[Verdict] = []
        failed: list[str] = []
        token_labels: dict[str, Sequence[TokenLabel]] = {}
        for probe, each in zip(self.probes, logits, strict=True):
            if not probe.can_classify(prompt):
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
                annotated = {label for _, label, _ in labels}
                verdict = probe.labelled_verdict(verdict, None, annotated)
            verdicts.append(verdict)
        return Verdicts(tuple(verdicts), tuple(failed), token_labels)


class ProbeBanks:
    """The probes of an engine, in two banks that classify at different times.

    Probes that read only the prompt classify when it ends. Probes that read the response can
    classify at any of its tokens, from a state that grows token by token.

    Args:
        probes: Probes of one backbone, with distinct names; possibly none.
        device: Where the backbone's hidden states are.

    Attributes:
        probes: All of them, in the given order.
        prompt_probes: Those that read the prompt alone; None if there are none.
        response_probes: Those that read the response; None if there are none.

    Raises:
        SidelightError: Two probes share a name.
    """

    def __init__(self, probes: Sequence[Probe], *, device: torch.device | str = "cpu"):
        require_distinct_names([probe.name for probe in probes])
        self.probes = tuple(probes)
        prompt_probes = [probe for probe in probes if not probe.reads.includes_response]
        response_probes = [probe for probe in probes if probe.reads.includes_response]
        self.prompt_probes = Bank(prompt_probes, device=device) if prompt_probes else None
        self.response_probes = Bank(response_probes, device=device) if response_probes else None

    @cached_property
    def projection(self) -> Projection | None:
        """The projections of all probes, ``prompt_probes`` first; None without probes."""
        projections = [
            bank.projection for bank in (self.prompt_probes, self.response_probes) if bank
        ]
        if len(projections) < 2:
            return projections[0] if projections else None
        return Projection.joined(projections)

    def prompt_tap(self) -> BankTap | None:
        """A tap for a pass over prompts; None if there are no probes."""
        return BankTap(self.projection) if self.projection else None

    def response_tap(self) -> BankTap | None:
        """A tap for a pass over tokens of responses; None if no probe reads them."""
        return self.response_probes.tap() if self.response_probes else None

    def classify_prompts(
        self,
        projections: Float[Tensor, "token layer projection"],
        prompts: Sequence[PromptTokens],
    ) -> list[Verdicts]:
        """The verdicts of the prompt probes for each prompt.

        Args:
            projections: The columns of all probes for all tokens, one prompt after the other.
            prompts: The prompts.
        """
        if (bank := self.prompt_probes) is None:
            return [Verdicts()] * len(prompts)
        projections = projections[..., : bank.projection.weight.shape[2]]
        token_roles = [bytes(prompt.token_roles) for prompt in prompts]
        text_verdicts = bank.classify(bank.prompt_logits(projections, token_roles), prompts)
        read = zip(projections.split([*map(len, token_roles)]), prompts, strict=True)
        tools = (bank.classify_tools(*prompt) for prompt in read)
        pairs = zip(text_verdicts, tools, strict=True)
        return [
            verdicts | Verdicts(failed=tool_verdicts.failed, tools=tool_verdicts)
            for verdicts, tool_verdicts in pairs
        ]

    def read(
        self,
        projections: Float[Tensor, "token layer projection"],
        token_roles: Sequence[bytes],
        before: Sequence[BankState | None],
    ) -> list[BankState | None]:
        """The state of the response probes for each text after some more tokens.

        Args:
            projections: Projections of all probes, or only of the response probes. The tokens of
                the texts follow each other.
            token_roles: For each text, the ``TokenRole`` of every new token.
            before: State of the response probes for each text; None at its beginning.
        """
        if self.response_probes is None:
            return [None] * len(token_roles)
        width = self.response_probes.projection.weight.shape[2]
        new = self.response_probes.summarise(
            projections[..., projections.shape[2] - width :], token_roles
        )
        states = [state for state in before if state is not None]
        if len(states) == len(before):
            # All texts go on: one merge.
            return [*self.response_probes.merge(BankState.pack(states), new).split()]
        # Some begin here, as in a prefill or a step of vLLM.
        return [
            state if old is None else self.response_probes.merge(old, state)
            for old, state in zip(before, new.split(), strict=True)
        ]

    def classify_responses(
        self, states: Sequence[BankState | None], prompts: Sequence[PromptTokens]
    ) -> list[Verdicts]:
        """The verdicts of the response probes for each text, on the tokens read so far.

        Args:
            states: As ``read`` gives them.
            prompts: The prompts that the texts begin with.
        """
        present = [state for state in states if state is not None]
        if self.response_probes is None or not present:
            return [Verdicts()] * len(states)
        assert len(present) == len(states)
        return self.response_probes.classify(
            self.response_probes.text_logits(BankState.pack(present)), prompts
        )

    def explain(
        self,
        projections: Float[Tensor, "token layer projection"],
        prompt: EncodedPrompt,
        names: Collection[str],
    ) -> tuple[Explanation, ...]:
        """Why these probes say what they say of one text; one without a verdict is left out.

        Args:
            projections: Of all probes, for every token.
            prompt: The text, with any response, and the places of its tokens.
            names: Names of probes; others are ignored.
        """
        explanations: list[Explanation] = []
        for bank in filter(None, (self.prompt_probes, self.response_probes)):
            width = bank.projection.weight.shape[2]
            bank_projections, projections = projections[..., :width], projections[..., width:]
            for probe in bank.probes:
                if probe.name in names:
                    with suppress(VerdictError):
                        probe_projections = bank.projections_of(probe.name, bank_projections)
                        explanations.append(explain(probe, probe_projections, prompt))
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
