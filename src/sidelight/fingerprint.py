"""Which backbone a probe belongs to: hashes of what decides its hidden states."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Annotated, Any

from pydantic import Field
from transformers import PreTrainedConfig, PreTrainedModel

from sidelight.checkpoint import Checkpoint, Sample, sample
from sidelight.errors import FingerprintMismatchError
from sidelight.prompts import PromptFormat

# Left out of a manifest if it is None, so that a manifest without it stays as it was written.
_LoadedHash = Annotated[str | None, Field(exclude_if=lambda value: value is None)]


@dataclass(frozen=True)
class Fingerprint:
    """Identifies a backbone: fingerprints that agree mean equal hidden states for a probe.

    Configuration and weights are each hashed as the model's files hold them, which no version of
    ``transformers`` changes, and as ``transformers`` holds them once they are loaded, which saving
    them in another form does not change. One of the two has to agree.

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
        loaded_config: Hash of the configuration with the defaults of ``transformers``. None in
            older artifacts, whose ``config`` is this one.
        loaded_weights: Hash of the weights under the names of ``transformers``. None if it is that
            of ``weights``, if the model was not loaded, and in older artifacts, whose ``weights``
            is this one.
    """

    name: str
    config: str
    weights: str
    tokenizer: str
    template: str
    layers: int
    width: int
    dtype: str
    loaded_config: _LoadedHash = None
    loaded_weights: _LoadedHash = None

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits that stand for the model's files, tokenizer and template."""
        compared = {name: getattr(self, name) for name in _COMPARED}
        return sha256(repr(compared).encode()).hexdigest()[:12]

    def require(self, served: "Fingerprint", *, probe: str) -> None:
        """Checks that ``served`` is the backbone that the probe was trained on.

        Raises:
            FingerprintMismatchError: It is not; the message names both and what differs.
        """
        if different := self.differences(served):
            raise FingerprintMismatchError(
                f"Probe '{probe}' was trained on {self.name} (fingerprint {self.digest}), but this "
                f"backbone is {served.name} ({served.digest}); they differ in "
                f"{', '.join(different)}. Train the probe on this model, or serve the other."
            )

    def differences(self, served: "Fingerprint") -> list[str]:
        """The attributes in which ``served`` is another backbone; none if it is the same."""
        return [name for name in _COMPARED if not self._known(name) & served._known(name)]

    def quantised(self, how: str) -> "Fingerprint":
        """The fingerprint if an engine quantises the weights while it loads them.

        Args:
            how: What decides it, such as the engine's options.
        """
        return replace(self, weights=_hash(self.weights, how), loaded_weights=None)

    def _known(self, name: str) -> set[Any]:
        return {getattr(self, name), getattr(self, f"loaded_{name}", None)} - {None}


_COMPARED = ("config", "weights", "tokenizer", "template", "layers", "width")
# Entries of a configuration that do not change what the model computes.
_VOLATILE = {
    "_name_or_path", "architectures", "attn_implementation", "dtype", "torch_dtype",
    "transformers_version", "use_cache", "name_or_path",
}  # fmt: skip
_SAMPLE = "The quick brown fox, 1234567890 times: jumps!\n\tüber Straßen 你好"


def fingerprint(
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    name: str,
    prompt_format: PromptFormat,
    checkpoint: Checkpoint | None = None,
) -> Fingerprint:
    """The fingerprint of a loaded model; takes well under a second.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        name: What the user calls it.
        prompt_format: How texts are rendered.
        checkpoint: The files that the model was loaded from; None takes what would be saved.
    """
    who = checkpoint_fingerprint(
        checkpoint or Checkpoint.of(model),
        model.config,
        tokenizer,
        name=name,
        prompt_format=prompt_format,
    )
    loaded = _weights_hash({key: sample(weight) for key, weight in model.state_dict().items()})
    return replace(
        who,
        dtype=str(model.dtype).removeprefix("torch."),
        loaded_weights=None if loaded == who.weights else loaded,
    )


def checkpoint_fingerprint(
    checkpoint: Checkpoint,
    config: PreTrainedConfig,
    tokenizer: Any,
    *,
    name: str,
    prompt_format: PromptFormat,
) -> Fingerprint:
    """The fingerprint of a model that need not be loaded.

    Args:
        checkpoint: Its files.
        config: Its configuration, as ``transformers`` reads it.
        tokenizer: Its tokenizer.
        name: What the user calls it.
        prompt_format: How texts are rendered.
    """
    text = config.get_text_config()
    return Fingerprint(
        name=name,
        config=_hash(_stable(checkpoint.config)),
        weights=_weights_hash(checkpoint.samples),
        tokenizer=_hash(sorted(tokenizer.get_vocab().items()), tokenizer(_SAMPLE)["input_ids"]),
        template="raw" if prompt_format == "raw" else _hash(str(tokenizer.chat_template)),
        layers=text.num_hidden_layers + 1,
        width=text.hidden_size,
        dtype=checkpoint.dtype,
        loaded_config=_hash(_without_volatile(text.to_dict())),
    )


def _stable(entries: Any) -> Any:
    """Without entries that do not change what the model computes, at any depth."""
    if isinstance(entries, Mapping):
        return {key: _stable(value) for key, value in _without_volatile(entries).items()}
    return entries


def _without_volatile(entries: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in entries.items()
        if key not in _VOLATILE and not key.startswith("_")
    }


def _weights_hash(samples: Mapping[str, Sample]) -> str:
    digest = sha256()
    for key, weight in sorted(samples.items()):
        digest.update(f"{key}{weight.shape}".encode())
        digest.update(weight.values)
    return digest.hexdigest()[:16]


def _hash(*values: Any) -> str:
    text = json.dumps(values, sort_keys=True, default=str, ensure_ascii=True)
    return sha256(text.encode()).hexdigest()[:16]
