"""Prometheus scrapes a live server, and finds what alerts and dashboard of ``deploy/`` ask for."""

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest
import yaml

from live import MODEL, http_client, served
from sidelight.engines.transformers import TransformersEngine
from sidelight.policy.rules import Policy, Rule
from sidelight.prompts import Reads
from sidelight.server.metrics import ENOUGH
from sockets import free_port
from tiny import tiny_backbone, untrained_probe

DEPLOY = Path(__file__).parent.parent / "deploy"
METRICS_KEY, KEY = "a-key-for-metrics", "a-key-of-a-client"
ALERTS = yaml.safe_load((DEPLOY / "alerts.yaml").read_text())
DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
START_S = 60
# What Grafana puts for its variables.
VARIABLES = {"$job": "sidelight", "$instance": ".*", "$probe": ".*", "$__rate_interval": "1m"}
POLICY = Policy(
    input={"injection": Rule("block"), "shadow": Rule("shadow", shadow_of="injection")},
    system_turns="refuse",
)


ALERT_RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]


def panel_queries() -> list[str]:
    """The queries of the dashboard, as Grafana sends them."""
    queries = [t["expr"] for panel in DASHBOARD["panels"] for t in panel.get("targets", ())]
    for name, value in VARIABLES.items():
        queries = [query.replace(name, value) for query in queries]
    return queries


def installed(name: str) -> str:
    """The path of a program, where it is there."""
    return shutil.which(name) or pytest.skip(f"{name} is not installed")


def promtool(*words: object) -> None:
    done = subprocess.run([installed("promtool"), *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_alerts_fire_when_they_should_and_only_then():
    promtool("check", "rules", DEPLOY / "alerts.yaml")
    promtool("test", "rules", DEPLOY / "alerts_test.yaml")


def test_the_tests_of_alerts_make_each_of_them_fire():
    fired = re.findall(r'alertname="(\w+)"', (DEPLOY / "alerts_test.yaml").read_text())
    assert set(fired) == {rule["alert"] for rule in ALERT_RULES}
    told = (DEPLOY.parent / "docs" / "operate.md").read_text()
    assert [name for name in fired if f"`{name}`" not in told] == []
    assert all({"summary", "remedy"} == rule["annotations"].keys() for rule in ALERT_RULES)


@dataclass(frozen=True)
class Prometheus:
    http: httpx.Client

    def get(self, path: str, **parameters: str) -> dict:
        answer = self.http.get(path, params=parameters)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def wait_until(self, query: str) -> list[dict]:
        """What the query finds, once it finds something."""
        deadline = time.monotonic() + START_S
        while not (found := self.get("query", query=query)["result"]):
            assert time.monotonic() < deadline, query
            time.sleep(0.2)
        return found


@contextmanager
def scraping(folder: Path, target: str) -> Iterator[Prometheus]:
    """Debian's, with the configuration of ``deploy/`` but for the address and the intervals."""
    (folder / "metrics-key").write_text(METRICS_KEY)
    shutil.copy(DEPLOY / "alerts.yaml", folder)
    config = (DEPLOY / "prometheus.yaml").read_text()
    for written, here in (
        ("/run/secrets/metrics-key", str(folder / "metrics-key")),
        ("sidelight:8000", target.removeprefix("http://")),
        ("15s", "1s"),
    ):
        assert written in config
        config = config.replace(written, here)
    (folder / "prometheus.yaml").write_text(config)
    promtool("check", "config", folder / "prometheus.yaml")
    port, program = free_port(), installed("prometheus")
    options = {"config.file": folder / "prometheus.yaml", "storage.tsdb.path": folder / "data"}
    options |= {"web.listen-address": f"127.0.0.1:{port}", "log.level": "error"}
    words = [f"--{name}={value}" for name, value in options.items()]
    address = f"http://127.0.0.1:{port}/api/v1/"
    # It does not listen at once.
    waiting = httpx.HTTPTransport(retries=8)
    with (
        subprocess.Popen([program, *words]) as process,
        httpx.Client(base_url=address, transport=waiting) as http,
    ):
        try:
            yield Prometheus(http)
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """It has scraped a server before, between and after some requests of every kind."""
    backbone = tiny_backbone()
    stored = {"validation": {"scores": {"toxic": [5] * 10}}}
    judging = replace(untrained_probe(backbone, "injection", threshold=0.99), record=stored)
    answers = untrained_probe(backbone, "answers", reads=Reads("response"))
    probes = [judging, replace(judging, name="shadow"), answers]
    engine = TransformersEngine(backbone, probes)
    settings = {"policy": POLICY, "api_key": [KEY], "metrics_key": [METRICS_KEY]}
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}
    with (
        served(engine, **settings) as address,
        scraping(tmp_path_factory.mktemp("prometheus"), address) as prometheus,
        http_client(address) as http,
    ):
        prometheus.wait_until("up == 1")
        http.headers["Authorization"] = f"Bearer {KEY}"
        texts = [f"text {i}" for i in range(ENOUGH)]
        http.post("/v1/moderations", json={"input": texts}).raise_for_status()
        for stream in (False, True):
            http.post("/v1/chat/completions", json={**chat, "stream": stream}).raise_for_status()
        prometheus.wait_until("sum(increase(sidelight_completion_tokens_total[1m])) > 0")
        prometheus.wait_until("sidelight_probe_drift_psi")
        yield prometheus


@pytest.mark.slow
def test_every_panel_of_the_dashboard_shows_something(prometheus: Prometheus):
    assert len(panel_queries()) > 20
    for query in panel_queries():
        prometheus.wait_until(query)
    for variable in DASHBOARD["templating"]["list"][1:]:
        series, label = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]).groups()
        (first, *_) = prometheus.wait_until(series.replace("$job", "sidelight"))
        assert label in first["metric"]


@pytest.mark.slow
def test_every_series_and_label_of_the_alerts_exists_and_all_are_evaluated(prometheus: Prometheus):
    for rule in ALERT_RULES:
        labels = re.findall(r"by \(([^)]+)\)", rule["expr"])
        grouped = {label.strip() for group in labels for label in group.split(",")}
        selectors = re.findall(r"(\b(?:sidelight_\w+|up))(?:\{([^}]*)\})?", rule["expr"])
        assert selectors
        for name, matchers in selectors:
            found = prometheus.get("series", **{"match[]": name})
            assert found, name
            wanted = dict(re.findall(r'(\w+)=~?"([^"]*)"', matchers))
            assert wanted.keys() | (grouped & {"probe", "side", "label", "le"}) <= found[0].keys()
            # Other values, such as the status of a failure, come with the failure.
            for label in wanted.keys() & {"action", "outcome", "job"}:
                assert any(re.fullmatch(wanted[label], series[label]) for series in found), wanted
    groups = prometheus.get("rules")["groups"]
    health = {rule["name"]: rule["health"] for group in groups for rule in group["rules"]}
    assert health == {rule["alert"]: "ok" for rule in ALERT_RULES}
