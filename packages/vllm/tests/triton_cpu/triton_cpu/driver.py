from triton.backends.driver import DriverBase


class CPUDriver(DriverBase):
    """Is never the active driver: it only has a name, which vLLM looks for."""

    @classmethod
    def is_active(cls) -> bool:
        return False


CPUDriver.__abstractmethods__ = frozenset()
