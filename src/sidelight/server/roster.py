"""The loaded probes with the rules that hold for them now."""

from collections.abc import Sequence

from sidelight.engines.base import Engine, LoadedProbe
from sidelight.server.policy import Clause, Policy, clauses_of


class Roster:
    """Which probes are on duty, and under which rules.

    Args:
        engine: Runs the probes.
        policy: The rules.
    """

    def __init__(self, engine: Engine, policy: Policy):
        self._engine = engine
        self._policy = policy

    @property
    def timeout_s(self) -> float | None:
        """Seconds that verdicts may take where a rule blocks; None: any."""
        return self._policy.timeout_s

    @property
    def clauses(self) -> tuple[Clause, ...]:
        """Every loaded probe with its rule."""
        return clauses_of(self._policy, self._engine.probes)

    @property
    def visible(self) -> Sequence[LoadedProbe]:
        """The probes that clients hear of: all but shadows."""
        return [clause.probe for clause in self.clauses if not clause.is_shadow]
