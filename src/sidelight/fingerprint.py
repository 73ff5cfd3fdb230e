"""Which backbone a probe belongs to: hashes of what decides its hidden states."""

import json
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

import torch
from transformers import PreTrainedModel

from sidelight.errors import FingerprintMismatchError
from sidelight.prompts import PromptFormat

_NOT_COMPARED = ("name", "dtype")


@dataclass(frozen=True)
class Fingerprint:
    """Identifies a backbone: equal fingerprints mean equal hidden states for a probe.

    Attributes:
        name: What the user called it; not compared.
        config: Hash of the architecture's configuration.
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
        """Twelve hexadecimal digits that stand for all compared fields."""
        return sha256(repr(self._compared()).encode()).hexdigest()[:12]

    def require(self, served: "Fingerprint", *, probe: str) -> None:
        """Checks that ``served`` is the backbone that the probe was trained on.

        Raises:
            FingerprintMismatchError: It is not; the message names both and what differs.
        """
        theirs = served._compared()
        different = [name for name, value in self._compared().items() if value != theirs[name]]
        if different:
            raise FingerprintMismatchError(
                f"Probe '{probe}' was trained on {self.name} (fingerprint {self.digest}), but this "
                f"backbone is {served.name} ({served.digest}); they differ in "
                f"{', '.join(different)}. Train the probe on this model, or serve the other."
            )

    def _compared(self) -> dict[str, str | int]:
        return {name: value for name, value in asdict(self).items() if name not in _NOT_COMPARED}


# Entries of a configuration that do not change what the model computes.
_VOLATILE = {
    "_name_or_path", "architectures", "attn_implementation", "dtype", "torch_dtype",
    "transformers_version", "use_cache", "name_or_path",
}  # fmt: skip
_SAMPLE = "The quick brown fox, 1234567890 times: jumps!\n\tüber Straßen 你好"
_VALUES_PER_WEIGHT = 16


def fingerprint(
    model: PreTrainedModel, tokenizer: Any, *, name: str, prompt_format: PromptFormat
) -> Fingerprint:
    """The fingerprint of a loaded model; takes well under a second."""
    config = model.config.get_text_config()
    stable = {
        key: value
        for key, value in config.to_dict().items()
        if key not in _VOLATILE and not key.startswith("_")
    }
    template = "raw" if prompt_format == "raw" else _hash(str(tokenizer.chat_template))
    return Fingerprint(
        name=name,
        config=_hash(stable),
        weights=_weights_hash(model),
        tokenizer=_hash(sorted(tokenizer.get_vocab().items()), tokenizer(_SAMPLE)["input_ids"]),
        template=template,
        layers=config.num_hidden_layers + 1,
        width=config.hidden_size,
        dtype=str(model.dtype).removeprefix("torch."),
    )


def _weights_hash(model: PreTrainedModel) -> str:
    """Hash of each weight's name, shape, and a few values spread over its length."""
    digest = sha256()
    for key, weight in sorted(model.state_dict().items()):
        step = max(1, weight.numel() // _VALUES_PER_WEIGHT)
        sample = weight.flatten()[::step].to(torch.bfloat16).view(torch.int16).cpu()
        digest.update(f"{key}{tuple(weight.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def _hash(*values: Any) -> str:
    text = json.dumps(values, sort_keys=True, default=str, ensure_ascii=True)
    return sha256(text.encode()).hexdigest()[:16]
