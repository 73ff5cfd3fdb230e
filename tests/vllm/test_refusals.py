"""vLLM does not start with what the plugin does not support; without probes, nothing changes."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import StableLmConfig

from commands import saved
from sidelight.artifact import save_probe
from sidelight.backbone import load_backbone
from sidelight.errors import FingerprintMismatchError, SidelightError
from sidelight.vllm.engine import load_vllm_engine
from sidelight.vllm.patches import require_supported
from sidelight.vllm.settings import ENVIRONMENT, KEY
from tiny import SIZES, tiny_backbone, untrained_probe
from vllm_served import Model, tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


def configured(path, folders, **options):
    """The engine's configuration, made without starting anything."""
    from vllm.engine.arg_utils import EngineArgs

    config = {} if folders is None else {KEY: {"probes": folders}}
    given = {"dtype": "float32", "max_model_len": 512, **options}
    return EngineArgs(model=path, additional_config=config, **given).create_engine_config()


def test_without_named_probes_nothing_changes(model, monkeypatch):
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    config = configured(model.path, None)
    assert config.kv_transfer_config is None
    assert config.scheduler_config.scheduler_cls is None


def test_the_environment_names_probes(model, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, model.folders[0])
    config = configured(model.path, None)
    assert config.kv_transfer_config.kv_connector == "ProbeConnector"


