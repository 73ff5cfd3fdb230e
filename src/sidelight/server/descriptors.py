"""How many connections the system lets this process open."""

import logging
import resource
from dataclasses import replace

from sidelight.errors import SidelightError
from sidelight.server.limits import ServerLimits

# Connections in one turn of the event loop. All are open for some turns before those that are too
# many are closed.
ACCEPTED_AT_ONCE = 16
# Those, the listening socket, logs, and probes that are read.
_SPARE = 128
_log = logging.getLogger("sidelight.server")


def within_system(limits: ServerLimits) -> ServerLimits:
    """The limits with no more connections than this process may open files.

    Raises the process's own limit as far as the system allows. Where that is not enough, fewer
    connections are accepted, and the log says so: running out of files would hit whatever opens
    the next one, a log or a probe among them.

    Raises:
        SidelightError: Not even one connection would be left.
    """
    allowed = _allowed_files(limits.connections + _SPARE)
    room = limits.connections if allowed is None else allowed - _SPARE
    if room < 1:
        raise SidelightError(
            f"This process may open {allowed} files, too few to serve. Raise the limit (ulimit -n) "
            f"to {limits.connections + _SPARE}."
        )
    if room < limits.connections:
        _log.warning(
            "This process may open %d files: at most %d connections, not %d. Raise the limit "
            "(ulimit -n).",
            allowed,
            room,
            limits.connections,
        )
        return replace(limits, connections=room)
    return limits


def _allowed_files(wanted: int) -> int | None:
    """How many files this process may open, up to those wanted; None: the system has no limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return None
    raised = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
    return raised
