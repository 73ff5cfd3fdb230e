"""Rivals that probes are compared with, fitted to the same texts. One file each."""

from sidelight.baselines.attention_probe import AttentionProbe
from sidelight.baselines.base import Baseline, Rival
from sidelight.baselines.concatenated import Concatenated
from sidelight.baselines.encoder import FineTunedEncoder
from sidelight.baselines.endpoint import ModerationEndpoint
from sidelight.baselines.guard import GuardEndpoint
from sidelight.baselines.lora import Lora
from sidelight.baselines.mlp_heads import MlpHeads
from sidelight.baselines.mlpm import Mlpm
from sidelight.baselines.muli import Muli
from sidelight.baselines.pooled import (
    LastTokenOfBestLayer,
    LastTokenOfLastLayer,
    MeanOfBestLayer,
    MeanOfLastLayer,
    MeansOfAllLayers,
)
from sidelight.baselines.prompting import FewShot, ZeroShot
from sidelight.baselines.rolling_max import RollingMax
from sidelight.baselines.siren import Siren
from sidelight.baselines.tfidf import TfIdf

BASELINES: dict[str, type[Baseline]] = {
    "tfidf": TfIdf,
    "mean_last_layer": MeanOfLastLayer,
    "last_token_last_layer": LastTokenOfLastLayer,
    "mean_best_layer": MeanOfBestLayer,
    "last_token_best_layer": LastTokenOfBestLayer,
    "means_all_layers": MeansOfAllLayers,
    "muli": Muli,
    "siren": Siren,
    "mlpm": Mlpm,
    "attention_probe": AttentionProbe,
    "mlp_heads": MlpHeads,
    "rolling_max": RollingMax,
    "concatenated": Concatenated,
    "encoder": FineTunedEncoder,
    "lora": Lora,
    "zero_shot": ZeroShot,
    "few_shot": FewShot,
    "moderation_endpoint": ModerationEndpoint,
    "guard_endpoint": GuardEndpoint,
}

__all__ = ["BASELINES", "Baseline", "Rival", "TfIdf"]
