"""What the endpoints share: the engine, its metrics, and the choice of probes."""

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from fastapi import Depends, Request

from sidelight.engines.base import Engine, Event, Finished, PromptJudged, Sampling
from sidelight.errors import did_you_mean
from sidelight.probe import Probe
from sidelight.prompts import Conversation
from sidelight.server.config import ServerLimits
from sidelight.server.connections import Drain
from sidelight.server.enforcement import Enforcement, PolicyOverrides, tightened
from sidelight.server.errors import RequestError
from sidelight.server.metrics import Metrics
from sidelight.server.observe import AuditLog, Observer
from sidelight.server.probes import ProbeRegistry
from sidelight.server.report import CategoryNames, Reporter, header


@dataclass(frozen=True)
class RequestContext:
    """What a request wants to know, and the rules it runs under.

    Attributes:
        reporter: Writes the verdicts that the client is told.
        enforcement: Lets through what the policy lets through.
        is_prompt_known: Whether this is one more text of a prompt whose judgement is recorded.
    """

    reporter: Reporter
    enforcement: Enforcement
    is_prompt_known: bool = False

    def headers(
        self, prompts: Sequence[PromptJudged], finished: Sequence[Finished] = ()
    ) -> Mapping[str, str]:
        """Those of the answer: verdicts, and marks for a gateway."""
        sides = [self.reporter.side(event) for event in (*prompts, *finished)]
        return {**header(*sides), **self.enforcement.marks(prompts, finished)}

    def for_another_text(self) -> "RequestContext":
        """The same for one more text of a prompt, whose judgement is recorded already."""
        return replace(self, is_prompt_known=True)


@dataclass(frozen=True)
class Context:
    """One server's parts.

    Attributes:
        engine: What answers.
        registry: Its probes and their rules.
        limits: How much a request may take.
        observer: Of the request that is served.
        drain: Whether the server is about to stop.
        started_at: Unix time.
    """

    engine: Engine
    registry: ProbeRegistry
    limits: ServerLimits
    observer: Observer
    drain: Drain
    started_at: int

    @classmethod
    def new(
        cls, engine: Engine, registry: ProbeRegistry, limits: ServerLimits, audit: AuditLog | None
    ) -> "Context":
        """The parts of a server that starts now."""
        observer = Observer(Metrics(engine), audit)
        return cls(engine, registry, limits, observer, Drain(), int(time.time()))

    @property
    def probes(self) -> Sequence[Probe]:
        """The probes that clients hear of; to be read anew in every request."""
        return self.registry.visible

    def asked(
        self, names: Sequence[str] | None, overrides: PolicyOverrides | None = None
    ) -> RequestContext:
        """A request about these probes; None: all. Whatever may block it is reported too.

        Together with ``generate`` it has to run without an ``await`` in between: then no probe
        can be loaded that it does not know.

        Raises:
            RequestError: An unknown probe, or a wish that is looser than the policy.
        """
        reporter = self.reporter(names)
        chosen = [probe.name for probe in reporter.probes]
        rules = tightened(self.registry.rules, chosen, overrides or PolicyOverrides())
        blocking = [rule.name for rule in rules if rule.is_blocking]
        self.observer.trace.model = self.engine.model
        enforcement = Enforcement(rules, self.registry.timeout_s, self.observer)
        return RequestContext(self.reporter([*chosen, *blocking]), enforcement)

    def generate(
        self, messages: Conversation, sampling: Sampling, asked: RequestContext
    ) -> AsyncGenerator[Event, None]:
        """The events of an answer under the policy."""
        rules = asked.enforcement
        events = self.engine.generate(messages, sampling, watch=rules.watch, admits=rules.admits)
        return rules.guard(events, messages, is_prompt_known=asked.is_prompt_known)

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

    async def require_size(
        self, texts: Sequence[Conversation], *, n: int = 1, max_tokens: int | None = None
    ) -> None:
        """Checks that a request is within the limits of items and tokens.

        Args:
            texts: What is to be read.
            n: How often each.
            max_tokens: How much is to be written after each; None: as much as fits.

        Raises:
            RequestError: Too many texts, or too many tokens together.
            ContextLengthError: A text is longer than the context.
        """
        count = n * len(texts)
        if count > self.limits.batch_items:
            raise RequestError(
                f"{count} texts in one request, and {self.limits.batch_items} may be. Send them "
                "in several requests.",
                code="too_many_inputs",
            )
        limit = self.limits.request_tokens
        if limit is None:
            return
        read = [len((await self.engine.tokenize(text)).ids) for text in texts]
        written = [
            self.engine.max_tokens - size if max_tokens is None else max_tokens for size in read
        ]
        tokens = n * (sum(read) + sum(written))
        if tokens > limit:
            raise RequestError(
                f"The request may take {tokens} tokens, read and written, and {limit} are allowed. "
                "Shorten it, or ask for fewer with max_tokens.",
                code="request_too_large",
            )

    def reporter(self, names: Sequence[str] | None) -> Reporter:
        """Reports on the probes that a request names; None: on all.

        Raises:
            RequestError: An unknown name; a probe that does not run must not pass unnoticed.
        """
        loaded = {probe.name: probe for probe in self.probes}
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
        """The categories of all probes that clients hear of."""
        return CategoryNames.of(self.probes)

    def require_prompt_probe(self, probes: Sequence[Probe]) -> None:
        """Checks that a bare text can be judged: an empty answer would look harmless.

        Raises:
            RequestError: All of the probes wait for a response.
        """
        if all(probe.reads.includes_response for probe in probes):
            raise RequestError(
                "No chosen probe reads a prompt alone, so a text by itself cannot be judged. Load "
                "such a probe, or use /v1/chat/completions.",
                code="no_prompt_probe",
            )


def _context(request: Request) -> Context:
    context: Context = request.app.state.context
    return replace(context, observer=context.observer.of(request))


InContext = Annotated[Context, Depends(_context)]
