"""Where a server's settings come from, which source wins, and how a wrong one is refused."""

import pytest
from fastapi import FastAPI

from sidelight.cli.serve import serve
from sidelight.errors import SidelightError
from sidelight.server.app import server_settings
from sidelight.server.config import ServerConfig, read_config
from sidelight.server.keys import Key
from worlds.servers import cli

# A value of each option that is not its default, as TOML has it.
VALUES = {
    "probe": ["a", "b"],
    "policy": "policy.toml",
    "host": "::1",
    "port": 9000,
    "playground": True,
    "log_level": "warning",
    "json_logs": True,
    "audit_log": "audit.jsonl",
    "audit_salt": "salt",
    "allow_anonymous": True,
    "engine_option": {"max_num_seqs": 64},
}
VALUES |= {"api_key": ["one", "two"], "admin_key": ["three"], "metrics_key": ["scraper"]}
VALUES |= {"api_keys_file": "keys", "admin_keys_file": "admin_keys", "deadline": 1.5}
VALUES |= {"max_body_bytes": 1000, "max_batch_items": 2}
VALUES |= {"max_request_tokens": 100, "engine": "vllm", "model": "tiny", "dtype": "float32"}
VALUES |= {"device": "cpu", "tokenizer": "owner/model", "allowed_host": ["gateway.example"]}
VALUES |= {"served_model_name": "assistant", "trace_events": True}
SECRETS = {"api_key", "admin_key", "metrics_key", "audit_salt"}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "server.toml"


def toml(value):
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {toml(v)}" for k, v in value.items()) + " }"
    return str(value).lower() if isinstance(value, bool) else repr(value)


def test_config_file_accepts_every_command_line_option(path):
    options = {word for parameter in serve.params for word in parameter.opts}
    assert {f"--{name.replace('_', '-')}" for name in VALUES} | {"--config"} == options
    path.write_text("\n".join(f"{name} = {toml(value)}" for name, value in VALUES.items()))
    config, plain = read_config(config=path), ServerConfig()
    assert config == ServerConfig(config=path, **VALUES)
    assert not [name for name in VALUES if getattr(plain, name) == getattr(config, name)]


def test_option_overrides_variable_and_variable_overrides_file(path, monkeypatch):
    path.write_text('api_key = "file"\naudit_salt = "file"\nadmin_key = "file"\nport = 1\n')
    monkeypatch.setenv("SIDELIGHT_API_KEY", "variable")
    # A variable holds one secret, without the line break at its end.
    monkeypatch.setenv("SIDELIGHT_AUDIT_SALT", "correct horse\n")
    config = read_config(config=path, api_key=("option",), port=2)
    assert config.access.keys == (Key.of("api-key-1", "option"),)
    assert config.access.admin_keys == (Key.of("admin-key-1", "file"),)
    assert read_config().access.keys == (Key.of("api-key-1", "variable"),)
    assert (config.salt.strip(), config.port) == (b"correct horse", 2)


def test_engine_options_merge_with_those_of_file(path):
    path.write_text("engine_option = { texts = 4, tokens = 512 }")
    config = read_config(config=path, engine_option={"texts": 2, "threads": 1})
    assert config.engine_option == {"texts": 2, "tokens": 512, "threads": 1}


def test_environment_variables_are_case_insensitive(monkeypatch):
    """Otherwise a server whose operator has set a key would be open."""
    monkeypatch.setenv("sidelight_api_key", "variable")
    assert ServerConfig().access.keys == (Key.of("api-key-1", "variable"),)


def test_only_secrets_are_read_from_environment(monkeypatch):
    """Kubernetes sets SIDELIGHT_PORT=tcp://... for a service named sidelight."""
    for name in ServerConfig.model_fields.keys() - SECRETS:
        monkeypatch.setenv(f"SIDELIGHT_{name.upper()}", "tcp://10.0.0.1:80")
        monkeypatch.setenv(name.upper(), "tcp://10.0.0.1:80")
    assert read_config() == ServerConfig.model_construct()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("prot = 1", "unknown key: prot. Did you mean 'port'? Known: admin_key, "),
        ("port = 70000", "port in {path}: "),
        ("deadline = inf", "deadline in {path}: "),
        ("admin_key = ['a', ' ']", "admin_key in {path} is blank"),
        ("audit_log = 'x'\naudit_salt = ' '", "audit_salt in {path} is blank"),
        ("api_key = { secret = 'sk-secret' }", "api_key"),
        ("audit_salt = { secret = 'sk-secret' }", "audit_salt"),
        # It may hold tokens.
        ("engine_option = 'sk-secret'", "engine_option in {path}"),
        ("port: 1", "{path} is not TOML"),
        ("port = " + "[" * 9999, "{path} is not TOML"),
        ("\xff", "Cannot read {path}"),
        (None, "There is no configuration file"),
    ],
)
def test_invalid_config_file_error_names_place_without_leaking_secrets(path, text, told):
    if text is not None:
        path.write_text(text, encoding="latin-1")
    with pytest.raises(SidelightError) as raised:
        read_config(config=path)
    assert told.format(path=path) in str(raised.value)
    assert "sk-secret" not in str(raised.value)


def test_grace_period_is_rounded_up_to_seconds():
    settings = server_settings(FastAPI(), ServerConfig(drain_s=2.5))
    assert settings.timeout_graceful_shutdown == 3


def test_invalid_setting_ends_serve_with_clear_error(path, monkeypatch, capsys):
    for text, options, told in (
        ("", ("--port", "70000"), "Error: --port: "),
        ("", ("--max-batch-items", "513"), "Error: --max-batch-items: "),
        ("port = 70000", (), "port in "),
        # The option wins over the file.
        ("host = '0.0.0.0'\nport = 70000", ("--port", "0"), "Anyone who can reach 0.0.0.0"),
    ):
        path.write_text(text)
        assert cli("serve", "--config", str(path), *options) == 2
        assert told in capsys.readouterr().err
    monkeypatch.setenv("SIDELIGHT_API_KEY", "\n")
    assert cli("serve", "--port", "0") == 2
    assert "SIDELIGHT_API_KEY is blank" in capsys.readouterr().err
