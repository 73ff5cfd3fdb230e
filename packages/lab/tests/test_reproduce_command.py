"""``sidelight reproduce`` on local files."""

import json

import pytest
from click.testing import CliRunner
from planted_data import write_rows

from sidelight.errors import SidelightError
from sidelight_lab.cli.reproduce import reproduce as command
from worlds.models import saved
from worlds.servers import cli


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["own"], "Name them with --train and --test"),
        (["sst2", "--only", " , "], "No row is named. Choose from: .*pooling"),
    ],
)
def test_inapplicable_options_are_rejected_with_a_remedy(arguments, remedy, tmp_path):
    with pytest.raises(SidelightError, match=remedy):
        CliRunner().invoke(command, [*arguments, "--out", str(tmp_path)], catch_exceptions=False)


@pytest.mark.slow
@pytest.mark.usefixtures("temporary_cache")
def test_command_builds_a_table_from_user_files(tiny, tmp_path, capsys):
    columns = {"columns": ("message", "kind"), "labels": ("good", "bad")}
    files = [write_rows(tmp_path / f"{seed}.jsonl", 80, seed, **columns) for seed in (1, 2)]
    common = ["reproduce", "own", "--model", saved(tiny, tmp_path / "model"), "--seeds", "1"]
    common += ["--only", "readout,tfidf", "--text", "message", "--label", "kind"]
    common += ["--positive", "bad", "--out", str(tmp_path / "out"), "--train", files[0]]
    assert cli(*common, "--test", files[1]) == 0
    assert "had not been read before" in capsys.readouterr().out
    table = json.loads((tmp_path / "out" / "table.json").read_text())["tables"][0]
    assert table["texts"] == 80
    assert {row["name"] for row in table["rows"]} == {"readout", "tfidf"}
    assert cli(*common) == 2
    assert "A table needs both --train and --test" in capsys.readouterr().err
