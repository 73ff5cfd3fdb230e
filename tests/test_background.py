"""Background traffic: the packaged set, a file, and what a model has written."""

from pathlib import Path

import pytest

import sidelight
from sidelight.backbone import TransformersBackbone
from sidelight.data.examples import Example
from sidelight.data.loading import load_examples
from sidelight.errors import SidelightError
from sidelight.prompts import Message
from sidelight.smollm2 import cache_root
from sidelight.training.settings import (
    PACKAGED,
    Background,
    default_background,
    load_background,
    own_set,
)

Turns = tuple[Message, ...]
PACKAGED_SET = load_examples(PACKAGED, label=None)
PACKAGED_TURNS = [example.messages for example in PACKAGED_SET.items]


def said(*texts: str) -> Turns:
    roles = ("user", "assistant")
    return tuple(Message(roles[turn % 2], text) for turn, text in enumerate(texts))


def test_no_set_the_packaged_one_and_a_file_need_no_llm(tiny: TransformersBackbone, tmp_path: Path):
    assert load_background("none") == Background()
    assert load_background("packaged").conversations == tuple(PACKAGED_TURNS)
    path = tmp_path / "traffic.csv"
    path.write_text("text,source\nHello,mail\nWhere is my order?,chat\n")
    conversations = (said("Hello"), said("Where is my order?"))
    # Few files have every length and kind.
    both = (*conversations, *PACKAGED_TURNS)
    assert load_background(path).conversations == both
    assert load_background(path).private == 2
    assert load_background("packaged").private == 0
    with pytest.raises(SidelightError, match=r"No file .*traffic\.jsonl"):
        load_background(tmp_path / "traffic.jsonl")
    path.write_text("prompt\nHello\n")
    with pytest.raises(SidelightError, match="no column 'text'"):
        load_background(path)


def test_the_packaged_set_holds_no_text_that_a_demonstration_is_tested_on():
    folder = Path(sidelight.__file__).parent / "demo" / "data"
    tested = {
        example.text_key
        for file in folder.glob("*_test.jsonl")
        for example in load_examples(file, label=None).items
    }
    said_there = {Example((turn,)).text_key for turns in PACKAGED_TURNS for turn in turns}
    assert tested
    assert tested & said_there == set()


@pytest.mark.usefixtures("own_cache")
def test_a_set_that_the_model_has_written_takes_the_place_of_the_packaged_one(
    tiny: TransformersBackbone,
):
    assert default_background(tiny.fingerprint) == load_background("packaged")
    path = own_set(tiny.fingerprint)
    assert path.is_relative_to(cache_root())
    path.parent.mkdir(parents=True)
    path.write_text('{"text": "Hello"}\n')
    assert default_background(tiny.fingerprint) == Background((said("Hello"),))
