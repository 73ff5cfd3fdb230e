"""vLLM does not start with what the plugin does not support; without probes, nothing changes."""

import json
import logging
from pathlib import Path

import pytest
from transformers import StableLmConfig

import wordings
from sidelight.engines.transformers.backbone import load_backbone
from sidelight.errors import FingerprintMismatchError, SidelightError
from sidelight.probes.artifact import save_probe
from sidelight_vllm import ENVIRONMENT, KEY
from sidelight_vllm.engine import load_vllm_engine
from worlds.models import SIZES, saved, tiny_backbone, untrained_probe

NGRAM = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}


@pytest.fixture(scope="module")
def model(llama_model):
    return llama_model


def configured(path, folders, *, kind="EngineArgs", **options):
    """The engine's configuration, or a server's, made without starting anything."""
    from vllm.engine import arg_utils

    config = {} if folders is None else {KEY: {"probes": folders}}
    settings = {"dtype": "float32", "max_model_len": 512, **options}
    arguments = getattr(arg_utils, kind)(model=path, additional_config=config, **settings)
    return arguments.create_engine_config()


def test_vllm_is_unchanged_unless_configuration_or_environment_names_probes(model, monkeypatch):
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    plain = configured(model.path, None)
    assert plain.kv_transfer_config is None
    assert plain.scheduler_config.scheduler_cls is None
    monkeypatch.setenv(ENVIRONMENT, model.folders[0])
    named = configured(model.path, None)
    assert named.kv_transfer_config.kv_connector == "ProbeConnector"
    # Other probes need no other graph.
    assert named.compute_hash() == configured(model.path, model.folders).compute_hash()
    assert named.compute_hash() != plain.compute_hash()
    # What travels to the workers is JSON.
    extra = configured(model.path, model.folders).kv_transfer_config.kv_connector_extra_config
    assert json.loads(json.dumps(extra))["folders"] == model.folders


def test_unenforceable_policy_is_rejected_at_startup(model, tmp_path, monkeypatch):
    policy = tmp_path / "policy.toml"
    monkeypatch.setenv("SIDELIGHT_POLICY", str(policy))
    # As where the name of its variable is misspelt.
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    for folders, text, why in (
        (None, "", "nothing would be checked"),
        (model.folders, '[input.plain]\nmode = "block"\n', "LLM class"),
        (model.folders, '[input.plein]\nmode = "block"\n', "no probe 'plein'"),
    ):
        policy.write_text(text)
        with pytest.raises(SidelightError, match=why):
            configured(model.path, folders, kind="AsyncEngineArgs" if text == "" else "EngineArgs")
    policy.write_text('[input.plain]\nmode = "flag"\n')
    configured(model.path, model.folders)


def test_api_key_that_no_route_enforces_is_rejected(model, monkeypatch):
    server = {"kind": "AsyncEngineArgs"}
    configured(model.path, None, **server)
    monkeypatch.setenv("SIDELIGHT_API_KEY", "secret")
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    with pytest.raises(SidelightError, match=wordings.POLICY_UNHEARD):
        configured(model.path, model.folders, **server)
    monkeypatch.setenv("VLLM_PLUGINS", "another,sidelight")
    configured(model.path, model.folders, **server)


@pytest.mark.parametrize("name", ["columns", "accept_quantised"])
def test_environment_only_settings_are_rejected_in_engine_configuration(model, name):
    from vllm.engine.arg_utils import EngineArgs

    config = {KEY: {"probes": model.folders, name: "1"}}
    with pytest.raises(SidelightError, match=wordings.PLUGIN_UNCONFIGURED.format(name=name)):
        EngineArgs(model=model.path, additional_config=config).create_engine_config()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (NGRAM, "probes of the response under speculative decoding"),
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
def test_untested_features_are_rejected(model, options, message):
    with pytest.raises(SidelightError, match=message):
        configured(model.path, model.folders, **options)


@pytest.mark.parametrize(
    "setting", ["FLOAT32_MATMUL_PRECISION=high", "USE_RUST_FRONTEND=1", "BATCH_INVARIANT=1"]
)
def test_settings_that_change_or_bypass_verdicts_are_rejected(model, monkeypatch, setting):
    variable, value = f"VLLM_{setting}".split("=")
    monkeypatch.setenv(variable, value)
    with pytest.raises(SidelightError, match=variable):
        configured(model.path, model.folders)


def test_unsupported_devices_and_features_are_rejected_and_gpus_warn(model, caplog, monkeypatch):
    from sidelight_vllm.plugin import require_supported

    config = configured(model.path, None, **NGRAM)
    # The import of vLLM sets it.
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    require_supported(config, [])
    for section, field, value, message in (
        ("model_config", "enable_sleep_mode", True, "--enable-sleep-mode"),
        ("speculative_config", "method", "medusa", "speculative decoding by medusa"),
        ("parallel_config", "enable_dbo", True, "dual batch overlap"),
        ("device_config", "device_type", "xpu", "the device xpu"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(getattr(config, section), field, value)
            with pytest.raises(SidelightError, match=message):
                require_supported(config, [])
    assert "sidelight bench gpu" not in caplog.text
    config.device_config.device_type = "cuda"
    require_supported(config, [])
    assert "sidelight bench gpu" in caplog.text


def test_unsupported_version_architecture_or_option_type_is_rejected(model, monkeypatch, tmp_path):
    import vllm

    with pytest.raises(SidelightError, match=wordings.CHECK_TYPES):
        load_vllm_engine(model.path, [], options={"max_num_seqs": "abc"})
    path = saved(tiny_backbone(StableLmConfig(**SIZES)), tmp_path / "model")
    # The library makes another tokenizer of the files than the one that was saved.
    folder = save_probe(untrained_probe(load_backbone(path), "p"), tmp_path / "p")
    with pytest.raises(
        SidelightError, match=wordings.ARCHITECTURE.format(name="StableLmForCausalLM")
    ):
        configured(path, [str(folder)], max_model_len=256)
    monkeypatch.setattr(vllm, "__version__", "0.31.0")
    with pytest.raises(SidelightError, match=r"vLLM 0\.31\.0"):
        configured(model.path, model.folders)


def test_damaged_missing_and_foreign_probes_are_rejected(model, tmp_path):
    plain = untrained_probe(model.backbone, "p")
    folder = save_probe(plain, tmp_path / "p")
    weights = Path(folder) / "probe.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    foreign = save_probe(untrained_probe(tiny_backbone(), "foreign"), tmp_path / "foreign")
    for folders, kind, message in (
        ([folder], SidelightError, "weights do not match its card"),
        ([tmp_path / "missing"], SidelightError, "holds no probe"),
        ([foreign], FingerprintMismatchError, "foreign"),
    ):
        with pytest.raises(kind, match=message):
            configured(model.path, [*map(str, folders)])
