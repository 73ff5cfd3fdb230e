"""The llama.cpp engine: the loop of ``LocalEngine`` over a GGUF file."""

from collections.abc import Sequence
from dataclasses import replace

from sidelight.engines.local import LocalEngine
from sidelight.engines.queue import Limits
from sidelight.probes.probe import Probe
from sidelight_llama.backbone import LlamaBackbone
from sidelight_llama.decoder import LlamaDecoder


def llama_limits(*, texts: int = 2, tokens: int = 4096) -> Limits:
    """The limits of an engine; llama.cpp allocates all keys and values at startup.

    By default, this takes 0.3 GB for the embedded model, and more than 1 GB for a model with three
    billion parameters.

    Args:
        texts: Number of texts generated at once.
        tokens: Maximum tokens of each, including the prompt.
    """
    return Limits(running=texts, prefill_tokens=256, cache_tokens=(texts + 1) * tokens)


class LlamaEngine(LocalEngine):
    """Serves one GGUF file with its probes.

    Each running text has an equal share of ``limits.cache_tokens``, as has a prompt that is only
    classified. A longer text is refused.

    Args:
        backbone: The file. Nothing else may run it at the same time.
        probes: Probes trained on this file, with distinct names.
        limits: Limits of concurrent work; None uses ``llama_limits``.
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
        # One prompt at a time, so that classification needs only one sequence.
        limits = replace(limits or llama_limits(), prefill_texts=1)
        sequences = limits.running + 1
        positions = min(backbone.encoder.max_tokens, limits.cache_tokens // sequences)
        context = backbone.context(sequences=sequences, positions=positions)
        served = backbone.limited(positions)
        super().__init__(served, LlamaDecoder(context), probes, limits=limits, model=model)
