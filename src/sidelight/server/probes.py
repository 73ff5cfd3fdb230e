"""The loaded probes with the rules that hold for them now, and how an operator changes them.

A change is prepared beside what serves and takes effect at once; one that fails changes nothing.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from sidelight.artifact import load_probe
from sidelight.engines.base import Engine
from sidelight.errors import SidelightError, did_you_mean
from sidelight.policy.rules import BoundRule, Policy, Rule, bound_rules, require_rule_applies
from sidelight.probe import Probe
from sidelight.server.errors import RequestError

_log = logging.getLogger(__name__)

State = Literal["serving", "shadow", "disabled"]


class ProbeEntry(BaseModel):
    """One probe: what it is, what follows from its verdicts, and how its last change went."""

    name: str
    version: str
    kind: str
    labels: list[str]
    reads: str
    side: str
    state: State
    mode: str
    thresholds: dict[str, float]
    shadow_of: str | None
    path: str | None
    failure: str | None


class ProbeRegistry:
    """Which probes run, and under which rules.

    Args:
        engine: Runs the probes.
        policy: The rules, also of probes that do not run.
        sources: The folders that probes were loaded from, by name.
    """

    def __init__(self, engine: Engine, policy: Policy, sources: Mapping[str, Path]):
        self.policy = policy
        self._engine = engine
        self._paths = dict(sources)
        self._shadows: dict[str, Rule] = {}
        self._disabled: dict[str, Probe] = {}
        self._failures: dict[str, str] = {}
        self._changing = asyncio.Lock()

    @property
    def rules(self) -> tuple[BoundRule, ...]:
        """Every probe that runs, with its rule."""
        return self._bound(self._engine.probes)

    @property
    def all_rules(self) -> tuple[BoundRule, ...]:
        """Every probe with its rule, those that do not run last."""
        return (*self.rules, *self._bound(list(self._disabled.values())))

    @property
    def visible(self) -> Sequence[Probe]:
        """The probes that clients see: all but shadows."""
        return [bound.probe for bound in self.rules if not bound.is_shadow]

    @property
    def entries(self) -> list[ProbeEntry]:
        """Every probe, those that do not run last."""
        return [self._entry(bound) for bound in self.all_rules]

    def entry(self, name: str) -> ProbeEntry:
        return self._entry(self._known(name))

    async def load(self, path: Path, *, shadow_of: str | None) -> ProbeEntry:
        """Serves one more probe; as a shadow it is called ``name@version``.

        Raises:
            RequestError: There is one of that name.
            SidelightError: It cannot be loaded, or does not fit.
        """
        async with self._changing:
            probe = await asyncio.to_thread(load_probe, path)
            name = probe.name if shadow_of is None else f"{probe.name}@{probe.version}"
            if any(bound.name == name for bound in self.all_rules):
                raise RequestError(
                    f"There is a probe '{name}' already. Reload it, or load this one as a shadow.",
                    status=409,
                    code="probe_exists",
                )
            probe = replace(probe, name=name)
            rule = None if shadow_of is None else Rule("shadow", shadow_of=shadow_of)
            self._require_rule_applies(probe, rule)
            if rule is not None:
                self._shadows[name] = rule
            try:
                await self._engine.replace_probes([*self._engine.probes, probe])
            except BaseException:
                self._shadows.pop(name, None)
                raise
            self._paths[name] = path
            _log.warning("Loaded probe '%s', version %s.", name, probe.version)
            return self.entry(name)

    async def reload(self, name: str, path: Path | None) -> ProbeEntry:
        """Replaces the probe that serves by the artifact as it is now.

        Args:
            name: The probe that is replaced.
            path: Where the artifact is; None: where the probe came from.

        Raises:
            RequestError: No such probe, it is disabled, or no folder is known.
            SidelightError: It cannot be loaded, or does not fit; the old one serves on.
        """
        async with self._changing:
            old = self._known(name).probe
            source = path or self._paths.get(name)
            if name in self._disabled:
                raise RequestError(
                    f"Probe '{name}' is disabled, so its successor cannot be tried. Enable it.",
                    status=409,
                    code="probe_disabled",
                )
            if source is None:
                raise RequestError(
                    f"Probe '{name}' was not loaded from a folder. Name one as 'path'.",
                    code="path_needed",
                )
            try:
                probe = replace(await asyncio.to_thread(load_probe, source), name=name)
                if probe.task != old.task:
                    raise SidelightError(
                        f"Probe '{name}' has the labels {', '.join(old.task.labels)}, but the new "
                        f"one has {', '.join(probe.task.labels)}. Rules and metrics of this name "
                        "would change their meaning. Load it under another name."
                    )
                self._require_rule_applies(probe, self._shadows.get(name))
                new = [probe if one.name == name else one for one in self._engine.probes]
                await self._engine.replace_probes(new)
            except SidelightError as error:
                self._failures[name] = str(error)
                _log.error("Probe '%s' could not be reloaded; the last good one serves on.", name)
                raise
            self._paths[name] = source
            self._failures.pop(name, None)
            _log.warning("Reloaded probe '%s': %s is now %s.", name, old.version, probe.version)
            return self.entry(name)

    async def disable(self, name: str) -> ProbeEntry:
        """Stops the probe; nothing follows from its rule until it is enabled."""
        async with self._changing:
            probe = self._known(name).probe
            await self._engine.replace_probes(self._others(name))
            self._disabled[name] = probe
            _log.warning("Disabled probe '%s'.", name)
            return self.entry(name)

    async def enable(self, name: str) -> ProbeEntry:
        """Runs a disabled probe as before; a shadow that runs returns to the policy's rule."""
        async with self._changing:
            self._known(name)
            if name in self._disabled:
                await self._engine.replace_probes([*self._engine.probes, self._disabled[name]])
                del self._disabled[name]
            else:
                self._shadows.pop(name, None)
            _log.warning("Enabled probe '%s'.", name)
            return self.entry(name)

    async def shadow(self, name: str, *, shadow_of: str | None) -> ProbeEntry:
        """Hides the probe from clients; it is still counted, and nothing follows from it.

        Raises:
            SidelightError: It cannot be the shadow of that probe.
        """
        async with self._changing:
            bound = self._known(name)
            rule = replace(bound.rule, mode="shadow", shadow_of=shadow_of)
            require_rule_applies(BoundRule(bound.probe, rule), self._engine.probes)
            self._shadows[name] = rule
            _log.warning("Probe '%s' is a shadow now.", name)
            return self.entry(name)

    async def remove(self, name: str) -> ProbeEntry:
        """Forgets the probe, and returns the entry that it had."""
        async with self._changing:
            entry = self.entry(name)
            if name not in self._disabled:
                await self._engine.replace_probes(self._others(name))
            for known in (self._disabled, self._shadows, self._paths, self._failures):
                known.pop(name, None)
            _log.warning("Removed probe '%s'.", name)
            return entry

    def _known(self, name: str) -> BoundRule:
        known = {bound.name: bound for bound in self.all_rules}
        if name not in known:
            raise RequestError(
                f"Unknown probe '{name}'.{did_you_mean(name, known)}",
                status=404,
                code="probe_not_found",
            )
        return known[name]

    def _others(self, name: str) -> list[Probe]:
        return [probe for probe in self._engine.probes if probe.name != name]

    def _require_rule_applies(self, probe: Probe, rule: Rule | None) -> None:
        (bound,) = bound_rules(self.policy, [probe])
        bound = bound if rule is None else BoundRule(probe, rule)
        self.policy.require_side(probe.name, bound.side)
        require_rule_applies(bound, [*self._others(probe.name), probe])

    def _bound(self, probes: Sequence[Probe]) -> tuple[BoundRule, ...]:
        return tuple(
            BoundRule(bound.probe, self._shadows.get(bound.name, bound.rule))
            for bound in bound_rules(self.policy, probes)
        )

    def _entry(self, bound: BoundRule) -> ProbeEntry:
        name, probe = bound.name, bound.probe
        state: State = "shadow" if bound.is_shadow else "serving"
        path = self._paths.get(name)
        return ProbeEntry(
            name=name,
            version=probe.version,
            kind=probe.task.kind,
            labels=list(probe.task.labels),
            reads=probe.reads.side,
            side=bound.side,
            state="disabled" if name in self._disabled else state,
            mode=bound.mode,
            thresholds=dict(bound.thresholds),
            shadow_of=bound.shadow_of,
            path=None if path is None else str(path),
            failure=self._failures.get(name),
        )