def served_config(path, folders):
    """The configuration of a server."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    config = {} if folders is None else {KEY: {"probes": folders}}
    args = AsyncEngineArgs(model=path, additional_config=config, dtype="float32", max_model_len=512)
    return args.create_engine_config()


def test_a_policy_without_probes_and_a_key_that_nobody_asks_for_are_refused(
    model, monkeypatch, tmp_path
):
    (tmp_path / "policy.toml").write_text("")
    monkeypatch.setenv("SIDELIGHT_POLICY", str(tmp_path / "policy.toml"))
    # As where its name is misspelt.
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    with pytest.raises(SidelightError, match="everything would pass"):
        served_config(model.path, None)
    monkeypatch.delenv("SIDELIGHT_POLICY")
    served_config(model.path, None)
    monkeypatch.setenv("SIDELIGHT_API_KEY", "secret")
    for plugins in (None, "another"):
        monkeypatch.delenv("VLLM_PLUGINS", raising=False)
        if plugins:
            monkeypatch.setenv("VLLM_PLUGINS", plugins)
        with pytest.raises(SidelightError, match="would not ask for it"):
            served_config(model.path, model.folders)
    monkeypatch.setenv("VLLM_PLUGINS", "another,sidelight")
    served_config(model.path, model.folders)


def test_other_probes_need_no_other_graph(model):
    one = configured(model.path, model.folders[:1])
    assert one.compute_hash() == configured(model.path, model.folders[1:]).compute_hash()
    assert one.compute_hash() != configured(model.path, None).compute_hash()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            "probes of the response under speculative decoding",
        ),
        ({"kv_sharing_fast_prefill": True}, "--kv-sharing-fast-prefill"),
        ({"weight_transfer_config": {"backend": "nccl"}}, "--weight-transfer-config"),
        ({"hf_overrides": {"rope_theta": 5.0}}, "--hf-overrides"),
        ({"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "--scheduler-cls"),
        ({"worker_extension_cls": "builtins.object"}, "--worker-extension-cls"),
        ({"kv_offloading_size": 1.0}, "--kv-offloading-size"),
        ({"revision": "other"}, "--revision"),
        ({"tokenizer": "/another"}, "--tokenizer"),
        ({"load_format": "pt"}, "--load-format pt"),
    ],
)
def test_a_feature_that_no_test_covers_is_refused(model, options, message):
    with pytest.raises(SidelightError, match=message):
        configured(model.path, model.folders, **options)


@pytest.mark.parametrize(
    ("variable", "value"),
    [("VLLM_FLOAT32_MATMUL_PRECISION", "high"), ("VLLM_USE_RUST_FRONTEND", "1")],
)
def test_a_setting_that_changes_or_bypasses_verdicts_is_refused(
    model, monkeypatch, variable, value
):
    monkeypatch.setenv(variable, value)
    with pytest.raises(SidelightError, match=variable):
        configured(model.path, model.folders)


@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        ("model_config", "enable_sleep_mode", True, "--enable-sleep-mode"),
        ("speculative_config", "method", "medusa", "speculative decoding by medusa"),
        ("parallel_config", "enable_dbo", True, "dual batch overlap"),
    ],
)
def test_a_feature_that_cpus_lack_is_refused(model, part, field, value, message):
    guesses = {"method": "ngram", "num_speculative_tokens": 2}
    config = configured(model.path, None, speculative_config=guesses)
    require_supported(config, [])
    setattr(getattr(config, part), field, value)
    with pytest.raises(SidelightError, match=message):
        require_supported(config, [])


def test_an_option_of_the_wrong_type_is_refused(model):
    with pytest.raises(SidelightError, match="Check their types"):
        load_vllm_engine(model.path, [], options={"max_num_seqs": "abc"})


def test_another_version_is_refused(model, monkeypatch):
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    with pytest.raises(SidelightError, match=r"vLLM 0\.99\.0"):
        configured(model.path, model.folders)


def test_another_architecture_is_refused(tmp_path):
    backbone = tiny_backbone(StableLmConfig(**SIZES))
    path = saved(backbone, tmp_path / "model")
    # The library makes another tokenizer of the files than the one that was saved.
    folder = save_probe(untrained_probe(load_backbone(path), "p"), tmp_path / "p")
    with pytest.raises(SidelightError, match="the architecture StableLmForCausalLM"):
        configured(path, [str(folder)], max_model_len=256)


def test_a_damaged_probe_is_refused(model, tmp_path):
    folder = save_probe(untrained_probe(model.backbone, "p"), tmp_path / "p")
    weights = Path(folder) / "probe.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(SidelightError, match="not the file"):
        configured(model.path, [str(folder)])
    with pytest.raises(SidelightError, match="holds no probe"):
        configured(model.path, [str(tmp_path / "missing")])


def test_a_probe_of_another_model_is_refused(model, tmp_path):
    folder = save_probe(untrained_probe(tiny_backbone(), "foreign"), tmp_path / "p")
    with pytest.raises(FingerprintMismatchError, match="foreign"):
        configured(model.path, [str(folder)])


def test_probes_of_chats_and_of_raw_texts_are_refused(model, tmp_path):
    chat = untrained_probe(model.backbone, "chat")
    raw = replace(untrained_probe(model.backbone, "raw"), prompt_format="raw")
    folders = [str(save_probe(probe, tmp_path / probe.name)) for probe in (chat, raw)]
    with pytest.raises(SidelightError, match="cannot be served together"):
        configured(model.path, folders)
    with pytest.raises(SidelightError, match="cannot be served together"):
        load_vllm_engine(model.path, [chat, raw])


def test_what_travels_to_the_workers_is_json(model):
    config = configured(model.path, model.folders)
    extra = config.kv_transfer_config.kv_connector_extra_config
    assert json.loads(json.dumps(extra))["folders"] == model.folders


def test_a_gpu_starts_with_a_warning_that_names_the_check(model, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    config = configured(model.path, model.folders)
    assert "sidelight bench" not in caplog.text
    config.device_config.device_type = "cuda"
    require_supported(config, [])
    assert "sidelight bench gpu" in caplog.text
    assert "never run" in caplog.text
    config.device_config.device_type = "xpu"
    with pytest.raises(SidelightError, match="the device xpu"):
        require_supported(config, [])


def test_a_policy_that_nobody_could_enforce_is_refused_at_the_start(model, tmp_path, monkeypatch):
    policy = tmp_path / "policy.toml"
    monkeypatch.setenv("SIDELIGHT_POLICY", str(policy))
    for text, why in (
        ('[input.plain]\nmode = "block"\n', "LLM class"),
        ('[input.plein]\nmode = "block"\n', "no probe 'plein'"),
        ('[input.plain]\nmod = "block"\n', "unknown key"),
    ):
        policy.write_text(text)
        with pytest.raises(SidelightError, match=why):
            configured(model.path, model.folders)
    policy.write_text('[input.plain]\nmode = "flag"\n')
    configured(model.path, model.folders)


def test_an_unknown_form_of_the_tap_is_refused_at_the_start(model, monkeypatch):
    monkeypatch.setenv("SIDELIGHT_TAP", "sgemm")
    with pytest.raises(SidelightError, match="addmm, bf16x3, triton"):
        configured(model.path, model.folders)
