"""The files of ``deploy/`` name what exists, and run as far as they can without their host."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from commands import run
from sidelight.cli import app
from sidelight.policy.rules import read_policy
from sidelight.server.config import read_config
from sidelight.server.keys import Key, read_keys

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
# What the server takes to end beyond its notice and its drain, and some more.
LEEWAY_S = 3


def documents(name: str) -> list[dict]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


def parsed(words: Sequence[str]) -> dict:
    """What ``sidelight`` understands by these words; unknown ones are an error."""
    name, *rest = words
    return app.commands[name].make_context(name, list(rest)).params


def instructions() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile, each in one line."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n", " ", text).splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line]


def last(instruction: str) -> str:
    return [text for name, text in instructions() if name == instruction][-1]


def unit() -> dict[str, list[str]]:
    """The settings of the systemd unit; each may be repeated."""
    settings: dict[str, list[str]] = {}
    for line in (DEPLOY / "sidelight.service").read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            name, value = line.split("=", 1)
            settings.setdefault(name, []).append(value)
    return settings


def stateful_set() -> dict:
    (found,) = (d for d in documents("kubernetes.yaml") if d["kind"] == "StatefulSet")
    return found["spec"]


def container() -> dict:
    (found,) = stateful_set()["template"]["spec"]["containers"]
    return found


def compose() -> dict:
    return documents("compose.yaml")[0]["services"]["sidelight"]


def test_every_command_is_one_of_the_command_line():
    image = json.loads(last("ENTRYPOINT")) + json.loads(last("CMD"))
    service = shlex.split(unit()["ExecStart"][0])
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    for program, *words in (image, service, ["sidelight", *container()["args"]]):
        assert Path(program).name in scripts
        assert parsed(words)["config"] == Path("/etc/sidelight/server.toml")
    config = read_config(config=DEPLOY / "server.toml")
    assert config.policy is not None
    assert config.port == int(last("EXPOSE")) == container()["ports"][0]["containerPort"]
    assert f"{config.port}:{config.port}" in compose()["ports"]


def test_every_stop_leaves_the_time_to_drain():
    config = read_config(config=DEPLOY / "server.toml")
    least = config.notice_s + config.drain_s + LEEWAY_S
    assert stateful_set()["template"]["spec"]["terminationGracePeriodSeconds"] >= least
    assert int(compose()["stop_grace_period"].removesuffix("s")) >= least
    assert int(unit()["TimeoutStopSec"][0]) >= least
    ready = container()["readinessProbe"]
    assert ready["periodSeconds"] * ready["failureThreshold"] < config.notice_s


def test_every_path_of_the_configuration_is_mounted():
    config = read_config(config=DEPLOY / "server.toml")
    used = [config.policy, config.api_keys_file, config.admin_keys_file, config.audit_log]
    used.append(Path("/var/cache/sidelight"))
    in_pod = {Path(mount["mountPath"]) for mount in container()["volumeMounts"]}
    in_compose = {
        Path(volume.removesuffix(":ro").rsplit(":")[-1]) for volume in compose()["volumes"]
    }
    assert [path for path in used if not in_pod & {path, *path.parents}] == []
    assert [path for path in [*used, *config.probe] if not in_compose & {path, *path.parents}] == []
    written = {Path(path) for path in json.loads(last("VOLUME"))}
    assert written == {Path("/var/lib/sidelight"), Path("/var/cache/sidelight")}
    (projected,) = (v for v in stateful_set()["template"]["spec"]["volumes"] if "projected" in v)
    (generated,) = documents("kustomization.yaml")[0]["configMapGenerator"]
    kept, secret = projected["projected"]["sources"]
    assert kept["configMap"]["name"] == generated["name"]
    files = {Path(path).name for path in generated["files"]}
    files |= {item["path"] for item in secret["secret"]["items"]}
    assert files == {"server.toml", *(path.name for path in used[:3])}


def test_the_image_is_pinned_and_runs_without_root():
    bases = [text for name, text in instructions() if name == "FROM"]
    assert all("@${BASE_DIGEST}" in base for base in bases)
    user = last("USER")
    pod = stateful_set()["template"]["spec"]["securityContext"]
    assert user == f"{pod['runAsUser']}:{pod['runAsGroup']}"
    assert f"--uid {pod['runAsUser']} " in last("RUN")
    given = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    copied = [text.split()[:-1] for name, text in instructions() if name == "COPY"]
    sources = [path for paths in copied if not paths[0].startswith("--") for path in paths]
    assert sources
    assert all((ROOT / path).exists() and f"!{path}" in given for path in sources)
    extras = dict(text.split("=") for name, text in instructions() if name == "ARG" and "=" in text)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert extras["EXTRAS"].strip('"') in project["optional-dependencies"]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_the_commands_of_the_how_to_make_the_files_that_are_mounted(tmp_path: Path):
    page = (ROOT / "docs" / "deploy.md").read_text()
    commands = page.split("```console\n")[1].split("```")[0].replace("$ ", "")
    shutil.copytree(DEPLOY, tmp_path / "deploy", ignore=shutil.ignore_patterns("etc", ".env"))
    done = subprocess.run(
        ["sh", "-ec", commands], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    etc = tmp_path / "deploy" / "etc"
    told = dict(line.split(": ") for line in done.stdout.splitlines())
    assert read_keys(etc / "api-keys") == (Key.of("shop", told["client"]),)
    assert [key.id for key in read_keys(etc / "admin-keys")] == ["operator"]
    read_policy(etc / "policy.toml")
    written = "".join(path.read_text() for path in etc.iterdir())
    assert not any(key in written for key in told.values())


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_accepts_the_unit_and_calls_it_hardened(tmp_path: Path):
    text = (DEPLOY / "sidelight.service").read_text()
    copy = tmp_path / "sidelight.service"
    copy.write_text(text.replace("/opt/sidelight/bin/sidelight", sys.executable))
    for words in (["verify", "--man=no"], ["security", "--offline=true", "--threshold=20"]):
        checked = subprocess.run(["systemd-analyze", *words, copy], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr
        assert "sidelight.service:" not in checked.stderr


def test_a_wrong_configuration_is_not_started_again(tmp_path: Path):
    settings = (DEPLOY / "server.toml").read_text().replace("/etc/sidelight/", f"{tmp_path}/")
    (tmp_path / "server.toml").write_text(settings)
    (tmp_path / "policy.toml").write_text("nonsense = 1\n")
    code = run("serve", "--config", str(tmp_path / "server.toml"))
    assert code == int(unit()["RestartPreventExitStatus"][0])
