"""The check of a GPU runs here with tiny sizes: the sections that start vLLM."""

import json

from commands import run


def test_the_check_compares_verdicts_and_times_serving(tmp_path):
    only = ("reference", "parity: runner 1, eager", "serving: 0", "serving: 1 ")
    chosen = [word for name in only for word in ("--only", name)]
    assert run("bench", "gpu", "--out", str(tmp_path), *chosen) == 0
    made = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert len(made) == len(only)
    found = made["parity: runner 1, eager"]["result"]
    assert 0 < found["first_pass"] < 1e-4
    assert 0 < found["second_pass"] < 1e-4
    assert "readout" in found["probes"]
    for name in ("serving: 0 readouts", "serving: 1 readouts"):
        assert all(ms > 0 for values in made[name]["result"]["ms"].values() for ms in values)
    assert "% added" in (tmp_path / "gpu.md").read_text()
