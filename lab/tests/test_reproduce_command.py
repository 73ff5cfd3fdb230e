"""``sidelight reproduce`` on local files."""

import json

import pytest
from click.testing import CliRunner
from planted_data import write_rows

from commands import run, saved
from sidelight.errors import SidelightError
from sidelight_lab.bench import latency
from sidelight_lab.cli.reproduce import reproduce as command


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["own"], "give --train and --test"),
        (["sst2", "--only", " , "], "No row is named. Known: .*pooling"),
        (["latency", "--seeds", "3"], "takes no --seeds"),
    ],
)
def test_options_that_cannot_apply_are_refused_with_the_remedy(arguments, remedy, tmp_path):
    with pytest.raises(SidelightError, match=remedy):
        CliRunner().invoke(command, [*arguments, "--out", str(tmp_path)], catch_exceptions=False)


@pytest.mark.slow
@pytest.mark.usefixtures("own_cache")
def test_a_latency_recipe_times_random_and_real_prompts(tiny, tmp_path, monkeypatch, capsys):
    # Each timing is of one run: how long one takes does not matter here.
    monkeypatch.setattr(latency, "SHORTEST_S", 0.0)
    path, folder, out = tmp_path / "latency.toml", tmp_path / "data" / "sst2", tmp_path / "out"
    path.write_text(
        'title = "Latency"\nkind = "latency"\ndata = "sst2"\n'
        "[latency]\nbatch_sizes = [1]\ntokens = [16]\ntexts = 2\nrepeats = 1\n"
    )
    folder.mkdir(parents=True)
    for seed, split in enumerate(("train_sentences", "validation", "test")):
        write_rows(folder / f"{split}.jsonl", 60, seed, columns=("text", "label"))
    places = ["--model", saved(tiny, tmp_path / "model"), "--data", str(folder.parent)]
    assert run("reproduce", str(path), *places, "--out", str(out), "--json") == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["load"] for row in rows} == {"16 tokens", "2 SST-2 texts"}
    assert (out / "latency.md").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("own_cache")
def test_the_command_makes_a_table_of_ones_own_files(tiny, tmp_path, capsys):
    columns = {"columns": ("message", "kind"), "labels": ("good", "bad")}
    files = [write_rows(tmp_path / f"{seed}.jsonl", 80, seed, **columns) for seed in (1, 2)]
    common = ["reproduce", "own", "--model", saved(tiny, tmp_path / "model"), "--seeds", "1"]
    common += ["--only", "readout,tfidf", "--text", "message", "--label", "kind"]
    common += ["--positive", "bad", "--out", str(tmp_path / "out"), "--train", files[0]]
    assert run(*common, "--test", files[1]) == 0
    assert "had not been opened" in capsys.readouterr().out
    table = json.loads((tmp_path / "out" / "table.json").read_text())["tables"][0]
    assert table["texts"] == 80
    assert {row["name"] for row in table["rows"]} == {"readout", "tfidf"}
    assert run(*common) == 2
    assert "--train and --test go together" in capsys.readouterr().err
