from typing import Any

from triton.backends.compiler import BaseBackend


class CPUBackend(BaseBackend):
    """Supports no target, since nothing is compiled."""

    @staticmethod
    def supports_target(target: Any) -> bool:
        return False

    def hash(self) -> str:
        return "interpreted"

    def parse_options(self, options: Any) -> None: ...

    def add_stages(self, extensions: Any, stages: Any, options: Any = None) -> None: ...

    def load_dialects(self, context: Any) -> None: ...

    def get_module_map(self) -> dict[str, Any]:
        return {}

    def get_codegen_implementation(self, options: Any) -> dict[str, Any]:
        return {}


CPUBackend.__abstractmethods__ = frozenset()
