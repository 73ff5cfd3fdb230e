"""The served probes and their rules, which are replaced atomically."""

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path

from sidelight.engines.base import Engine
from sidelight.guards import probe_folders
from sidelight.policy.rules import (
    BoundRule,
    Policy,
    bound_rules,
    read_policy,
    require_policy_applies,
)
from sidelight.probes.artifact import load_probe
from sidelight.probes.card import read_card, require_distinct_names
from sidelight.probes.probe import Probe
from sidelight.server.config import ServerConfig
from sidelight.server.judging import Judges, deferred_to

_log = logging.getLogger(__name__)


class ProbeRegistry:
    """The loaded probes with their rules.

    Args:
        engine: Engine that runs the probes.
        config: Configuration with the policy, and the folders for reloading probes.

    Attributes:
        folders: Folders of the probes by name.
        judges: Judges for rules that defer.

    Raises:
        SidelightError: A judge has no key, or is this server.
    """

    def __init__(self, engine: Engine, config: ServerConfig):
        self._engine = engine
        self._policy, self._policy_path = config.loaded_policy, config.policy
        self.judges = Judges(config)
        self.judges.prepare(self._policy)
        self.folders = {read_card(folder).name: folder for folder in config.probe}
        # The versions and policy of a replacement in progress, which the engine may or may not have
        # yet.
        self._incoming: tuple[list[str], Policy] | None = None
        self._has_hidden_scores = False
        self._changing = asyncio.Lock()

    @property
    def policy(self) -> Policy:
        """The policy of the engine's current probes, even during a replacement."""
        if self._incoming is not None and self._incoming[0] == _versions(self._engine.probes):
            return self._incoming[1]
        return self._policy

    @property
    def rules(self) -> tuple[BoundRule, ...]:
        """Every loaded probe with its rule."""
        return bound_rules(self.policy, self._engine.probes)

    @property
    def hides_scores(self) -> bool:
        """Whether a rule withholds, or has withheld, what the metrics would reveal to clients.

        The metrics keep the counts of earlier rules.
        """
        return self._has_hidden_scores or not all(bound.discloses_scores() for bound in self.rules)

    @property
    def defers(self) -> bool:
        """Whether a rule defers to a judge."""
        return bool(deferred_to(self.policy))

    async def replace(
        self, folders: Sequence[Path] | None = None, policy_path: Path | None = None
    ) -> None:
        """Replace the probes and the policy; on failure, nothing changes.

        Args:
            folders: Folders of all probes; None reloads the served ones.
            policy_path: Policy file; None reloads the current one.

        Raises:
            SidelightError: A probe or the policy cannot be read, or they do not fit each other or
                the model.
        """
        async with self._changing:
            path = policy_path or self._policy_path
            policy = self._policy if path is None else read_policy(path)
            probes, paths = await asyncio.to_thread(self._read, folders)
            require_distinct_names([probe.name for probe in probes])
            require_policy_applies(policy, probes)
            await asyncio.to_thread(self.judges.prepare, policy)
            self._has_hidden_scores = self.hides_scores
            if _versions(probes) != _versions(self._engine.probes):
                self._incoming = _versions(probes), policy
            try:
                await self._engine.replace_probes(probes)
            finally:
                self._incoming = None
            self._policy, self._policy_path, self.folders = policy, path, paths
            served = ", ".join(f"{probe.name} {probe.version}" for probe in probes)
            _log.warning("Replaced the probes and the policy; serving: %s.", served or "none")

    def _read(self, folders: Sequence[Path] | None) -> tuple[list[Probe], dict[str, Path]]:
        if folders is None:
            served = [(self.folders.get(probe.name), probe) for probe in self._engine.probes]
            pairs = [(load_probe(path) if path else probe, path) for path, probe in served]
        else:
            model = next((probe.card.backbone for probe in self._engine.probes), None)
            named = probe_folders(folders, model and model.name, model and (lambda: model.digest))
            pairs = [(load_probe(folder), folder) for folder in named]
        # A reloaded probe may have another name.
        return [probe for probe, _ in pairs], {probe.name: path for probe, path in pairs if path}


def _versions(probes: Sequence[Probe]) -> list[str]:
    return [f"{probe.name} {probe.version}" for probe in probes]
