"""What can be asked of a running worker, by ``collective_rpc``."""

from sidelight.errors import SidelightError
from sidelight.vllm_plugin import worker


class Control:
    """Methods that vLLM adds to its workers (``worker_extension_cls``)."""

    def sidelight_load(self, folders: list[str]) -> str | None:
        """Loads other probes; the caller resets the prefix cache, whose columns are the old ones'.

        Returns:
            What is wrong with them, the old probes then stay; None: nothing.
        """
        try:
            worker.INSTALLED.get().load(folders)
        except SidelightError as error:
            return str(error)
        return None

    def sidelight_bytes(self) -> tuple[int, int]:
        """Memory of the columns, and of keys and values, in this worker."""
        own = worker.INSTALLED.get()
        return own.size_bytes, own.cache_bytes
