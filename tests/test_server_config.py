"""Where a server's settings come from, which source wins, and how a wrong one is refused."""

import pytest

from commands import run
from sidelight.cli.serve import serve
from sidelight.errors import SidelightError
from sidelight.server.config import ServerConfig, read_config
from sidelight.server.keys import Key

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
    "audit_client": True,
    "api_key": ["one", "two"],
    "api_keys_file": "keys",
    "admin_key": ["three"],
    "admin_keys_file": "admin_keys",
    "metrics_key": ["scraper"],
    "allow_anonymous": True,
    "max_body_bytes": 1000,
    "max_messages": 4,
    "max_batch_items": 2,
    "max_request_tokens": 100,
    "max_concurrent": 3,
    "deadline": 1.5,
    "engine": "vllm",
    "engine_option": {"max_num_seqs": 64},
    "model": "tiny",
    "dtype": "float32",
    "device": "cpu",
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "server.toml"


def toml(value):
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {toml(v)}" for k, v in value.items()) + " }"
    return str(value).lower() if isinstance(value, bool) else repr(value)


def test_the_file_knows_every_option_by_its_name_with_underscores(path):
    options = {word for parameter in serve.params for word in parameter.opts}
    assert {f"--{name.replace('_', '-')}" for name in VALUES} | {"--config"} == options
    path.write_text("\n".join(f"{name} = {toml(value)}" for name, value in VALUES.items()))
    assert read_config(config=path) == ServerConfig(config=path, **VALUES)
    plain = ServerConfig()
    assert not [
        name for name in VALUES if getattr(plain, name) == getattr(read_config(config=path), name)
    ]


def test_an_option_wins_over_its_variable_and_that_over_the_file(path, monkeypatch):
    path.write_text('api_key = "file"\naudit_salt = "file"\nport = 1\n')
    monkeypatch.setenv("SIDELIGHT_API_KEY", "variable")
    monkeypatch.setenv("SIDELIGHT_AUDIT_SALT", "variable")
    config = read_config(config=path, api_key=("option",), port=2)
    assert config.access.keys == (Key.of("api-key-1", "option"),)
    assert (config.salt, config.port) == (b"variable", 2)


def test_only_secrets_have_a_variable(monkeypatch):
    """Kubernetes sets SIDELIGHT_PORT=tcp://... for a service named sidelight."""
    for name in ServerConfig.model_fields.keys() - {
        "api_key",
        "admin_key",
        "metrics_key",
        "audit_salt",
    }:
        monkeypatch.setenv(f"SIDELIGHT_{name.upper()}", "tcp://10.0.0.1:80")
        monkeypatch.setenv(name.upper(), "tcp://10.0.0.1:80")
    assert read_config() == ServerConfig.model_construct()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("prot = 1", "unknown key: prot. Did you mean 'port'? Known: admin_key, "),
        ("config = 'other.toml'", "unknown key: config."),
        ("port = 70000", "port in {path}: "),
        ("deadline = inf", "deadline in {path}: "),
        ("engine = 'vlm'", "engine in {path}: "),
        ("api_key = ''", "api_key in {path} is blank"),
        ("admin_key = ['a', ' ']", "admin_key in {path} is blank"),
        ("audit_log = 'x'\naudit_salt = ' '", "audit_salt in {path} is blank"),
        ("port: 1", "{path} is not TOML"),
        ("\xff", "Cannot read {path}"),
    ],
)
def test_a_wrong_file_is_refused_with_the_place(path, text, told):
    path.write_text(text, encoding="latin-1")
    with pytest.raises(SidelightError) as raised:
        read_config(config=path)
    assert told.format(path=path) in str(raised.value)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    for place in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(SidelightError, match="There is no configuration file"):
            read_config(config=place)


@pytest.mark.parametrize("name", ["api_key", "admin_key", "audit_salt"])
def test_no_message_quotes_a_secret(path, name):
    path.write_text(f"{name} = {{ secret = 'sk-secret' }}")
    with pytest.raises(SidelightError, match=f"{name}.* in ") as raised:
        read_config(config=path)
    assert "sk-secret" not in str(raised.value)
    assert raised.value.__context__ is None


def test_options_of_an_engine_are_not_quoted(path):
    path.write_text("engine_option = 'hf-secret'")
    with pytest.raises(SidelightError, match="engine_option in") as raised:
        read_config(config=path)
    assert "hf-secret" not in str(raised.value)


def test_a_wrong_option_is_one_line(capsys):
    assert run("serve", "--port", "70000") == 2
    assert capsys.readouterr().err.startswith("Error: --port: ")
    assert run("serve", "--max-batch-items", "513") == 2
    assert "--max-batch-items" in capsys.readouterr().err


def test_serve_reads_the_file_and_options_before_it(path, capsys):
    path.write_text("host = '0.0.0.0'\nport = 70000\n")
    assert run("serve", "--config", str(path)) == 2
    assert f"port in {path}" in capsys.readouterr().err
    assert run("serve", "--config", str(path), "--port", "0") == 2
    said = capsys.readouterr().err
    assert "Everybody who reaches 0.0.0.0 would be served" in said
    assert "no probe is named (--probe)" in said
