"""Inference engines: text and verdicts from one forward pass, for many requests at a time."""

from sidelight.engines.base import (
    Engine,
    EngineBusyError,
    EngineUnavailableError,
    GenerationError,
    Load,
    LoadedProbe,
    Sampling,
    Tokens,
)
from sidelight.engines.events import Event, Finished, PromptJudged, ResponseScored, TextDelta
from sidelight.engines.line import Limits
from sidelight.engines.loading import LoadingEngine
from sidelight.engines.logprobs import Candidate, Spelling, TokenLogprobs
from sidelight.engines.transformers import TransformersEngine

__all__ = [
    "Candidate",
    "Engine",
    "EngineBusyError",
    "EngineUnavailableError",
    "Event",
    "Finished",
    "GenerationError",
    "Limits",
    "Load",
    "LoadedProbe",
    "LoadingEngine",
    "PromptJudged",
    "ResponseScored",
    "Sampling",
    "Spelling",
    "TextDelta",
    "TokenLogprobs",
    "Tokens",
    "TransformersEngine",
]
