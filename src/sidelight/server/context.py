"""What the endpoints share: the engine, its metrics, and the choice of probes."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from sidelight.engines.base import Engine, LoadedProbe
from sidelight.errors import did_you_mean
from sidelight.server.categories import CategoryNames
from sidelight.server.errors import RequestError
from sidelight.server.metrics import Metrics
from sidelight.server.report import Reporter


@dataclass(frozen=True)
class Context:
    """One server's parts.

    Attributes:
        engine: What answers.
        metrics: What is counted.
        started_at: Unix time.
    """

    engine: Engine
    metrics: Metrics
    started_at: int

    @classmethod
    def new(cls, engine: Engine) -> "Context":
        """The parts of a server that starts now."""
        return cls(engine, Metrics(engine), int(time.time()))

    def require_model(self, name: str) -> None:
        """Checks that a request asks for the served model.

        Raises:
            RequestError: 404; it asks for another.
        """
        served = self.engine.model
        if name != served:
            raise RequestError(
                f"Unknown model '{name}'.{did_you_mean(name, [served])}",
                status=404,
                code="model_not_found",
                param="model",
            )

    def reporter(self, names: Sequence[str] | None) -> Reporter:
        """Reports on the probes that a request names; None: on all.

        Raises:
            RequestError: An unknown name; a probe that does not run must not pass unnoticed.
        """
        loaded = {probe.name: probe for probe in self.engine.probes}
        for name in names or ():
            if name not in loaded:
                raise RequestError(
                    f"Unknown probe '{name}'.{did_you_mean(name, loaded)}",
                    code="probe_not_found",
                    param="probes",
                )
        probes = (
            list(loaded.values()) if names is None else [loaded[n] for n in dict.fromkeys(names)]
        )
        return Reporter(self.engine.model, probes, self.names)

    @property
    def names(self) -> CategoryNames:
        """The categories of all loaded probes."""
        return CategoryNames.of(self.engine.probes)

    def require_prompt_probe(self, probes: Sequence[LoadedProbe]) -> None:
        """Checks that a bare text can be judged: an empty answer would look harmless.

        Raises:
            RequestError: All of the probes wait for a response.
        """
        if not any(probe.reads.side == "prompt" for probe in probes):
            raise RequestError(
                "No chosen probe reads a prompt alone, so a text by itself cannot be judged. Load "
                "such a probe, or use /v1/chat/completions.",
                code="no_prompt_probe",
            )


def _context(request: Request) -> Context:
    return request.app.state.context


InContext = Annotated[Context, Depends(_context)]
