"""Prometheus scrapes a live server, and finds what alerts and dashboard of ``deploy/`` ask for."""

import json
import re
import shutil
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from sidelight.engines.transformers.engine import TransformersEngine
from sidelight.judges.settings import JudgeSettings
from sidelight.models.conversation import Reads
from sidelight.policy.rules import Defer, Policy, Rule
from worlds.judges import scripted_judge
from worlds.models import tiny_backbone, untrained_probe
from worlds.servers import MODEL, free_port, http_client, in_process, served

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


RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]
ALERT_RULES = [rule for rule in RULES if "alert" in rule]
RECORDED = {rule["record"] for rule in RULES if "record" in rule}
# Drift is of a day and of the week before it; here both are the time since the start.
WINDOWS = {"interval: 2m": "interval: 1s", "[1d])) + ": "[1h])) + ", "[7d] offset 1d": "[1h]"}


def selectors(rule: dict) -> list[tuple[str, dict[str, str]]]:
    """The series that a rule reads, with the values of labels that it asks for."""
    found = re.findall(r"(\b(?:sidelight[_:][\w:]+|up))(?:\{([^}]*)\})?", rule["expr"])
    return [(name, dict(re.findall(r'(\w+)=~?"([^"]*)"', matchers))) for name, matchers in found]


def grouped(rule: dict) -> set[str]:
    """The labels that a rule keeps, of those that a server gives its series."""
    labels = ",".join(re.findall(r"by \(([^)]+)\)", rule["expr"])).split(",")
    return {label.strip() for label in labels} & {"probe", "side", "label", "le"}


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
def test_alert_rules_pass_promtool_tests():
    promtool("check", "rules", DEPLOY / "alerts.yaml")
    promtool("test", "rules", DEPLOY / "alerts_test.yaml", DEPLOY / "drift_test.yaml")


def test_every_alert_is_tested_and_documented():
    fired = re.findall(r'alertname="(\w+)"', (DEPLOY / "alerts_test.yaml").read_text())
    assert set(fired) == {rule["alert"] for rule in ALERT_RULES}
    told = (DEPLOY.parent / "docs" / "operate.md").read_text()
    assert [name for name in fired if f"`{name}`" not in told] == []
    assert all({"summary", "remedy"} == rule["annotations"].keys() for rule in ALERT_RULES)


def test_recording_rules_read_only_exported_or_recorded_series(tiny):
    with in_process(TransformersEngine(tiny, [untrained_probe(tiny, "p")])) as http:
        http.post("/v1/moderations", json={"input": "hello"}).raise_for_status()
        families = [*text_string_to_metric_families(http.get("/metrics").text)]
    labels_of = defaultdict(list)
    for sample in (sample for family in families for sample in family.samples):
        labels_of[sample.name].append(sample.labels)
    assert len(RECORDED) > 3
    for rule in (rule for rule in RULES if "record" in rule):
        for name, wanted in selectors(rule):
            if name not in RECORDED:
                (series,) = [
                    labels for labels in labels_of[name] if wanted.items() <= labels.items()
                ]
                assert series.keys() == {"probe", "label", "le"}
    # Every score is in one of the tenths that are added up.
    (tenths,) = (rule for rule in RULES if rule.get("record") == "sidelight:probe_score:tenths")
    bounds = {labels["le"] for labels in labels_of["sidelight_probe_score_bucket"]}
    assert {wanted["le"] for _, wanted in selectors(tenths)} == bounds - {"+Inf"}


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
    rules = (DEPLOY / "alerts.yaml").read_text()
    for written, here in WINDOWS.items():
        assert written in rules
        rules = rules.replace(written, here)
    (folder / "alerts.yaml").write_text(rules)
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
            # Until its storage is open, it answers 503.
            deadline = time.monotonic() + START_S
            while http.get(f"http://127.0.0.1:{port}/-/ready").status_code != 200:
                assert time.monotonic() < deadline
                time.sleep(0.2)
            yield Prometheus(http)
        finally:
            process.terminate()


def _with_judge(judge: JudgeSettings) -> Policy:
    """The policy with a judge that is asked about every prompt of the shadow."""
    shadow = replace(POLICY.input["shadow"], threshold=0.0, defer=Defer("guardian", share=0.0))
    return replace(POLICY, input={**POLICY.input, "shadow": shadow}, judges={"guardian": judge})


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """It has scraped a server before, between and after some requests of every kind."""
    backbone = tiny_backbone()
    injection = untrained_probe(backbone, "injection", threshold=0.99)
    answers = untrained_probe(backbone, "answers", reads=Reads("response"))
    probes = [injection, injection.changed(name="shadow"), answers]
    engine = TransformersEngine(backbone, probes)
    settings = {"api_key": [KEY], "metrics_key": [METRICS_KEY]}
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}
    with (
        scripted_judge() as judge,
        served(engine, policy=_with_judge(judge.settings()), **settings) as address,
        scraping(tmp_path_factory.mktemp("prometheus"), address) as prometheus,
        http_client(address) as http,
    ):
        prometheus.wait_until("up == 1")
        http.headers["Authorization"] = f"Bearer {KEY}"
        texts = [f"text {i}" for i in range(250)]
        for _ in range(2):
            # What a series begins with is no increase.
            http.post("/v1/moderations", json={"input": texts}).raise_for_status()
            prometheus.wait_until("sidelight:probe_score:tenths")
        for stream in (False, True):
            http.post("/v1/chat/completions", json={**chat, "stream": stream}).raise_for_status()
        prometheus.wait_until("sum(increase(sidelight_completion_tokens_total[1m])) > 0")
        prometheus.wait_until("sidelight:probe_score:psi")
        yield prometheus


@pytest.mark.slow
def test_every_panel_and_variable_of_dashboard_returns_data(prometheus: Prometheus):
    assert len(panel_queries()) > 20
    for query in panel_queries():
        prometheus.wait_until(query)
    for variable in DASHBOARD["templating"]["list"][1:]:
        series, label = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]).groups()
        (first, *_) = prometheus.wait_until(series.replace("$job", "sidelight"))
        assert label in first["metric"]


@pytest.mark.slow
def test_alert_series_and_labels_exist_and_rules_evaluate(prometheus: Prometheus):
    for rule in RULES:
        assert selectors(rule)
        for name, wanted in selectors(rule):
            found = prometheus.get("series", **{"match[]": name})
            assert found, name
            assert wanted.keys() | grouped(rule) <= found[0].keys()
            # Other values, such as the status of a failure, come with the failure.
            for label in wanted.keys() & {"action", "outcome", "job", "window"}:
                assert any(re.fullmatch(wanted[label], series[label]) for series in found), wanted
    groups = prometheus.get("rules")["groups"]
    health = {rule["name"]: rule["health"] for group in groups for rule in group["rules"]}
    assert health == dict.fromkeys([rule["alert"] for rule in ALERT_RULES] + [*RECORDED], "ok")
