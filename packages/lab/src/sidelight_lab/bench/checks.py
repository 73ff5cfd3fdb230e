"""Time of a check over HTTP: one text to ``/v1/moderations``, as an application sends it."""

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from itertools import count, product
from pathlib import Path
from time import perf_counter

import httpx
import numpy as np

from sidelight.errors import ContextLengthError, SidelightError
from sidelight.guards import probe_folders
from sidelight.models.conversation import Message
from sidelight.models.encode import PromptEncoder
from sidelight.probes.artifact import load_probe, save_probe
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
    layers: Sequence[int] = (),
) -> Record:
    """Measure milliseconds from the request to the complete response, for a single client.

    Each row is a separate server. A round queries each server once per length, so that slow moments
    of the machine affect all rows. Every text is sent once.

    Args:
        backbone: Model that the servers run, used here to count tokens.
        probes: Value of ``--probe`` for each server.
        tokens: Lengths of the prompts, chat template included.
        rounds: Timings of each row and length.
        dtype: Dtype of the servers, as in ``sidelight serve``; ``auto`` may differ from the dtype
            of ``backbone``, which is loaded for reading.
        layers: Each adds a row for copies of the probes that read this number of hidden states,
            from the embedding up, where passes stop.

    Raises:
        SidelightError: A server does not start, or refuses a text.
    """
    where = conditions(backbone, {"dtype": dtype, "rounds": rounds})
    options = ("--model", backbone.name, "--dtype", dtype, "--device", str(backbone.device))
    numbers = count()
    # Before servers start, so that a wrong length is refused immediately.
    words = {length: words_for(backbone.encoder, length) for length in tokens}
    for number in layers:
        backbone.fingerprint.first_layers(number)
    with ExitStack() as running:
        folder = Path(running.enter_context(tempfile.TemporaryDirectory()))
        rows = {name: [Path(name)] for name in probes}
        rows |= {
            f"{name}, {number} layers": _shallow(name, number, folder / f"{i}-{number}")
            for (i, name), number in product(enumerate(probes), layers)
        }
        times: dict[tuple[str, int], list[float]] = {(row, n): [] for row in rows for n in tokens}
        servers = {
            name: running.enter_context(ServerProcess(paths, options=options))
            for name, paths in rows.items()
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
                cells = [*times]
                first = number % len(cells)
                for name, length in cells[first:] + cells[:first]:
                    seconds = _seconds(clients[name], text_of(words[length], next(numbers)))
                    times[name, length].append(1000 * seconds)
                advance(1)
    sections = [_table(times, [*rows], tokens)]
    if layers:
        sections.append(_ratios(times, probes, layers, tokens, backbone.fingerprint.layers))
    return Record("checks", where, {"rows": _rows(times)}, sections)


def _shallow(name: str, layers: int, folder: Path) -> list[Path]:
    """Copies of probes that read only the first layers."""
    copies: list[Path] = []
    for source in probe_folders([name]):
        probe = load_probe(source)
        copies.append(folder / probe.name)
        standardisation = probe.standardisation.limited(layers)
        save_probe(replace(probe, standardisation=standardisation), copies[-1])
    return copies


def _ratios(
    times: Mapping[tuple[str, int], Sequence[float]],
    probes: Sequence[str],
    layers: Sequence[int],
    tokens: Sequence[int],
    deepest: int,
) -> str:
    rows: list[list[str]] = []
    for name, number in product(probes, layers):
        ratios = [
            np.divide(times[f"{name}, {number} layers", length], times[name, length])
            for length in tokens
        ]
        blocks = f"{(number - 1) / (deepest - 1):.2f}"
        rows.append([f"{name}, {number} layers", blocks, *(_spread(r).text(2) for r in ratios)])
    return table(
        "The same time over that at full depth, by round: median (5th to 95th percentile)",
        ["probes", "blocks, share of all", *(f"{length} tokens" for length in tokens)],
        rows,
    )


def words_for(encoder: PromptEncoder, tokens: int) -> int:
    """Number of words of a text whose prompt has this many tokens, including the chat template.

    Raises:
        SidelightError: The model's context is shorter, or no text has exactly this many tokens.
    """
    if tokens > encoder.max_tokens:
        raise ContextLengthError(
            f"Got prompts of {tokens} tokens, but this model reads up to {encoder.max_tokens}. "
            "Choose shorter prompts with --tokens."
        )

    def length(words: int) -> int:
        return len(encoder.encode([Message("user", text_of(words, 0))]))

    shortest, longer = length(0), length(1)
    words, rest = divmod(tokens - shortest, longer - shortest)
    if rest or words < 0 or length(words) != tokens:
        raise SidelightError(
            f"No text makes a prompt of {tokens} tokens: the shortest prompt has {shortest} "
            f"tokens, and each word adds {longer - shortest}. Choose another length with "
            "--tokens."
        )
    return words


def text_of(words: int, number: int) -> str:
    """A text that shares no prefix with texts of other numbers."""
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


def _spread(times: Sequence[float] | np.ndarray) -> Range:
    """Median, 5th and 95th percentile."""
    low, middle, high = np.percentile(times, (5, 50, 95)).tolist()
    return Range(middle, low, high)


def _rows(times: Mapping[tuple[str, int], Sequence[float]]) -> list[dict[str, object]]:
    return [
        {"probes": name, "tokens": length, "ms": asdict(_spread(durations))}
        for (name, length), durations in times.items()
    ]


def _table(
    times: Mapping[tuple[str, int], Sequence[float]], probes: Sequence[str], tokens: Sequence[int]
) -> str:
    return table(
        "A check through /v1/moderations, ms: median (5th to 95th percentile)",
        ["probes", *(f"{length} tokens" for length in tokens)],
        [[name, *(_spread(times[name, n]).text(0) for n in tokens)] for name in probes],
    )
