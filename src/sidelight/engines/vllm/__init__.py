"""The engine for production: vLLM with the plugin, behind our own HTTP layer."""

from sidelight.engines.vllm.engine import VllmEngine
from sidelight.engines.vllm.loading import load_vllm_engine

__all__ = ["VllmEngine", "load_vllm_engine"]
