"""The LLM as it is served: prefill and first token, its probes in the same pass."""

from collections.abc import Sequence

from sidelight.backbones import TransformersBackbone
from sidelight.bench.latency.subjects import Answer, Kind, module_bytes
from sidelight.engines.decoder import Decoder
from sidelight.engines.judging import Judges, TimedTaps
from sidelight.engines.stopwatch import Stopwatch
from sidelight.probe import Probe
from sidelight.prompts import EncodedPrompt


class Served:
    """What the engine's prefill does with a batch of requests, and the greedy next token.

    Args:
        name: Of the row.
        backbone: The LLM.
        probes: What judges the prompts; none makes this the base that others are compared with.
    """

    kind: Kind = "one pass"

    def __init__(self, name: str, backbone: TransformersBackbone, probes: Sequence[Probe] = ()):
        self.name = name
        self.weights_bytes = module_bytes(backbone.model) + sum(map(_probe_bytes, probes))
        self._decoder = Decoder(backbone)
        self._judges = Judges(probes, device=backbone.device)

    def accepts(self, batch: Sequence[EncodedPrompt]) -> bool:
        """Always."""
        return True

    def run(self, batch: Sequence[EncodedPrompt]) -> Answer:
        """One forward pass."""
        taps = self._judges.taps()
        logits, _ = self._decoder.read_prompts(batch, TimedTaps(taps, Stopwatch()))
        state = self._judges.read_prompts(taps, batch)
        judgements = self._judges.judge(state, range(len(batch)))
        tokens = tuple(logits.argmax(1).tolist())
        return Answer(tokens, tuple(judgement.verdicts for judgement in judgements))


def _probe_bytes(probe: Probe) -> int:
    """The mechanism, and its projection in the bank."""
    projection = probe.projection()
    served = projection.weight.nbytes + projection.shift.nbytes
    return module_bytes(probe.mechanism) + served
