"""``--engine transformers``: folders and hub ids, in this process."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sidelight.engines.backend import Backend, owner_of
from sidelight.errors import SidelightError
from sidelight.models.smollm2 import require_model

if TYPE_CHECKING:
    from sidelight.engines.base import Engine
    from sidelight.engines.transformers.backbone import TransformersBackbone
    from sidelight.models.conversation import PromptFormat
    from sidelight.probes.probe import Probe
    from sidelight.states.reader import Model


def require_safetensors(model: str, engine: str, tokenizer: str | None) -> None:
    """Check that a name belongs to a model in safetensors files, without a separate tokenizer.

    Raises:
        SidelightError: Another engine owns the name, or there is no such model.
    """
    if (owner := owner_of(model)) is not None:
        raise SidelightError(
            f"'{model}' runs only in {owner}, not in {engine}. Leave --engine out, or name a "
            "folder saved by save_pretrained or a hub id here."
        )
    if tokenizer is not None:
        raise SidelightError(f"'{model}' comes with its tokenizer. Leave --tokenizer out.")
    require_model(model)


class TransformersBackend(Backend):
    """Runs any causal language model of ``transformers``."""

    name = "transformers"

    def find(self, model: str) -> str:
        require_safetensors(model, self.name, self.options.tokenizer)
        return model

    def read(self, model: str) -> "Model":
        from sidelight.engines.transformers.backbone import read_model

        return read_model(model)

    def load(self, model: str, prompt_format: "PromptFormat | None") -> "TransformersBackbone":
        from sidelight.engines.transformers.backbone import load_backbone

        return load_backbone(
            model,
            dtype=self.options.dtype,
            device=self.options.device,
            prompt_format=prompt_format,
            for_probing=True,
        )

    def engine(self, model: str, probes: "Sequence[Probe]") -> "Engine":
        from sidelight.engines.transformers.engine import TransformersEngine
        from sidelight.probes.probe import common_format

        backbone = self.load(model, common_format(probes))
        return TransformersEngine(backbone, probes, model=self.options.served_model_name)
