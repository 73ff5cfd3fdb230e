"""``gateway_api.yaml`` against the types of the Kubernetes Gateway API; no controller is here.

It needs Node.js, and ``SIDELIGHT_NODE``: a folder with its ``node_modules``.
"""

import copy
import json
import subprocess
from pathlib import Path
from shutil import which

import pytest
import yaml

from test_examples import EXAMPLES

PROGRAM = Path(__file__).with_name("gateway_api.mjs")
NOT_INSTALLED = 3


def test_example_route_satisfies_gateway_api_types_and_invalid_fields_fail():
    if which("node") is None:
        pytest.skip("there is no Node.js")
    route = yaml.safe_load((EXAMPLES / "gateway_api.yaml").read_text())
    wrong_path, wrong_port = copy.deepcopy(route), copy.deepcopy(route)
    wrong_path["spec"]["rules"][0]["matches"][0]["path"]["type"] = "Regex"
    wrong_port["spec"]["rules"][0]["backendRefs"][0]["port"] = "http"
    routes = json.dumps([route, wrong_path, wrong_port])
    done = subprocess.run(
        ["node", str(PROGRAM), routes], capture_output=True, text=True, check=False
    )
    if done.returncode == NOT_INSTALLED:
        pytest.skip("SIDELIGHT_NODE names no folder with @kubernetes-models/gateway-api")
    output = json.loads(done.stdout)
    assert output[0] is None, output[0]
    assert "path/type" in output[1]
    assert "backendRefs/0/port" in output[2]
