"""The verdicts of a probe on many texts, from vLLM's own batches."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sidelight.artifact import save_probe
from sidelight.classifier import Classifier, as_example, encode
from sidelight.data import Example
from sidelight.engines.vllm.offline import Offline, OfflineRequest
from sidelight.engines.vllm.requests import judgement
from sidelight.errors import ContextLengthError, VerdictError
from sidelight.probe import Probe
from sidelight.progress import progress
from sidelight.prompts import EncodedPrompt
from sidelight.types import Verdict
from sidelight.vllm_plugin.params import request_params


def predict(
    classifier: Classifier,
    texts: Sequence[str | Example],
    *,
    options: Mapping[str, Any] | None = None,
) -> list[Verdict]:
    """The verdict on each text, in their order.

    Args:
        classifier: The probe; its backbone says which weights, and runs nothing itself.
        texts: As ``Classifier.predict`` takes them.
        options: Fields of vLLM's ``EngineArgs``.

    Raises:
        ContextLengthError: A text is longer than the backbone reads, or leaves no room for the
            token that vLLM always writes; none is cut.
        VerdictError: A verdict cannot be computed.
        SidelightError: As ``Offline.start``, and where vLLM stops.
    """
    given, probe, backbone = dict(options or {}), classifier.probe, classifier.backbone
    prompts = encode(backbone, [as_example(text) for text in texts])
    most = min(backbone.encoder.max_tokens, int(given.get("max_model_len", 10**9)))
    _require_room(prompts, most)
    with TemporaryDirectory(prefix="sidelight-probe-") as folder:
        # A probe that was just trained has no folder that vLLM's processes could read.
        config = {
            "probes": [str(save_probe(probe, Path(folder)))],
            "fingerprint": asdict(backbone.fingerprint),
        }
        with closing(Offline.start(backbone, config, given)) as llm:
            return _judged(llm, probe, prompts)


def _judged(llm: Offline, probe: Probe, prompts: Sequence[EncodedPrompt]) -> list[Verdict]:
    requests = (OfflineRequest(i, p, request_params(p)) for i, p in enumerate(prompts))
    verdicts: dict[int, Verdict] = {}
    with progress("Judging", sum(map(len, prompts)), unit="tokens") as shown:
        for request, output in llm.run(requests):
            verdicts[request.index] = _verdict(probe, output)
            shown.advance(len(request.prompt))
    return [verdicts[i] for i in range(len(prompts))]


def _verdict(probe: Probe, output: Any) -> Verdict:
    judged = judgement(output.kv_transfer_params)
    if not judged.verdicts:
        raise VerdictError(
            f"Probe '{probe.name}' gave no verdict. Either the text has no token that the probe "
            "reads, or the backbone's arithmetic overflowed."
        )
    return judged.verdicts[0]


def _require_room(prompts: Sequence[EncodedPrompt], most: int) -> None:
    longest = max(map(len, prompts), default=0)
    if longest >= most:
        raise ContextLengthError(
            f"A text has {longest} tokens with its template, but vLLM reads at most {most - 1} "
            "here. Shorten it, or raise --engine-option max_model_len."
        )
