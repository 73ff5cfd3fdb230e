"""Quantised weights: served where this copy and these probes are accepted, and nowhere else."""

import json
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import wordings
from sidelight.engines.transformers.backbone import TransformersBackbone, load_backbone
from sidelight.errors import FingerprintMismatchError, SidelightError
from sidelight.models.fingerprint import ACCEPTED
from sidelight.probes.artifact import save_probe
from sidelight_vllm import KEY
from sidelight_vllm.engine import load_vllm_engine
from sidelight_vllm.settings import STATES, Served
from worlds.servers import cli
from worlds.vllm import ROUNDING, expected, llm_of, mixed_prompts, require_equal, run_llm, verdicts

pytestmark = pytest.mark.xdist_group("quantised")
TEXTS = 12
# Two engines differ in float32's last digit. Where that rounds an activation to the next of its 255
# steps, a probability moves by up to .006: in about half of the prompts. The others are equal.
PROMPTS = 16
LAYERS = ("self_attn", "mlp")
# On processors without VNNI, oneDNN adds pairs of products in 16 bits. With weights of up to 127
# steps they saturate, and vLLM serves other numbers than the checkpoint's; with 63, none can.
WEIGHT_STEPS = 63
ACTIVATION_STEPS = 127
KV_IN_FP8 = {"kv_cache_dtype": "fp8"}
CAPTURED = {"probes": [], STATES: True}
SMALL = {"enforce_eager": True, "block_size": 32, "max_model_len": 512, "dtype": "float32"}


@dataclass(frozen=True)
class Copy:
    """A quantised checkpoint, and a backbone that rounds the same numbers in float32."""

    path: str
    rounded: TransformersBackbone


