"""The engine for production: vLLM with the plugin, behind our own HTTP layer or offline."""

from sidelight.engines.vllm.engine import VllmEngine
from sidelight.engines.vllm.loading import load_vllm_engine
from sidelight.engines.vllm.predicting import predict
from sidelight.engines.vllm.source import VllmSource

__all__ = ["VllmEngine", "VllmSource", "load_vllm_engine", "predict"]
