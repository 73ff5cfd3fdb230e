"""``sidelight reproduce`` on local files."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from commands import run, saved
from corpora import planted
from sidelight.backbone import TransformersBackbone
from sidelight.errors import SidelightError
from sidelight_lab.bench import latency
from sidelight_lab.cli.reproduce import reproduce as command


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["own"], "give --train and --test"),
        (["sst2", "--only", " , "], "No row is named. Known: .*pooling"),
    ],
)
def test_a_table_of_nothing_is_refused_with_the_remedy(arguments, remedy, tmp_path: Path):
    with pytest.raises(SidelightError, match=remedy):
        CliRunner().invoke(command, [*arguments, "--out", str(tmp_path)], catch_exceptions=False)


@pytest.mark.parametrize("option", ["--seeds", "--limit", "--folds", "--train", "--only"])
def test_a_latency_table_takes_no_option_of_training(option: str, tmp_path: Path):
    arguments = ["latency", "--out", str(tmp_path), option, "3"]
    with pytest.raises(SidelightError, match=f"takes no {option}"):
        CliRunner().invoke(command, arguments, catch_exceptions=False)


@pytest.fixture
def local(tiny: TransformersBackbone, tmp_path: Path) -> list[str]:
    """Options of the command for a saved model and a made-up data set."""
    tiny.model.save_pretrained(tmp_path / "model")
    tiny.tokenizer.save_pretrained(tmp_path / "model")
    folder = tmp_path / "data" / "sst2"
    folder.mkdir(parents=True)
    for seed, split in enumerate(("train_sentences", "validation", "test")):
        texts, labels = planted("binary", 60, seed=seed)
        rows = [{"text": t, "label": int(n)} for t, n in zip(texts, labels, strict=True)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    places = {"model": tmp_path / "model", "data": tmp_path / "data", "out": tmp_path / "out"}
    return [word for name, path in places.items() for word in (f"--{name}", str(path))]


@pytest.mark.slow
@pytest.mark.usefixtures("own_cache")
def test_the_command_makes_a_table_of_local_files(local: list[str], tmp_path: Path):
    arguments = ["sst2", *local, "--only", "readout,tfidf", "--seeds", "1"]
    done = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    assert "TF-IDF" in done.output
    assert "had not been opened" in done.output
    assert (tmp_path / "out" / "table.md").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("own_cache")
def test_a_latency_recipe_times_random_and_real_prompts(
    local: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # Each timing is of one run: how long one takes does not matter here.
    monkeypatch.setattr(latency, "SHORTEST_S", 0.0)
    path = tmp_path / "latency.toml"
    path.write_text(
        'title = "Latency"\nkind = "latency"\ndata = "sst2"\n'
        "[latency]\nbatch_sizes = [1]\ntokens = [16]\ntexts = 2\nrepeats = 1\n"
    )
    done = CliRunner().invoke(command, [str(path), *local, "--json"], catch_exceptions=False)
    rows = json.loads(done.stdout)["rows"]
    assert {row["load"] for row in rows} == {"16 tokens", "2 SST-2 texts"}
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {
        "latency.json", "latency.md", "recipe.toml", "environment.json",
    }  # fmt: skip


def rows_file(path, count, seed):
    texts, labels = planted("binary", count, seed=seed)
    pairs = zip(texts, labels, strict=True)
    rows = [{"message": text, "kind": ["good", "bad"][int(label)]} for text, label in pairs]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.mark.slow
def test_a_table_of_ones_own_files(tiny, tmp_path, own_cache, capsys):
    model = saved(tiny, tmp_path / "model")
    files = [rows_file(tmp_path / f"{i}.jsonl", 80, seed=i) for i in (1, 2)]
    common = ["reproduce", "own", "--model", model, "--only", "readout,tfidf", "--seeds", "1"]
    columns = ["--text", "message", "--label", "kind", "--positive", "bad"]
    place = ["--out", str(tmp_path / "out")]
    assert run(*common, *columns, *place, "--train", files[0], "--test", files[1]) == 0
    table = json.loads((tmp_path / "out" / "table.json").read_text())["tables"][0]
    assert table["texts"] == 80
    assert {row["name"] for row in table["rows"]} == {"readout", "tfidf"}
    assert run(*common, *columns, *place, "--train", files[0]) == 2
    assert "--train and --test go together" in capsys.readouterr().err
