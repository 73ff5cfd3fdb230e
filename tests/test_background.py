"""Background traffic: the packaged set with its licences, a file, and the order of both."""

import tomllib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import sidelight
import wordings
from sidelight.data.examples import Example, balanced_order
from sidelight.data.loading import load_examples
from sidelight.data.near_duplicates import are_alike
from sidelight.errors import SidelightError
from sidelight.models.conversation import Message
from sidelight.training.background import (
    PACKAGED,
    Background,
    load_background,
)

ROOT = Path(__file__).parents[1]
NOTICE = (ROOT / "NOTICE").read_text("utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PACKAGED_EXAMPLES = load_examples(PACKAGED, label=None)
PACKAGED_ROWS = PACKAGED_EXAMPLES.rows


def user_turns(*texts: str) -> tuple[Message, ...]:
    roles = ("user", "assistant")
    return tuple(Message(roles[turn % 2], text) for turn, text in enumerate(texts))


def asked(turns: tuple[Message, ...]) -> tuple[str, ...]:
    """What stays of a conversation that ends by what the assistant would answer."""
    return tuple(turn.content for turn in turns if turn.role != "assistant")


def test_load_background_accepts_none_packaged_and_files(tmp_path: Path):
    assert load_background("none") == Background()
    packaged = load_background("packaged")
    assert len(packaged.conversations) == len(PACKAGED_ROWS)
    path = tmp_path / "traffic.csv"
    path.write_text("text,source\nHello,mail\nWhere is my order?,chat\n")
    loaded = load_background(path)
    # Few files have every length and kind.
    assert Counter(loaded.conversations) == Counter(
        [user_turns("Hello"), user_turns("Where is my order?"), *packaged.conversations]
    )
    with pytest.raises(SidelightError, match=wordings.NO_FILE.format(path=".*traffic.jsonl")):
        load_background(tmp_path / "traffic.jsonl")
    path.write_text("prompt\nHello\n")
    with pytest.raises(SidelightError, match=wordings.NO_COLUMN.format(name="text")):
        load_background(path)


def test_trailing_assistant_turns_are_dropped(tmp_path: Path):
    path = tmp_path / "traffic.jsonl"
    path.write_text(
        '{"text": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]}\n'
    )
    assert user_turns("Hello") in load_background(path).conversations
    packaged = load_background("packaged").conversations
    assert {turns[-1].role for turns in packaged} == {"user", "tool"}
    assert {turn.role for turns in packaged for turn in turns} > {"system", "assistant"}


def test_notice_lists_source_and_licence_of_every_row():
    lines = [line.split(" | ") for line in NOTICE.splitlines() if " | " in line][1:]
    listed = {(licence, source): int(rows) for licence, source, rows, _ in lines}
    assert listed == Counter((row["license"], row["source"]) for row in PACKAGED_ROWS)
    names = {
        name
        for licence, _ in listed
        for name in licence.replace(" OR ", " AND ").split(" AND ")
        if name != "public domain"
    }
    _, licences = NOTICE.split("Licences:")
    assert all(f"\n{name} " in licences for name in names)
    # Redistributors of the package need to know.
    assert {*PROJECT["project"]["license"].split(" AND ")} == names


def test_wheel_includes_notice_and_packaged_background():
    assert "NOTICE" in PROJECT["project"]["license-files"]
    (package,) = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert PACKAGED.is_relative_to(ROOT / package)
    assert "!NOTICE" in (ROOT / "deploy" / "Dockerfile.dockerignore").read_text().splitlines()


def test_packaged_background_contains_no_demo_test_texts():
    folder = Path(sidelight.__file__).parent / "demo" / "data"
    tested = {
        example.text_key
        for file in folder.glob("*_test.jsonl")
        for example in load_examples(file, label=None).items
    }
    turns = {turn for turns in load_background("packaged").conversations for turn in turns}
    assert tested
    assert tested & {Example((turn,)).text_key for turn in turns} == set()


@pytest.mark.parametrize("count", [30, 100, 300])
def test_every_prefix_mixes_user_and_packaged_conversations(count: int, tmp_path: Path):
    path = tmp_path / "traffic.csv"
    path.write_text("text\n" + "".join(f"Where is my order number {i}?\n" for i in range(400)))
    loaded = load_background(path)
    is_from_file = [
        turns[0].content.startswith("Where is my order") for turns in loaded.conversations
    ]
    share = sum(is_from_file[:count]) / count
    assert 0.3 < share < 0.6


def test_next_conversation_comes_from_least_represented_strata():
    """By tokens, about: one of over 1024 characters counts as three, over 4096 as eight."""
    conversations = load_background("packaged").conversations
    cells = {
        asked(item.messages): (row["kind"], row["source"])
        for item, row in zip(PACKAGED_EXAMPLES.items, PACKAGED_ROWS, strict=True)
    }
    sizes = [sum(len(turn.content) for turn in turns) for turns in conversations]
    lengths = np.digitize(sizes, [64, 256, 1024, 4096]).tolist()
    several = np.digitize([*map(len, conversations)], [2, 5]).tolist()
    strata = [
        [*enumerate((length, many, *cells[asked(turns)]))]
        for length, many, turns in zip(lengths, several, conversations, strict=True)
    ]
    # Each beginning has all lengths, numbers of turns and kinds.
    drawn, known = (
        {pair for stratum in rows for pair in stratum[:3]} for rows in (strata[:30], strata)
    )
    assert drawn == known
    left = Counter(map(tuple, strata))
    taken: Counter[tuple[int, object]] = Counter()
    for length, values in zip(lengths[:300], strata, strict=False):
        often = {stratum: sum(taken[value] for value in stratum) for stratum in +left}
        assert often[tuple(values)] == min(often.values())
        left[tuple(values)] -= 1
        taken.update(dict.fromkeys(values, (1, 1, 1, 3, 8)[length]))


def test_balanced_order_is_deterministic_and_loses_no_row():
    strata = [(i % 2, i % 3, i) for i in range(60)]
    order = balanced_order(strata)
    assert sorted(order) == [*range(60)]
    assert order == balanced_order(strata)
    assert order != balanced_order(strata, seed=1)
    for count in range(6, 60, 6):
        for column, values in ((0, 2), (1, 3)):
            taken = np.bincount([strata[row][column] for row in order[:count]])
            assert max(taken) - min(taken) <= 1 + (values == 3)


def test_texts_differing_only_in_numbers_are_alike():
    texts = ["Please send order 17 to my new address.", "An entirely different thing to say."]
    references = ["Please send order 99 to my new address!"]
    assert are_alike(texts, references, cosine=0.85).tolist() == [True, False]
    assert are_alike(texts, [], cosine=0.85).tolist() == [False, False]


@pytest.mark.parametrize("count", [1, 5, 7])
def test_background_folds_share_no_source(count):
    background = load_background("packaged")
    folds = background.split_into(count)
    assert sum(map(len, folds)) == len(background)
    sources = [{*fold.sources} for fold in folds]
    assert sum(map(len, sources)) == len({*background.sources})
    assert min(map(len, folds)) > 0.7 * len(background) / count
    # Each keeps the balanced order.
    for fold in folds:
        rest = iter(background.conversations)
        assert all(turns in rest for turns in fold.conversations)


def test_missing_source_cells_load_as_empty(tmp_path):
    path = tmp_path / "traffic.csv"
    path.write_text("text,source\nHello,nan\nWhere is my order?,\nBye,chat\n")
    loaded = load_background(path)
    of = dict(zip(loaded.conversations, loaded.sources, strict=True))
    assert [of[user_turns(text)] for text in ("Hello", "Where is my order?", "Bye")] == [
        "",
        "",
        "chat",
    ]


def test_conversations_without_source_are_split_individually():
    turns = tuple((Message("user", f"Hello {i}."),) for i in range(10))
    for background in (Background(turns), Background(turns, ("",) * 10)):
        assert [len(fold) for fold in background.split_into(3)] == [4, 3, 3]
