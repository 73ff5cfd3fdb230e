"""The systemd unit of ``deploy/``: systemd accepts it, and its command serves and drains."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from commands import saved
from live import http_client, wait_until_ready
from sidelight.artifact import save_probe
from sockets import free_port
from test_deploy import DEPLOY, unit
from tiny import tiny_backbone, untrained_probe

KEY = "a-key-of-a-client"


def test_systemd_accepts_the_unit_and_calls_it_hardened(tmp_path: Path):
    if (analyze := shutil.which("systemd-analyze")) is None:
        pytest.skip("systemd-analyze is not installed")
    text = (DEPLOY / "sidelight.service").read_text()
    copy = tmp_path / "sidelight.service"
    copy.write_text(text.replace("/opt/sidelight/bin/sidelight", sys.executable))
    for words in (["verify", "--man=no"], ["security", "--offline=true", "--threshold=20"]):
        checked = subprocess.run([analyze, *words, copy], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr
        assert "sidelight.service:" not in checked.stderr


class Installed:
    """The unit's command on this machine: each folder that it names is one below ``home``."""

    def __init__(self, home: Path):
        self.home = home
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        backbone = tiny_backbone()
        model = saved(backbone, home / "model")
        probe = untrained_probe(backbone, "injection", threshold=0.999)
        save_probe(probe, self.path("/srv/sidelight/probes/injection"))
        etc = self.path("/etc/sidelight")
        etc.mkdir(parents=True)
        settings = (DEPLOY / "server.toml").read_text().replace("8000", str(self.port))
        settings = re.sub(r'"(/[^"]+)"', lambda path: f'"{self.path(path[1])}"', settings)
        (etc / "server.toml").write_text(
            f'model = "{model}"\nhost = "127.0.0.1"\n'.join(settings.split('host = "0.0.0.0"\n'))
        )
        shutil.copy(DEPLOY / "policy.toml", etc)
        (etc / "api-keys").write_text(f"client {KEY}\n")
        (etc / "admin-keys").write_text("operator a-key-of-an-operator\n")
        self.path("/var/lib/sidelight").mkdir(parents=True)

    def path(self, absolute: str) -> Path:
        return self.home / absolute.lstrip("/")

    def expanded(self, text: str) -> str:
        """The text with systemd's specifiers, and with its folders below ``home``."""
        # Credentials are files of the same name in a folder of their own.
        folders = {"%d": "/etc/sidelight", "%S": "/var/lib", "%C": "/var/cache"}
        for specifier, folder in folders.items():
            text = text.replace(specifier, folder)
        return re.sub(r"(^|=)(/(?:etc|srv|var)/)", rf"\1{self.home}\2", text)

    def start(self) -> subprocess.Popen[bytes]:
        settings = unit()
        program, *words = shlex.split(settings["ExecStart"][0])
        assert Path(program).name == "sidelight"
        environment = dict(
            self.expanded(pair).split("=", 1) for pair in shlex.split(settings["Environment"][0])
        )
        secret = {"SIDELIGHT_AUDIT_SALT": "salt", "SIDELIGHT_METRICS_KEY": "a-key-for-metrics"}
        return subprocess.Popen(
            [sys.executable, "-m", "sidelight", *map(self.expanded, words)],
            cwd=self.expanded(settings["WorkingDirectory"][0]),
            # A service has little else in its environment.
            env={
                "PATH": "/usr/bin:/bin",
                "PYTHONPATH": ":".join(sys.path),
                **environment,
                **secret,
            },
        )


def test_the_command_of_the_unit_serves_and_drains(tmp_path: Path):
    home = Installed(tmp_path)
    server = home.start()
    try:
        with http_client(home.url) as http:
            wait_until_ready(http)
            assert http.get("/v1/models").status_code == 401
            http.headers["Authorization"] = f"Bearer {KEY}"
            (model,) = http.get("/v1/models").json()["data"]
            ask = {
                "model": model["id"],
                "messages": [{"role": "user", "content": "hello"}],
                "max_tokens": 2,
            }
            assert http.post("/v1/chat/completions", json=ask).status_code == 200
            server.terminate()
            while http.get("/ready").status_code == 200:
                time.sleep(0.1)
            # A balancer that has not noticed yet is still served.
            assert http.post("/v1/chat/completions", json=ask).status_code == 200
        assert server.wait(int(unit()["TimeoutStopSec"][0])) in (0, -15)
    finally:
        server.kill()
        server.wait()
    audit = home.path("/var/lib/sidelight/audit.jsonl").read_text().splitlines()
    assert [json.loads(line)["key_id"] for line in audit] == ["client", "client"]
    assert home.path("/var/lib/sidelight/audit.jsonl").stat().st_mode & 0o077 == 0
