"""Who a model is by its files alone, whatever reads or writes them."""

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3Config, LlamaConfig, Qwen3MoeConfig

import wordings
from sidelight.engines.transformers.backbone import load_backbone, read_model
from sidelight.errors import FingerprintMismatchError, SidelightError
from worlds.models import FAMILIES, SIZES, family_backbone, identified, saved, tiny_tokenizer

_TEXT = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
# transformers fuses the experts of the first, and renames the layers of the second.
_CONVERTED = {
    "qwen3_moe": Qwen3MoeConfig(
        **_TEXT, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
    "gemma3": Gemma3Config(
        text_config={**_TEXT, "sliding_window": 8},
        vision_config={**SIZES, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    ),
    "tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
}


def backbone_of(family, dtype=torch.float32):
    if family in FAMILIES:
        return family_backbone(family, dtype=dtype)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(_CONVERTED[family], dtype=torch.float32).to(dtype)
    return identified(model, tiny_tokenizer(), name=family)


def who(fingerprint):
    return replace(fingerprint, name="any", dtype="any")


def require_differs(one, another, fields):
    with pytest.raises(
        FingerprintMismatchError,
        match=wordings.DIFFER_IN.format(fields=fields) + ". " + wordings.TRAIN_ON_THIS,
    ):
        one.require(another, probe="p")


@pytest.mark.slow
@pytest.mark.parametrize("family", [*FAMILIES, *_CONVERTED])
def test_fingerprint_does_not_depend_on_loading_sharding_or_dtype(family, tmp_path):
    full = backbone_of(family)
    for backbone, size in ((full, "1GB"), (backbone_of(family, torch.bfloat16), "30KB")):
        folder = tmp_path / size
        backbone.model.save_pretrained(folder, max_shard_size=size)
        backbone.tokenizer.save_pretrained(folder)
        assert (len([*folder.glob("*.safetensors")]) > 1) == (size == "30KB")
        loaded, read = (load(folder).fingerprint for load in (load_backbone, read_model))
        assert loaded.dtype == {"1GB": "float32", "30KB": "bfloat16"}[size]
        # The library picks the tokenizer's class by the model's type, whatever was saved.
        assert who(loaded) == replace(who(full.fingerprint), tokenizer=loaded.tokenizer)
        assert read == loaded
    converted = load_backbone(tmp_path / "1GB", dtype="bfloat16")
    assert converted.fingerprint.dtype == "bfloat16"
    assert who(converted.fingerprint) == who(loaded)
    assert converted.encoder.max_tokens == full.encoder.max_tokens


def test_read_model_and_loaded_backbone_share_encoder_settings(tiny, tmp_path):
    folder = saved(tiny, tmp_path)
    loaded, read = load_backbone(folder), read_model(folder)
    assert read.path == folder
    assert read.encoder.max_tokens == loaded.encoder.max_tokens == 256
    assert read.encoder.prompt_format == loaded.encoder.prompt_format == "chat"
    raw = read_model(folder, prompt_format="raw")
    assert (raw.encoder.prompt_format, raw.fingerprint.template) == ("raw", "raw")


@pytest.fixture
def before(tiny, tmp_path):
    """Who the model is that lies in the test's folder."""
    return read_model(saved(tiny, tmp_path)).fingerprint


def test_new_transformers_default_does_not_change_fingerprint(before, tmp_path, monkeypatch):
    as_dict = LlamaConfig.to_dict
    monkeypatch.setattr(LlamaConfig, "to_dict", lambda self: {**as_dict(self), "added": 1})
    for after in (load(tmp_path).fingerprint for load in (load_backbone, read_model)):
        assert after == before


def test_config_hash_ignores_only_writer_metadata(before, tmp_path):
    config = tmp_path / "config.json"
    entries = json.loads(config.read_text())
    written = {"transformers_version": "9.9.9", "_name_or_path": "elsewhere", "use_cache": False}
    config.write_text(json.dumps({**entries, **written}))
    assert read_model(tmp_path).fingerprint == before
    fewer = {name: value for name, value in entries.items() if name != "attention_bias"}
    for changed in ({**entries, "attention_bias": True}, fewer):
        config.write_text(json.dumps(changed))
        require_differs(before, read_model(tmp_path).fingerprint, "config")


def test_computed_buffers_do_not_change_fingerprint(before, tmp_path):
    path = tmp_path / "model.safetensors"
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(3)}
    save_file({**load_file(path), **buffers}, path)
    assert read_model(tmp_path).fingerprint == before


def test_quantised_copy_has_different_fingerprint(before, tmp_path):
    path, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    weights = {
        name: weight.to(torch.float8_e4m3fn) if weight.ndim == 2 else weight
        for name, weight in load_file(path).items()
    }
    save_file({**weights, "lm_head.weight_scale": torch.ones(1)}, path)
    how = {"quant_method": "fp8"}
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": how}))
    after = read_model(tmp_path).fingerprint
    assert after.dtype == "float8_e4m3fn"
    require_differs(before, after, "config, weights")


@pytest.mark.parametrize("load", [load_backbone, read_model])
def test_non_safetensors_weights_are_refused(tiny, load, tmp_path):
    saved(tiny, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(tiny.model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(SidelightError, match=wordings.NO_WEIGHTS):
        load(tmp_path)


def test_duplicate_weights_in_folder_are_refused(before, tmp_path):
    weights = {"model.norm.weight": torch.full((SIZES["hidden_size"],), 2.0)}
    save_file(weights, tmp_path / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        SidelightError, match=wordings.WEIGHTS_TWICE.format(name="model.norm.weight")
    ):
        read_model(tmp_path)


@pytest.mark.parametrize("place", ["absolute", "above", "number", "no map"])
def test_invalid_weight_index_is_refused(before, tmp_path, place):
    folder = tmp_path / "other"
    weights = "model.safetensors"
    shutil.copytree(tmp_path, folder, ignore=shutil.ignore_patterns(weights))
    index = folder / "model.safetensors.index.json"
    named = {"absolute": str(tmp_path / weights), "above": f"../{weights}"}.get(place, 3)
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": named}}))
    if place == "no map":
        index.write_text("[]")
    with pytest.raises(SidelightError, match=wordings.WRONG_INDEX):
        read_model(folder)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_adapters_are_refused_and_merging_changes_fingerprint(tiny, tmp_path):
    folder = saved(tiny, tmp_path / "model")
    before = load_backbone(folder)
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = get_peft_model(before.model, lora)
    adapted.save_pretrained(folder)
    with pytest.raises(SidelightError, match=wordings.ADAPTER):
        load_backbone(folder)
    before.model = adapted.merge_and_unload()
    merged = load_backbone(saved(before, tmp_path / "merged"))
    require_differs(before.fingerprint, merged.fingerprint, "weights")


def memory(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def write_shards(folder):
    """A checkpoint of 1 GB, made of holes: four files of twenty weights each."""
    size, weight_map = 2 * 6000 * 1024, {}
    for file in (f"model-{shard:05}-of-00004.safetensors" for shard in range(1, 5)):
        header = {
            f"{file[:11]}.{i}.weight": {
                "dtype": "BF16",
                "shape": [6000, 1024],
                "data_offsets": [i * size, (i + 1) * size],
            }
            for i in range(20)
        }
        weight_map |= dict.fromkeys(header, file)
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + 20 * size)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    LlamaConfig(**SIZES).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_fingerprinting_hub_model_uses_little_memory(before, tmp_path, offline, monkeypatch):
    cached = tmp_path / "hub" / "models--some--model"
    folder = cached / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    write_shards(folder)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    # A process of its own has a peak of its own.
    child = os.fork()
    if not child:
        try:
            at_first = memory("VmRSS")
            digest = read_model("some/model").fingerprint.digest
            (tmp_path / "peak").write_text(f"{digest} {memory('VmHWM') - at_first}")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    digest, grown = (tmp_path / "peak").read_text().split()
    assert digest == read_model(folder).fingerprint.digest
    assert int(grown) < 150e6
