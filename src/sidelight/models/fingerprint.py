"""The identity of a backbone: hashes of what decides its hidden states.

``checkpoint.py`` takes the fingerprint of a model.
"""

import json
import os
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

from sidelight.errors import FingerprintMismatchError, SidelightError


@dataclass(frozen=True)
class Fingerprint:
    """Identifies a backbone: fingerprints that agree mean equal hidden states for a probe.

    Configuration and weights are hashed as the model's files hold them, which no version of
    ``transformers`` changes.

    Attributes:
        name: What the user called it; not compared.
        config: Hash of the entries of ``config.json``.
        weights: Hash of values sampled from every weight, rounded to bf16, so that the same
            weights in another dtype are the same backbone.
        tokenizer: Hash of the vocabulary and of the ids of a sample text.
        template: Hash of the chat template, or ``raw``.
        layers: Hidden states that a probe reads: the embedding output and one per block.
        width: Size of a hidden state.
        dtype: Dtype of the weights; not compared, since it changes verdicts only by rounding.
    """

    name: str
    config: str
    weights: str
    tokenizer: str
    template: str
    layers: int
    width: int
    dtype: str

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits that identify the model's files, tokenizer and template."""
        compared = {name: getattr(self, name) for name in _COMPARED}
        return sha256(repr(compared).encode()).hexdigest()[:12]

    def first_layers(self, layers: int | None) -> int:
        """Number of hidden states to read per token, from the embedding up; None reads all.

        Raises:
            SidelightError: The model has fewer layers.
        """
        if layers is not None and layers > self.layers:
            raise SidelightError(
                f"Cannot read {layers} layers: the model has {self.layers} hidden states. Set "
                f"layers to at most {self.layers}."
            )
        return layers or self.layers

    def require(self, served: "Fingerprint", *, probe: str, accepted: str | None = None) -> None:
        """Check that ``served`` is the backbone that the probe was trained on.

        Args:
            served: Backbone that would run the probe.
            probe: Name of the probe.
            accepted: Digest of a backbone and a quantised copy on which its probes may be served;
                "" if unset. None if copies cannot be served.

        Raises:
            FingerprintMismatchError: It is a different backbone; the message names both and what
                differs.
        """
        different = self.differences(served)
        if not different:
            return
        both = (
            f"Probe '{probe}' was trained on {self.name} (fingerprint {self.digest}), but this "
            f"backbone is {served.name} ({served.digest}); they differ in {', '.join(different)}"
        )
        if accepted is None or not _MAY_DIFFER.issuperset(different):
            raise FingerprintMismatchError(
                f"{both}. Train the probe on this model, or serve the other."
            )
        digest = hash_of(self.digest, served.digest)
        if digest != accepted:
            raise FingerprintMismatchError(
                f"{both}, and {ACCEPTED} is {accepted or 'not set'}. If one is a quantised copy of "
                f"the other, {ACCEPTED}={digest} accepts the model's probes on the copy. Set it, "
                "and run 'sidelight parity PROBE ... --data FILE --quantised "
                f"{served.name} --gate 0.01' with every --engine-option that you serve with. Serve "
                "the probes only if it exits with 0. Otherwise train the probe on this model, or "
                "serve the other."
            )

    def differences(self, served: "Fingerprint") -> list[str]:
        """The attributes in which ``served`` differs; empty if it is the same backbone."""
        return [name for name in _COMPARED if getattr(self, name) != getattr(served, name)]

    def quantised(self, how: str) -> "Fingerprint":
        """The fingerprint under an engine that quantises the weights while loading them.

        Args:
            how: What determines the quantisation, such as the engine's options.
        """
        return replace(self, weights=hash_of(self.weights, how))


ACCEPTED = "SIDELIGHT_QUANTISED"
"""Environment variable with the digest of a model and the quantised copy that accepts its probes.
"""


def accepted_copy() -> str:
    """The digest in this variable; "" if unset."""
    return os.environ.get(ACCEPTED, "")


# A quantised copy differs in its weights and in the configuration that describes their format.
_MAY_DIFFER = frozenset({"config", "weights"})
_COMPARED = ("config", "weights", "tokenizer", "template", "layers", "width")


def hash_of(*values: Any) -> str:
    """Sixteen hexadecimal digits that identify these JSON values."""
    text = json.dumps(values, sort_keys=True, default=str, ensure_ascii=True)
    return sha256(text.encode()).hexdigest()[:16]
