"""Baselines for comparison with probes, fitted to the same texts, by their names in recipes.

Some read the same hidden states as probes (`pooled`, `siren`, `muli`, `token_heads`); others run a
full model separately (`encoders`, `fine_tuning`, `prompting`). Only `bench spans` uses `spans`.
"""

from sidelight_lab.baselines import encoders, fine_tuning, pooled, prompting, token_heads
from sidelight_lab.baselines.base import Baseline, TfIdf
from sidelight_lab.baselines.muli import Muli
from sidelight_lab.baselines.siren import Siren

BASELINES: dict[str, type[Baseline]] = {
    "tfidf": TfIdf,
    "mean_last_layer": pooled.MeanOfLastLayer,
    "last_token_last_layer": pooled.LastTokenOfLastLayer,
    "mean_best_layer": pooled.MeanOfBestLayer,
    "last_token_best_layer": pooled.LastTokenOfBestLayer,
    "means_all_layers": pooled.MeansOfAllLayers,
    "muli": Muli,
    "siren": Siren,
    "mlpm": pooled.Mlpm,
    "attention_probe": token_heads.AttentionProbe,
    "mlp_heads": token_heads.MlpHeads,
    "rolling_max": token_heads.RollingMax,
    "concatenated": token_heads.Concatenated,
    "sentence_embeddings": encoders.SentenceEmbeddings,
    "encoder": fine_tuning.FineTunedEncoder,
    "lora": fine_tuning.Lora,
    "zero_shot": prompting.ZeroShot,
    "few_shot": prompting.FewShot,
}
