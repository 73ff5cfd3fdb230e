"""The files of ``deploy/`` name what exists, and run as far as they can without their host."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml

from sidelight.cli import app
from sidelight.policy.rules import read_policy
from sidelight.server.config import read_config
from sidelight.server.keys import Key, read_keys
from worlds.servers import cli

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONFIG = DEPLOY / "server.toml"


def documents(name: str) -> list[dict]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


(STATEFUL_SET,) = (d["spec"] for d in documents("kubernetes.yaml") if d["kind"] == "StatefulSet")
POD = STATEFUL_SET["template"]["spec"]
(CONTAINER,) = POD["containers"]
COMPOSE = documents("compose.yaml")[0]["services"]["sidelight"]
# The instructions of the Dockerfile, each in one line.
DOCKERFILE = re.sub(r"^#.*\n|\\\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)
INSTRUCTIONS = [line.split(maxsplit=1) for line in DOCKERFILE.splitlines() if line]
# The last one of each name.
LAST = dict(INSTRUCTIONS)
UNIT = ConfigParser(strict=False, interpolation=None)
UNIT.read(DEPLOY / "sidelight.service")
SERVICE = UNIT["Service"]
# What the server takes to end beyond its notice and its drain, and some more.
LEEWAY_S = 3


def test_deployment_commands_parse_and_ports_agree():
    image = json.loads(LAST["ENTRYPOINT"]) + json.loads(LAST["CMD"])
    service = shlex.split(SERVICE["ExecStart"])
    for program, name, *words in (image, service, ["sidelight", *CONTAINER["args"]]):
        assert Path(program).name in PROJECT["scripts"]
        # Unknown words are an error.
        params = app.commands[name].make_context(name, words).params
        assert params["config"] == Path("/etc/sidelight/server.toml")
    config = read_config(config=CONFIG)
    assert config.policy is not None
    assert config.port == int(LAST["EXPOSE"]) == CONTAINER["ports"][0]["containerPort"]
    assert f"{config.port}:{config.port}" in COMPOSE["ports"]


def test_stop_timeouts_leave_time_to_drain():
    config = read_config(config=CONFIG)
    least = config.drain_s + LEEWAY_S
    # The server is asked on until Kubernetes has taken it out of the service.
    _, seconds = CONTAINER["lifecycle"]["preStop"]["exec"]["command"]
    assert POD["terminationGracePeriodSeconds"] >= int(seconds) + least
    assert int(COMPOSE["stop_grace_period"].removesuffix("s")) >= least
    assert int(SERVICE["TimeoutStopSec"]) >= least


def test_every_configured_path_is_mounted():
    config = read_config(config=CONFIG)
    used = [config.policy, config.api_keys_file, config.admin_keys_file, config.audit_log]
    used.append(Path("/var/cache/sidelight"))
    in_pod = {Path(mount["mountPath"]) for mount in CONTAINER["volumeMounts"]}
    in_compose = {Path(text.removesuffix(":ro").rsplit(":")[-1]) for text in COMPOSE["volumes"]}
    assert [path for path in used if not in_pod & {path, *path.parents}] == []
    assert [path for path in [*used, *config.probe] if not in_compose & {path, *path.parents}] == []
    written = json.loads(LAST["VOLUME"])
    assert sorted(written) == ["/var/cache/sidelight", "/var/lib/sidelight"]
    (projected,) = (v for v in POD["volumes"] if "projected" in v)
    (generated,) = documents("kustomization.yaml")[0]["configMapGenerator"]
    mounted, secret = projected["projected"]["sources"]
    assert mounted["configMap"]["name"] == generated["name"]
    files = {Path(path).name for path in generated["files"]}
    files |= {item["path"] for item in secret["secret"]["items"]}
    assert files == {"server.toml", *(path.name for path in used[:3])}


def test_image_is_pinned_and_runs_as_non_root():
    bases = [text for name, text in INSTRUCTIONS if name == "FROM"]
    assert all("@${BASE_DIGEST}" in base for base in bases)
    user = POD["securityContext"]
    assert LAST["USER"] == f"{user['runAsUser']}:{user['runAsGroup']}"
    assert f"--uid {user['runAsUser']} " in LAST["RUN"]
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    copied = [text.split()[:-1] for name, text in INSTRUCTIONS if name == "COPY"]
    sources = [path for paths in copied if not paths[0].startswith("--") for path in paths]
    assert sources
    assert all((ROOT / path).exists() and f"!{path}" in ignored for path in sources)
    extras = dict(text.split("=") for name, text in INSTRUCTIONS if name == "ARG" and "=" in text)
    assert extras["EXTRAS"].strip('"') in PROJECT["optional-dependencies"]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_documented_commands_create_mounted_files(tmp_path: Path):
    page = (ROOT / "docs" / "operate.md").read_text()
    commands = page.split("```console\n")[1].split("```")[0].replace("$ ", "")
    shutil.copytree(DEPLOY, tmp_path / "deploy", ignore=shutil.ignore_patterns("etc", ".env"))
    output = subprocess.check_output(["sh", "-ec", commands], cwd=tmp_path, text=True)
    etc = tmp_path / "deploy" / "etc"
    told = dict(line.split(": ") for line in output.splitlines())
    assert read_keys(etc / "api-keys") == (Key.of("shop", told["client"]),)
    assert [key.id for key in read_keys(etc / "admin-keys")] == ["operator"]
    read_policy(etc / "policy.toml")
    written = "".join(path.read_text() for path in etc.iterdir())
    assert not any(key in written for key in told.values())


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_accepts_service_as_hardened(tmp_path: Path):
    text = (DEPLOY / "sidelight.service").read_text()
    copy = tmp_path / "sidelight.service"
    copy.write_text(text.replace("/opt/sidelight/bin/sidelight", sys.executable))
    for words in (["verify", "--man=no"], ["security", "--offline=true", "--threshold=20"]):
        checked = subprocess.run(["systemd-analyze", *words, copy], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr
        assert "sidelight.service:" not in checked.stderr


def test_systemd_does_not_restart_on_invalid_configuration(tmp_path: Path):
    settings = CONFIG.read_text().replace("/etc/sidelight/", f"{tmp_path}/")
    (tmp_path / "server.toml").write_text(settings)
    (tmp_path / "policy.toml").write_text("nonsense = 1\n")
    code = cli("serve", "--config", str(tmp_path / "server.toml"))
    assert code == int(SERVICE["RestartPreventExitStatus"])