@pytest.fixture(scope="module")
def copy(llama_model, tmp_path_factory) -> Copy:
    if "amx_tile" in Path("/proc/cpuinfo").read_text():
        pytest.skip("vLLM's int8 kernel for AMX takes no float32")
    return quantised(llama_model.path, tmp_path_factory.mktemp("copy"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    rows = [{"text": f"number {i} " * (1 + i % 5), "answer": f"yes, {i}"} for i in range(TEXTS)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture(scope="module")
def digest(llama_model, copy) -> str:
    return named_digest(copy.path, llama_model.folders)


def named_digest(path: str, folders: list[str]) -> str:
    """What the refusal of these probes on this copy names."""
    with pytest.raises(FingerprintMismatchError) as refused:
        configured(path, folders)
    return re.search(f"{ACCEPTED}=([0-9a-f]+) accepts", str(refused.value))[1]


def quantised(path: str, folder: Path) -> Copy:
    """A checkpoint in 8 bits, weights and activations, as compressed-tensors lays it out."""
    shutil.copytree(path, folder / "int8")
    stored, plain = {}, {}
    for name, weight in load_file(f"{path}/model.safetensors").items():
        stored[name] = plain[name] = weight
        if any(f".{layer}." in name for layer in LAYERS):
            plain[name], scale = rounded(weight, WEIGHT_STEPS)
            stored[name] = (plain[name] / scale).round().to(torch.int8)
            stored[f"{name}_scale"] = scale
    save_file(stored, folder / "int8/model.safetensors", {"format": "pt"})
    config = json.loads(Path(path, "config.json").read_text())
    numbers = {"num_bits": 8, "type": "int", "symmetric": True}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "all": {
                "targets": ["Linear"],
                "weights": {**numbers, "strategy": "channel", "dynamic": False},
                "input_activations": {**numbers, "strategy": "token", "dynamic": True},
            }
        },
    }
    (folder / "int8/config.json").write_text(json.dumps(config))
    shutil.copytree(path, folder / "plain")
    save_file(plain, folder / "plain/model.safetensors", {"format": "pt"})
    backbone = load_backbone(folder / "plain")
    for name, module in backbone.model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(
                lambda _, inputs: (rounded(inputs[0], ACTIVATION_STEPS)[0],)
            )
    return Copy(str(folder / "int8"), backbone)


def apart(found: list, wanted: list) -> np.ndarray:
    """The largest difference of a probability, by prompt and probe; both lack the same verdicts."""
    require_equal(found, wanted, rounding=1)
    return np.array(
        [
            [np.abs(np.nan_to_num(mine[name] - values)).max() for name, values in theirs.items()]
            for mine, theirs in zip(found, wanted, strict=True)
        ]
    )


def rounded(numbers: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What is left of each row in ``steps`` steps on either side of zero, and its scale."""
    scale = numbers.abs().amax(-1, keepdim=True).clamp(min=1e-30) / steps
    return (numbers / scale).round() * scale, scale


def measure(original, copy: str, texts: str, digest: str, *, gate="1") -> int:
    options = {**SMALL, "num_gpu_blocks_override": 64}
    options.pop("dtype")
    words = [w for key, v in options.items() for w in ("--engine-option", f"{key}={json.dumps(v)}")]
    data = ["--data", texts, "--response", "answer", "--model", original.path]
    to = ["--engines", "transformers", "--quantised", copy, "--dtype", "float32"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ACCEPTED, digest)
        return cli("parity", *original.folders, *data, *to, "--gate", gate, *words)


def configured(path: str, folders, digest: str = "", **options):
    """The engine's configuration, made without starting anything."""
    from vllm.engine.arg_utils import EngineArgs

    config = {"probes": folders} if isinstance(folders, list) else folders
    settings = {"additional_config": {KEY: config}, **SMALL, **options}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ACCEPTED, digest)
        return EngineArgs(model=path, **settings).create_engine_config()


def test_quantised_verdicts_match_transformers_with_same_rounding(
    llama_model, copy, digest, monkeypatch
):
    monkeypatch.setenv(ACCEPTED, digest)
    prompts = mixed_prompts(llama_model.backbone, PROMPTS, longest=300)
    wanted = expected(replace(llama_model, backbone=copy.rounded), prompts)
    with llm_of(replace(llama_model, path=copy.path)) as llm:
        assert llm.llm_engine.vllm_config.model_config.quantization == "compressed-tensors"
        found = verdicts(run_llm(llm, prompts))
    same, moved = apart(found, wanted), apart(found, expected(llama_model, prompts))
    assert sum(same.max(1) < ROUNDING) >= PROMPTS / 4
    assert same.mean() < moved.mean() / 4


def test_unaccepted_quantised_models_are_refused(llama_model, copy, digest):
    with pytest.raises(FingerprintMismatchError, match=wordings.RUN_PARITY):
        configured(copy.path, llama_model.folders)
    with pytest.raises(
        FingerprintMismatchError, match=wordings.SETTING_IS_ABSENT.format(name=ACCEPTED)
    ):
        load_vllm_engine(copy.path, llama_model.probes)
    # What vLLM quantises itself is another model.
    for options in ({"quantization": "fp8"}, KV_IN_FP8):
        for accepted in ("", digest):
            with pytest.raises(
                FingerprintMismatchError,
                match=wordings.SETTING_IS.format(name=ACCEPTED, value=accepted or "not"),
            ):
                configured(llama_model.path, llama_model.folders, accepted, **options)
    with pytest.raises(SidelightError, match="quantization=fp8"):
        configured(llama_model.path, CAPTURED, quantization="fp8")


def test_accepted_digest_covers_model_copy_and_engine_options(llama_model, copy, digest, tmp_path):
    served = Served.of(configured(copy.path, llama_model.folders, digest))
    assert served is not None
    served.load()
    first = llama_model.probes[0]
    strangers = {
        named: str(save_probe(first.changed(backbone=fingerprint), tmp_path / named))
        for named, fingerprint in (
            ("weights", replace(first.card.backbone, weights="0" * 16)),
            ("tokenizer", replace(first.card.backbone, tokenizer="0" * 16)),
        )
    }
    # Workers take no probe that was not accepted.
    for named, why in (("weights", f"{ACCEPTED} is {digest}"), ("tokenizer", "differ in")):
        with pytest.raises(FingerprintMismatchError, match=why):
            replace(served, folders=(strangers[named],)).load()
    another = tmp_path / "other"
    shutil.copytree(copy.path, another)
    weights = load_file(another / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, another / "model.safetensors", {"format": "pt"})
    for path, folders, options in (
        (copy.path, llama_model.folders, KV_IN_FP8),
        (str(another), llama_model.folders, {}),
        (copy.path, [*llama_model.folders, strangers["weights"]], {}),
    ):
        with pytest.raises(
            FingerprintMismatchError, match=wordings.SETTING_IS.format(name=ACCEPTED, value=digest)
        ):
            configured(path, folders, digest, **options)


def test_parity_measures_accepted_copies_and_exits_1_on_flips(
    llama_model, copy, digest, texts, tmp_path, capsys
):
    assert measure(llama_model, copy.path, texts, digest) == 0
    assert measure(llama_model, copy.path, texts, "") == 2
    assert f"{ACCEPTED}={digest}" in capsys.readouterr().err
    noisy = tmp_path / "noisy"
    shutil.copytree(llama_model.path, noisy)
    weights = load_file(noisy / "model.safetensors")
    for name, weight in weights.items():
        weights[name] = weight + 0.2 * torch.randn_like(weight)
    save_file(weights, noisy / "model.safetensors", {"format": "pt"})
    of_noisy = named_digest(str(noisy), llama_model.folders)
    assert measure(llama_model, str(noisy), texts, of_noisy, gate="0") == 1
    assert "flipped" in capsys.readouterr().err
