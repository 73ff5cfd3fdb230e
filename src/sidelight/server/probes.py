"""The loaded probes with the rules that hold for them now, and how an operator changes them.

A change is prepared beside what serves and takes its place at once; one that fails changes nothing.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from sidelight.artifact import load_probe
from sidelight.engines.base import Engine
from sidelight.errors import SidelightError, did_you_mean
from sidelight.policy.rules import BoundRule, Policy, Rule, bound_rules, require_fitting_probe
from sidelight.probe import Probe
from sidelight.server.errors import RequestError

_log = logging.getLogger(__name__)

State = Literal["serving", "shadow", "disabled"]


@dataclass(frozen=True)
class Entry:
    """One probe as an operator sees it.

    Attributes:
        rule: The probe and its rule.
        state: Whether it runs, and whether clients hear of it.
        path: The artifact it came from; None: unknown.
        failure: Why its last reload failed; None: it did not, or there was none.
    """

    rule: BoundRule
    state: State
    path: Path | None
    failure: str | None


class ProbeRegistry:
    """Which probes are on duty, and under which rules.

    Args:
        engine: Runs the probes.
        policy: The rules.
        sources: The folders that probes were loaded from, by name.
    """

    def __init__(self, engine: Engine, policy: Policy, sources: Mapping[str, Path]):
        self._engine = engine
        self._policy = policy
        self._paths = dict(sources)
        self._shadows: dict[str, Rule] = {}
        self._disabled: dict[str, Probe] = {}
        self._failures: dict[str, str] = {}
        self._changing = asyncio.Lock()

    @property
    def timeout_s(self) -> float | None:
        """Seconds that verdicts may take where a rule blocks; None: any."""
        return self._policy.timeout_s

    @property
    def policy(self) -> Policy:
        """The rules, also of probes that do not run."""
        return self._policy

    @property
    def rules(self) -> tuple[BoundRule, ...]:
        """Every probe that runs, with its rule."""
        return tuple(map(self._ruled, bound_rules(self._policy, self._engine.probes)))

    @property
    def visible(self) -> Sequence[Probe]:
        """The probes that clients hear of: all but shadows."""
        return [bound.probe for bound in self.rules if not bound.is_shadow]

    @property
    def entries(self) -> list[Entry]:
        """Every probe, also those that do not run."""
        disabled = map(self._ruled, bound_rules(self._policy, self._disabled.values()))
        return [self._entry(bound) for bound in (*self.rules, *disabled)]

    def entry(self, name: str) -> Entry:
        """One of them.

        Raises:
            RequestError: 404; there is no such probe.
        """
        entries = {entry.rule.name: entry for entry in self.entries}
        if name not in entries:
            raise RequestError(
                f"Unknown probe '{name}'.{did_you_mean(name, entries)}",
                status=404,
                code="probe_not_found",
            )
        return entries[name]

    async def load(self, path: Path, *, shadow_of: str | None) -> Entry:
        """Serves one more probe; as a shadow it is called ``name@version``.

        Raises:
            RequestError: There is one of that name.
            SidelightError: It cannot be loaded, or does not fit.
        """
        async with self._changing:
            probe = await asyncio.to_thread(load_probe, path)
            name = probe.name if shadow_of is None else f"{probe.name}@{probe.version}"
            if any(entry.rule.name == name for entry in self.entries):
                raise RequestError(
                    f"There is a probe '{name}' already. Reload it, or load this one as a shadow.",
                    status=409,
                    code="probe_exists",
                )
            probe = replace(probe, name=name)
            if shadow_of is not None:
                self._require_fitting(probe, Rule("shadow", shadow_of=shadow_of))
                self._shadows[name] = Rule("shadow", shadow_of=shadow_of)
            else:
                self._require_fitting(probe)
            try:
                await self._engine.replace_probes([*self._engine.probes, probe])
            except BaseException:
                self._shadows.pop(name, None)
                raise
            self._paths[name] = path
            _log.warning("Loaded probe '%s', version %s.", name, probe.version)
            return self.entry(name)

    async def reload(self, name: str, path: Path | None) -> Entry:
        """Puts the artifact as it is now in the place of the probe that serves.

        Args:
            name: The probe that is replaced.
            path: Where the artifact is; None: where the probe came from.

        Raises:
            RequestError: No such probe, or no folder is known.
            SidelightError: It cannot be loaded, or does not fit; the old one serves on.
        """
        async with self._changing:
            entry = self.entry(name)
            source = path or entry.path
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
                _require_same_labels(probe, entry.rule.probe)
                self._require_fitting(probe, self._shadows.get(name))
                new = [probe if old.name == name else old for old in self._engine.probes]
                await self._engine.replace_probes(new)
            except SidelightError as error:
                self._failures[name] = str(error)
                _log.error("Probe '%s' could not be reloaded; the last good one serves on.", name)
                raise
            self._paths[name] = source
            self._failures.pop(name, None)
            before = entry.rule.probe.version
            _log.warning("Reloaded probe '%s': %s is now %s.", name, before, probe.version)
            return self.entry(name)

    async def disable(self, name: str) -> Entry:
        """Stops the probe; nothing follows from its rule until it is enabled."""
        async with self._changing:
            self.entry(name)
            gone = [probe for probe in self._engine.probes if probe.name == name]
            await self._engine.replace_probes(self._others(name))
            self._disabled.update({probe.name: probe for probe in gone})
            _log.warning("Disabled probe '%s'.", name)
            return self.entry(name)

    async def enable(self, name: str) -> Entry:
        """Runs a disabled probe as before; a shadow that runs comes under the policy's rule."""
        async with self._changing:
            self.entry(name)
            probe = self._disabled.get(name)
            if probe is None:
                self._shadows.pop(name, None)
            else:
                await self._engine.replace_probes([*self._engine.probes, probe])
                del self._disabled[name]
            _log.warning("Enabled probe '%s'.", name)
            return self.entry(name)

    async def shadow(self, name: str, *, shadow_of: str | None) -> Entry:
        """Hides the probe from clients; it goes on to be counted, and nothing follows from it.

        Raises:
            SidelightError: It cannot be the shadow of that probe.
        """
        async with self._changing:
            entry = self.entry(name)
            rule = replace(entry.rule.rule, mode="shadow", shadow_of=shadow_of)
            require_fitting_probe(BoundRule(entry.rule.probe, rule), self._engine.probes)
            self._shadows[name] = rule
            _log.warning("Probe '%s' is a shadow now.", name)
            return self.entry(name)

    async def remove(self, name: str) -> Entry:
        """Forgets the probe, and gives the entry that it had."""
        async with self._changing:
            entry = self.entry(name)
            if name not in self._disabled:
                await self._engine.replace_probes(self._others(name))
            for known in (self._disabled, self._shadows, self._paths, self._failures):
                known.pop(name, None)
            _log.warning("Removed probe '%s'.", name)
            return entry

    def _others(self, name: str) -> list[Probe]:
        return [probe for probe in self._engine.probes if probe.name != name]

    def _require_fitting(self, probe: Probe, rule: Rule | None = None) -> None:
        (bound,) = bound_rules(self._policy, [probe])
        bound = bound if rule is None else BoundRule(probe, rule)
        self._policy.require_side(probe.name, bound.side)
        require_fitting_probe(bound, [*self._others(probe.name), probe])

    def _ruled(self, bound: BoundRule) -> BoundRule:
        shadow = self._shadows.get(bound.name)
        return bound if shadow is None else BoundRule(bound.probe, shadow)

    def _entry(self, bound: BoundRule) -> Entry:
        name = bound.name
        state: State = "shadow" if bound.is_shadow else "serving"
        return Entry(
            bound,
            "disabled" if name in self._disabled else state,
            self._paths.get(name),
            self._failures.get(name),
        )


def _require_same_labels(new: Probe, old: Probe) -> None:
    if new.task != old.task:
        raise SidelightError(
            f"Probe '{old.name}' tells {', '.join(old.task.labels)}, and the new one "
            f"{', '.join(new.task.labels)}: rules and series of that name would change their "
            "meaning. Load it under a name of its own."
        )
