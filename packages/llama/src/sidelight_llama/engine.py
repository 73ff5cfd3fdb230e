"""The llama.cpp engine: the loop of ``LocalEngine`` over a GGUF file."""

from collections.abc import Sequence
from dataclasses import replace

from sidelight.engines.local import LocalEngine
from sidelight.engines.queue import Limits
from sidelight.probes.probe import Probe
from sidelight_llama.backbone import LlamaBackbone
from sidelight_llama.decoder import LlamaDecoder


def llama_limits(*, texts: int = 2, tokens: int = 4096) -> Limits:
    """Limits of an engine; llama.cpp takes the memory of all keys and values at the start.

    By default, it is 0.3 GB for the embedded model, and over 1 GB for one of three billion
    parameters.

    Args:
        texts: How many are written at once.
        tokens: The most of each, with its prompt.
    """
    return Limits(running=texts, prefill_tokens=256, cache_tokens=(texts + 1) * tokens)


class LlamaEngine(LocalEngine):
    """Serves one GGUF file with its probes.

    Each running text has an equal part of ``limits.cache_tokens``, and so has the prompt that is
    only judged. A longer text is refused.

    Args:
        backbone: The file. Nothing else may run it meanwhile.
        probes: Probes trained on this file, with distinct names.
        limits: How much is held at once; None: as ``llama_limits`` has it.
        model: As for ``LocalEngine``.

    Raises:
        SidelightError: There is not enough memory.
    """

    def __init__(
        self,
        backbone: LlamaBackbone,
        probes: Sequence[Probe],
        *,
        limits: Limits | None = None,
        model: str | None = None,
    ):
        # A prompt at a time, so that those that are only judged need one sequence.
        limits = replace(limits or llama_limits(), prefill_texts=1)
        sequences = limits.running + 1
        positions = min(backbone.encoder.max_tokens, limits.cache_tokens // sequences)
        context = backbone.context(sequences=sequences, positions=positions)
        served = backbone.limited(positions)
        super().__init__(served, LlamaDecoder(context), probes, limits=limits, model=model)
