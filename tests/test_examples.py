"""Examples run against a live server and print what the server says.

``tests/matrix/examples`` has those that need other programs and packages.
"""

import json
import re
import runpy
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from sidelight.data.loading import load_examples
from sidelight.engines.transformers.backbone import TransformersBackbone
from sidelight.engines.transformers.engine import TransformersEngine
from sidelight.policy.rules import Policy, Rule, read_policy
from sidelight_vllm import ENVIRONMENT
from worlds.data import documented_table
from worlds.models import three_probes, untrained_probe
from worlds.servers import http_client, in_process, served

EXAMPLES = Path(__file__).parent.parent / "examples"
ROOT = EXAMPLES.parent
KEY = "a-key"
MODEL = "smollm2"


@pytest.fixture(scope="module")
def server(tiny: TransformersBackbone) -> Iterator[str]:
    engine = TransformersEngine(tiny, three_probes(tiny), model=MODEL)
    with served(engine, api_key=KEY) as address:
        yield address


@pytest.fixture
def address(server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The server's address, where the examples look for it."""
    monkeypatch.setenv("SIDELIGHT_URL", server)
    monkeypatch.setenv("SIDELIGHT_API_KEY", KEY)
    return server


def prompt_labels(address: str) -> dict[str, str]:
    """Each probe's label for the question of the examples, from another request."""
    messages = [{"role": "user", "content": "Where is my refund?"}]
    with http_client(address) as http:
        http.headers["Authorization"] = f"Bearer {KEY}"
        body = {"model": MODEL, "messages": messages, "max_tokens": 1}
        answer = http.post("/v1/chat/completions", json=body).raise_for_status().json()
    return {v["probe"]: v["label"] for v in answer["sidelight"]["verdicts"]}


def require_verdicts_printed(name: str, address: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What an example of a client prints: the verdicts of an answer, and of a stream."""
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    printed = capsys.readouterr().out
    labels = prompt_labels(address)
    assert len(labels) == 3
    for probe, label in labels.items():
        assert f"{probe}: {label}, flagged: " in printed
    assert f"Before the text: {list(labels.values())}" in printed
    return printed


def test_openai_client_and_curl_show_complete_and_streamed_verdicts(address, capsys):
    printed = require_verdicts_printed("openai_chat.py", address, capsys)
    assert "Refused: probe_not_found" in printed
    printed = subprocess.check_output(["sh", str(EXAMPLES / "curl.sh")], text=True)
    (header,) = [line for line in printed.splitlines() if line.startswith("x-sidelight-verdicts: ")]
    verdicts = json.loads(header.removeprefix("x-sidelight-verdicts: "))
    assert {v["probe"]: v["label"] for v in verdicts} == prompt_labels(address)
    assert printed.count("data: [DONE]") == 1
    moderation = json.loads(printed.splitlines()[-1])
    assert len(moderation["results"]) == 2


def test_vllm_stack_values_match_plugin_settings():
    values = yaml.safe_load((EXAMPLES / "vllm_stack.yaml").read_text())
    (model,) = values["servingEngineSpec"]["modelSpec"]
    variables = {entry["name"]: entry["value"] for entry in model["env"]}
    assert variables["VLLM_PLUGINS"] == "sidelight"
    (mount,) = model["extraVolumeMounts"]
    paths = [*variables[ENVIRONMENT].split(":"), variables["SIDELIGHT_POLICY"]]
    assert all(path.startswith(mount["mountPath"] + "/") for path in paths)


def test_garak_reads_answers_and_skips_refusals(tiny):
    target = json.loads((EXAMPLES / "garak/sidelight.json").read_text())["rest"]["RestGenerator"]
    words = json.dumps(target["req_template_json_object"]).replace("$INPUT", "Where is my refund?")
    path = target["uri"].removeprefix("http://127.0.0.1:8000")
    assert target["response_json_field"] == "$.choices[0].message.content"
    for mode, status in (("flag", 200), ("block", 400)):
        policy = Policy(input={"toxicity": Rule(mode, threshold=0.0)})
        engine = TransformersEngine(tiny, [untrained_probe(tiny, "toxicity")], model=MODEL)
        with in_process(engine, policy=policy) as http:
            answer = http.post(path, content=words, headers=target["headers"])
        assert answer.status_code == status
        if mode == "flag":
            assert isinstance(answer.json()["choices"][0]["message"]["content"], str)
        else:
            assert target["skip_codes"] == [answer.status_code]
    read_policy(EXAMPLES / "garak/policy.toml")


@pytest.mark.slow
def test_blocked_prompts_in_garak_report_are_counted_by_probe(tmp_path, monkeypatch, capsys):
    def attempt(probe, text, output, score, status=2):
        turn = {"role": "user", "content": {"text": text}}
        return {
            "entry_type": "attempt",
            "status": status,
            "probe_classname": probe,
            "prompt": {"turns": [turn]},
            "outputs": [output and {"text": output}],
            "detector_results": {"a detector": [score]},
        }

    training = load_examples("guard:injection").items[0].text
    lines = [
        {"entry_type": "init"},
        attempt("a.Probe", "x", "unread", None, status=1),
        attempt("a.Probe", training, None, None),
        attempt("a.Probe", "A question about trains", "an answer", 1.0),
        attempt("b.Probe", "A question about ships", "an answer", 0.0),
    ]
    report = tmp_path / "a.report.jsonl"
    report.write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.setattr("sys.argv", ["blocked.py", str(report)])
    runpy.run_path(str(EXAMPLES / "garak/blocked.py"))
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split("|")[1:3] for row in rows] == [
        [" `a.Probe` ", " 1 of 2 (9% to 91%) "],
        [" `b.Probe` ", " 0 of 1 (0% to 79%) "],
        [" all ", " 1 of 3 (6% to 79%) "],
    ]
    assert [row.split("|")[3:5] for row in rows] == [[" 1 ", " 1 "], [" 0 ", " 0 "], [" 1 ", " 1 "]]


def test_gateway_route_matches_envoy_pattern_and_service_port():
    route = yaml.safe_load((EXAMPLES / "gateway_api.yaml").read_text())
    (rule,) = route["spec"]["rules"]
    (backend,) = rule["backendRefs"]
    files = yaml.safe_load_all((ROOT / "deploy/kubernetes.yaml").read_text())
    (service,) = (
        each
        for each in files
        if (each["kind"], each["metadata"]["name"]) == ("Service", backend["name"])
    )
    assert backend["port"] in [port["port"] for port in service["spec"]["ports"]]
    (listener,) = yaml.safe_load((EXAMPLES / "envoy.yaml").read_text())["static_resources"][
        "listeners"
    ]
    filters = listener["filter_chains"][0]["filters"][0]["typed_config"]
    regex = filters["route_config"]["virtual_hosts"][0]["routes"][0]["match"]["safe_regex"]["regex"]
    paths = [match["path"] for match in rule["matches"]]
    assert all(re.fullmatch(regex, path["value"]) for path in paths)
    assert {path["value"] for path in paths if path["type"] == "PathPrefix"} == {"/v1/models"}
    # A part of the pattern for each path.
    assert len(paths) == 6 == regex.count("|") + 1


def test_matrix_lanes_run_documented_integration_examples():
    lanes = runpy.run_path(str(ROOT / ".ci/matrix.py"))["LANES"]
    columns = ("tool", "calls", "fails open", "example", "lane")
    named: set[Path] = set()
    for row in documented_table("integrations.md", *columns):
        for path in re.findall(r"\]\(\.\./examples/(.+?)\)", row["example"]):
            named.add(EXAMPLES / path)
            if row["lane"].startswith("not run"):
                continue
            lane = row["lane"].removesuffix(", schema only")
            tests = [file for t in lanes[lane].tests for file in (ROOT / t).rglob("*.py")]
            words = (Path(path).stem, path.split("/")[0])
            assert any(word in file.read_text() for file in tests for word in words), path
    assert named
    assert not [path for path in named if not path.is_file()]
