"""What an operator lets follow from verdicts: one rule per probe and side. Knows no requests."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from sidelight.errors import SidelightError

Side = Literal["input", "output"]
Mode = Literal["score", "flag", "route", "block", "shadow"]
OnFailure = Literal["block", "pass"]
SystemTurns = Literal["trust", "refuse"]

# What a rule's routes call a verdict that could not be computed.
FAILED_LABEL = "verdict_failed"


@dataclass(frozen=True)
class Rule:
    """What follows from one probe's verdict.

    Attributes:
        mode: ``score``: nothing. ``flag``: a mark for the gateway. ``route``: a name for the
            gateway. ``block``: no answer, or no more of it. ``shadow``: counted, never shown.
        threshold: Probability from which a label counts; None: the artifact's own.
        labels: The labels that count; empty: the positive one, or all of a multi-label probe.
        on_failure: Whether a blocking rule blocks what could not be judged.
        max_tokens: Longest text that the probe may judge; a longer one is not judged. None: any.
        routes: Route by label; empty: a flagged label is its own route.
        shadow_of: The probe that a shadow is compared with.
        consecutive: Output: tokens in a row that have to count before the text is cut.
        warm_up: Output: first tokens that never count.
        hold_back: Output: tokens that a text is sent behind what has been judged; None:
            ``consecutive``, so that nothing of the streak that cuts the text was sent.
    """

    mode: Mode = "score"
    threshold: float | None = None
    labels: tuple[str, ...] = ()
    on_failure: OnFailure = "block"
    max_tokens: int | None = None
    routes: Mapping[str, str] = field(default_factory=dict)
    shadow_of: str | None = None
    consecutive: int = 2
    warm_up: int = 0
    hold_back: int | None = None

    @property
    def held_tokens(self) -> int:
        """Tokens that a text is sent behind what has been judged."""
        return self.consecutive if self.hold_back is None else self.hold_back


@dataclass(frozen=True)
class Policy:
    """The rules of one server. Probes without a rule are scored.

    Attributes:
        input: By name of a probe that reads the prompt.
        output: By name of a probe that reads the response.
        timeout_s: Seconds that a prompt's verdicts may take where a rule blocks; None: any.
        system_turns: Whether a conversation may begin with turns that no probe reads, the system's
            or a developer's; None: only where no rule blocks prompts.
    """

    input: Mapping[str, Rule] = field(default_factory=dict)
    output: Mapping[str, Rule] = field(default_factory=dict)
    timeout_s: float | None = None
    system_turns: SystemTurns | None = None

    @property
    def refuses_system_turns(self) -> bool:
        """Whether a conversation that begins with such a turn is refused."""
        if self.system_turns is None:
            return any(rule.mode == "block" for rule in self.input.values())
        return self.system_turns == "refuse"

    def require_side(self, name: str, side: Side) -> None:
        """Checks that no rule waits for a probe of this name on the other side.

        Raises:
            SidelightError: One does; it would no longer hold.
        """
        other: Side = "output" if side == "input" else "input"
        if name in self.side(other):
            raise SidelightError(
                f"The policy has a rule for probe '{name}' on the {other}, but this one judges the "
                f"{side}: the rule would no longer hold. Give it another name."
            )

    def side(self, side: Side) -> Mapping[str, Rule]:
        """The rules of one side."""
        return self.input if side == "input" else self.output
