"""Probes on disk, where vLLM's processes find them."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from sidelight.artifact import save_probe
from sidelight.probe import Probe


class Shelf:
    """A folder of this process, gone when it is closed or the process ends."""

    def __init__(self) -> None:
        self._root = tempfile.TemporaryDirectory(prefix="sidelight-probes-")

    def put(self, probes: Sequence[Probe]) -> list[str]:
        """Folders that hold these probes."""
        root = Path(tempfile.mkdtemp(dir=self._root.name))
        return [str(save_probe(probe, root / str(i))) for i, probe in enumerate(probes)]

    def close(self) -> None:
        """Removes it."""
        self._root.cleanup()
