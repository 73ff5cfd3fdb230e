"""Rivals that probes are compared with, fitted to the same texts. One file each."""

from sidelight_lab.baselines.base import Baseline, FittedBaseline, TfIdf
from sidelight_lab.baselines.muli import Muli
from sidelight_lab.baselines.pooled import (
    LastTokenOfBestLayer,
    LastTokenOfLastLayer,
    MeanOfBestLayer,
    MeanOfLastLayer,
    MeansOfAllLayers,
)
from sidelight_lab.baselines.prompting import FewShot, ZeroShot
from sidelight_lab.baselines.services import GuardEndpoint, ModerationEndpoint
from sidelight_lab.baselines.siren import Mlpm, Siren
from sidelight_lab.baselines.token_heads import AttentionProbe, Concatenated, MlpHeads, RollingMax
from sidelight_lab.baselines.tuned_models import FineTunedEncoder, Lora

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

__all__ = ["BASELINES", "Baseline", "FittedBaseline", "TfIdf"]
