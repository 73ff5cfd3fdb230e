"""Time of a check over HTTP: one text to ``/v1/moderations``, as an application sends it."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from itertools import count
from pathlib import Path
from time import perf_counter

import httpx
import numpy as np

from sidelight.errors import ContextLengthError, SidelightError
from sidelight.models.conversation import Message
from sidelight.models.encode import PromptEncoder
from sidelight.progress import progress
from sidelight.states.reader import Backbone
from sidelight_lab.bench.measurement import Range, Record, conditions, table
from sidelight_lab.bench.server_process import ServerProcess

_WARM_UPS = 3
_TIMEOUT_S = 60.0


def measure_checks(
    backbone: Backbone,
    probes: Sequence[str],
    *,
    tokens: Sequence[int],
    rounds: int,
    dtype: str = "auto",
) -> Record:
    """Milliseconds from the request to the whole answer, of one client that asks in turn.

    Each row is a server of its own. A round asks each server once for each length, so a slow moment
    of the machine meets all rows. Every text is sent once.

    Args:
        backbone: The model that the servers run; it counts tokens.
        probes: What each server is given as ``--probe``.
        tokens: Lengths of the prompts, chat template included.
        rounds: Timings of each row and length.
        dtype: That of the servers, as ``sidelight serve`` takes it; ``auto`` need not be the dtype
            of ``backbone``, which is loaded for reading.

    Raises:
        SidelightError: A server does not start, or refuses a text.
    """
    where = conditions(backbone, {"dtype": dtype, "rounds": rounds})
    options = ("--model", backbone.name, "--dtype", dtype, "--device", str(backbone.device))
    numbers = count()
    # Before servers start: a wrong length is refused at once.
    words = {length: words_for(backbone.encoder, length) for length in tokens}
    times: dict[tuple[str, int], list[float]] = {(row, n): [] for row in probes for n in tokens}
    with ExitStack() as running:
        servers = {
            name: running.enter_context(ServerProcess([Path(name)], options=options))
            for name in probes
        }
        clients: dict[str, httpx.Client] = {}
        for name, server in servers.items():
            server.wait_until_ready()
            clients[name] = running.enter_context(
                httpx.Client(base_url=server.url, timeout=_TIMEOUT_S)
            )
        for name, length in [*times] * _WARM_UPS:
            _seconds(clients[name], text_of(words[length], next(numbers)))
        with progress("Timing", rounds, unit="rounds") as advance:
            for number in range(rounds):
                rows = [*times]
                first = number % len(rows)
                for name, length in rows[first:] + rows[:first]:
                    seconds = _seconds(clients[name], text_of(words[length], next(numbers)))
                    times[name, length].append(1000 * seconds)
                advance(1)
    return Record("checks", where, {"rows": _rows(times)}, [_table(times, probes, tokens)])


def words_for(encoder: PromptEncoder, tokens: int) -> int:
    """The words of a text whose prompt has this many tokens, chat template included.

    Raises:
        SidelightError: The model reads fewer tokens, or no such text has as many.
    """
    if tokens > encoder.max_tokens:
        raise ContextLengthError(
            f"Got prompts of {tokens} tokens, but this model reads up to {encoder.max_tokens}. "
            "Choose shorter ones with --tokens."
        )

    def length(words: int) -> int:
        return len(encoder.encode([Message("user", text_of(words, 0))]))

    shortest, longer = length(0), length(1)
    words, rest = divmod(tokens - shortest, longer - shortest)
    if rest or words < 0 or length(words) != tokens:
        raise SidelightError(
            f"No text makes a prompt of {tokens} tokens: the shortest takes {shortest}, and each "
            f"word {longer - shortest}. Choose another length with --tokens."
        )
    return words


def text_of(words: int, number: int) -> str:
    """A text that shares no beginning with those of other numbers."""
    return f"{number:06d}" + " word" * words


def _seconds(client: httpx.Client, text: str) -> float:
    start = perf_counter()
    answer = client.post("/v1/moderations", json={"input": text})
    seconds = perf_counter() - start
    if answer.is_error:
        raise SidelightError(
            f"{client.base_url}/v1/moderations refused a text with status {answer.status_code}: "
            f"{answer.json()['error']['message']}"
        )
    return seconds


def _spread(times: Sequence[float]) -> Range:
    """Median, 5th and 95th percentile."""
    low, middle, high = np.percentile(times, (5, 50, 95)).tolist()
    return Range(middle, low, high)


def _rows(times: Mapping[tuple[str, int], Sequence[float]]) -> list[dict[str, object]]:
    return [
        {"probes": name, "tokens": length, "ms": asdict(_spread(own))}
        for (name, length), own in times.items()
    ]


def _table(
    times: Mapping[tuple[str, int], Sequence[float]], probes: Sequence[str], tokens: Sequence[int]
) -> str:
    return table(
        "A check through /v1/moderations, ms: median (5th to 95th percentile)",
        ["probes", *(f"{length} tokens" for length in tokens)],
        [[name, *(_spread(times[name, n]).text(0) for n in tokens)] for name in probes],
    )
