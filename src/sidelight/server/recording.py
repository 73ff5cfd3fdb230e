"""Notes what was decided: as counts and in the log, without text."""

import logging
from collections.abc import Sequence

from sidelight.server.metrics import Metrics
from sidelight.server.policy import Decision

_log = logging.getLogger(__name__)


class Recorder:
    """Takes the decisions of one request.

    Args:
        metrics: Where they are counted.
    """

    def __init__(self, metrics: Metrics):
        self._metrics = metrics

    def __call__(self, decisions: Sequence[Decision]) -> None:
        """Counts all; logs what was blocked, and what could not be judged."""
        self._metrics.count(decisions)
        for decision in decisions:
            clause = decision.clause
            match decision.action:
                case "block":
                    _log.info("Blocked the %s by probe '%s'.", clause.side, clause.name)
                case "fail_closed":
                    _log.warning(
                        "Probe '%s' gave no verdict on the %s: blocked.", clause.name, clause.side
                    )
                case "fail_open":
                    _log.warning(
                        "Probe '%s' gave no verdict on the %s: passed, as its rule says.",
                        clause.name,
                        clause.side,
                    )
                case "none" | "flag" | "route" | "shadow":
                    pass
