"""Loaded texts are what the rows say, and their parts keep texts whole and labels in proportion."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import wordings
from sidelight.data.examples import Examples
from sidelight.data.loading import load_examples
from sidelight.errors import SidelightError
from sidelight.models.conversation import Message
from sidelight.types import Task
from worlds.data import ROWS, labelled


def test_content_hash_covers_only_training_content_and_order():
    base = load_examples(ROWS)
    text_changed = load_examples([{**ROWS[0], "text": "where is it"}, *ROWS[1:]])
    label_changed = load_examples([{**ROWS[0], "label": "fault"}, *ROWS[1:]])
    reordered = load_examples(ROWS[::-1])
    column_changed = load_examples([{**row, "id": 7} for row in ROWS])
    polarity_changed = load_examples(ROWS, positive="delivery")
    assert len({e.content_hash for e in (base, text_changed, label_changed, reordered)}) == 4
    assert column_changed.content_hash == polarity_changed.content_hash == base.content_hash
    ends = [[{"start": 0, "end": end, "label": "NAME"}] for end in (3, 4)]
    with_spans = [
        load_examples([{"text": "Anna", "spans": spans}], spans="spans") for spans in ends
    ]
    assert with_spans[0].content_hash != with_spans[1].content_hash


def test_plain_text_loads_as_single_user_message():
    chat = [{"role": "user", "content": "Why?"}]
    for cell in ("Why?", chat, np.array(chat)):
        examples = load_examples([{"text": cell}], label=None)
        assert (type(examples), len(examples)) == (Examples, 1)
        assert examples.items[0].messages == (Message("user", "Why?"),)


def test_empty_rows_are_dropped_and_conflicting_labels_trigger_warning(warned):
    rows = [{**row, "answer": "ok"} for row in ROWS]
    rows += [{"text": " \n", "label": "fault", "answer": "ok"}, {"label": "fault", "answer": "ok"}]
    rows += [{"text": "hello", "label": "fault", "answer": ""}]
    examples = load_examples(rows, response="answer")
    assert len(examples) == 4
    assert examples.skipped.empty_text == 3
    assert "Left out 3 rows with an empty text" in warned()[0]
    load_examples([*ROWS, {**ROWS[0], "label": "fault"}, ROWS[1]])
    assert "1 texts appear more than once" in warned()[-1]


def test_rows_without_text_are_refused():
    halves = [{"text": "a", "label": 0}, {"answer": "b", "label": 1}]
    empty_answer = [{"text": "a", "answer": " ", "label": 1}]
    cases = [
        ([("", "a"), (" ", "b")], None, r"None of the 2 rows has a text in column 'text'"),
        ([*empty_answer], "answer", r"None of the 1 rows .* 'answer' \(--response\)"),
        ([*halves], "answer", r"None of the 2 rows .* 'answer'"),
        ([], None, r"There are no rows"),
        ([("a",)], None, r"row 1: expected an object .* \(text, label\) pair"),
    ]
    for rows, response, says in cases:
        with pytest.raises(SidelightError, match=says):
            load_examples(rows, response=response)


def test_select_keeps_texts_labels_and_columns_together():
    examples = load_examples([{**row, "id": number} for number, row in enumerate(ROWS)])
    subset = examples.select([3, 0])
    assert [item.text for item in subset.items] == ["screen stays black", "where is my parcel"]
    assert subset.labels.tolist() == [1, 0]
    assert [row["id"] for row in subset.rows] == [3, 0]


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    picks=st.lists(st.integers(0, 25), min_size=8, max_size=60),
    fraction=st.floats(0.05, 0.95),
    seed=st.integers(0, 9),
)
def test_split_does_not_separate_duplicates_or_lose_rows(picks, fraction, seed):
    picks += [0, 1, 2, 3, 4, 5]  # two texts of each of three labels
    rows = [
        {"text": ("text ", "Text  ")[i % 2] + str(pick), "label": "abc"[pick % 3], "id": i}
        for i, pick in enumerate(picks)
    ]
    training, held_out = load_examples(rows).split(fraction, seed)
    sides = [{item.text_key for item in subset.items} for subset in (training, held_out)]
    assert not sides[0] & sides[1]
    ids = sorted(row["id"] for row in (*training.rows, *held_out.rows))
    assert ids == list(range(len(rows)))
    assert set(training.labels.tolist()) == set(held_out.labels.tolist()) == {0, 1, 2}


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(fraction=st.floats(0.05, 0.95), seed=st.integers(0, 99))
def test_split_preserves_label_proportions(fraction, seed):
    examples = load_examples(labelled(["a"] * 40 + ["b"] * 9 + ["c"] * 3))
    _, held_out = examples.split(fraction, seed)
    for label, count in enumerate([40, 9, 3]):
        share = held_out.labels.tolist().count(label)
        assert abs(share - fraction * count) <= 1, "one row is the finest step"


def test_multilabel_split_puts_every_label_on_both_sides():
    rng = np.random.default_rng(0)
    rows = [
        {"text": str(number), "often": int(rng.random() < 0.5), "rare": int(number % 50 == 0)}
        for number in range(200)
    ]
    for subset in load_examples(rows, label="often,rare").split(0.25, 0):
        assert subset.labels.any(axis=0).all()
        assert subset.labels[:, 1].sum() in (1, 3)


def test_answers_to_same_prompt_are_split_by_answer():
    rows = [
        {"text": "Reply." if number % 3 else "reply. ", "answer": answer, "label": number % 2}
        for number in range(40)
        for answer in (f"answer {number}", f"Answer  {number}")
    ]
    examples = load_examples(rows, response="answer")
    answers = [
        {" ".join(item.response.casefold().split()) for item in subset.items}
        for subset in examples.split(0.3, 0)
    ]
    assert [len(subset) for subset in answers] == [28, 12]
    assert not answers[0] & answers[1]
    folds = examples.folds(5, seed=0)
    assert sorted(np.concatenate(folds).tolist()) == list(range(len(examples)))


def test_text_key_ignores_only_case_and_spacing():
    keys = [item.text_key for item in load_examples([("A  b", 0), ("a b\n", 1), ("ab", 1)]).items]
    assert keys[0] == keys[1] != keys[2]


def test_splits_are_reproducible_by_seed():
    rows = labelled(["a", "b"] * 20)
    for examples in (load_examples(rows), load_examples(rows, label=None)):
        first, again, reseeded = (examples.split(0.3, seed)[1] for seed in (0, 0, 1))
        assert (len(first), len(reseeded)) == (12, 12)
        assert first.items == again.items != reseeded.items


def test_folds_cover_each_row_once_without_separating_duplicates():
    rows = labelled(["a"] * 40 + ["b"] * 9 + ["c"] * 5)
    examples = load_examples([*rows, *[(f"{text} ", label) for text, label in rows[:20]]])
    folds = examples.folds(5, seed=0)
    assert sorted(np.concatenate(folds).tolist()) == list(range(len(examples)))
    texts = [{examples.items[row].text.strip() for row in fold} for fold in folds]
    assert sum(map(len, texts)) == len(set.union(*texts))
    for fold in folds:
        found = examples.select(fold).labels.tolist()
        assert set(found) == {0, 1, 2}
        assert found.count(2) == 1


def test_draw_preserves_label_proportions_and_includes_every_label():
    examples = load_examples(labelled(["a"] * 70 + ["b"] * 28 + ["c"] * 2))
    drawn = examples.draw(20, seed=0)
    assert len(set(drawn.tolist())) == 20
    assert (np.diff(drawn) > 0).all()
    counts = np.bincount(examples.select(drawn).labels)
    assert counts[2] == 1
    assert abs(counts[0] - 14) <= 1
    assert (examples.draw(20, seed=1) != drawn).any()
    assert (examples.draw(500, seed=0) == np.arange(100)).all()
    with pytest.raises(
        SidelightError, match=wordings.TOO_FEW_FOR_LABELS.format(examples=2, labels=3)
    ):
        examples.draw(2, seed=0)
    flags = [{"text": f"text {n}", "a": int(n < 50), "b": int(n == 7)} for n in range(60)]
    several = load_examples(flags, label="a,b")
    assert several.select(several.draw(6, seed=0)).labels.any(0).all()


def test_impossible_splits_are_refused():
    with pytest.raises(SidelightError, match=wordings.CANNOT_SPLIT.format(folds=5)):
        load_examples(ROWS[:2]).folds(5, 0)
    with pytest.raises(SidelightError, match=wordings.SAME_TEXT):
        load_examples([("a", 0), ("A", 1)]).split(0.5, 0)
    answered = [{"text": "a", "answer": answer, "label": answer == "b"} for answer in "bB "]
    with pytest.raises(SidelightError, match=wordings.SAME_RESPONSE):
        load_examples(answered, response="answer", task=Task("binary", ("0", "1"))).split(0.5, 0)


def versions(count, seed=0):
    """Texts of random words, each in three versions: number, case, one or two words."""
    random = np.random.default_rng(seed)
    syllables = ["ka", "lo", "mi", "ren", "tu", "sap", "vor", "ze", "quin", "dra"]
    rows = []
    for text in range(count):
        words = ["".join(random.choice(syllables, 3)) for _ in range(9)]
        number = random.integers(100, 999, 2)
        changed = [*words[:4], "other", *words[5:]]
        rows += [
            (" ".join([*words, str(number[0])]), text % 2),
            (" ".join([*words, str(number[1])]).upper(), text % 2),
            (" ".join(changed) + "!", text % 2),
        ]
    return rows


@pytest.mark.parametrize("count", [40, 700])
def test_near_duplicates_stay_together(count, warned):
    examples = load_examples(versions(count))
    origin = np.arange(3 * count) // 3
    training, held_out = examples.split(0.2, seed=0)
    sides = [{item.text for item in subset.items} for subset in (training, held_out)]
    of_origin = [
        {origin[row] for row in range(len(examples)) if examples.items[row].text in side}
        for side in sides
    ]
    assert not of_origin[0] & of_origin[1]
    for fold in examples.folds(5, seed=0):
        assert set(origin[fold]).isdisjoint(origin[np.setdiff1d(np.arange(3 * count), fold)])
    assert examples.distinct == len(examples.first_rows) == count
    sentence = (
        f"{3 * count} texts are near-duplicates of others. They stay in the same fold, or on the "
        "same side of a split."
    )
    assert warned() == [sentence]
    examples.warn_of_near_duplicates()
    assert warned() == [sentence]
    # A part keeps the groups of the whole.
    subset = examples.select(range(0, 3 * count, 3))
    assert subset.distinct == count
    subset.warn_of_near_duplicates()
    assert warned() == []


def test_rows_of_same_group_stay_together(warned):
    """Rows that share a document or an attack."""
    words = [text for text, _ in versions(60)[::3]]
    rows = [
        {"text": word, "label": n % 2, "document": n // 6 if n < 30 else None, "attack": ""}
        for n, word in enumerate(words)
    ]
    rows[0]["attack"] = rows[59]["attack"] = "Ignore this."
    assert load_examples(rows).distinct == 60
    with pytest.raises(
        SidelightError,
        match=wordings.NO_COLUMN.format(name="dokument")
        + ".*"
        + wordings.DID_YOU_MEAN.format(name="document"),
    ):
        load_examples(rows, groups="dokument")
    grouped = load_examples(rows, groups="attack, document")
    assert grouped.distinct == 60 - 25 - 1
    documents = np.array(
        [-1 - n if row["document"] is None else row["document"] for n, row in enumerate(rows)]
    )
    for fold in grouped.folds(5, seed=0):
        assert {*documents[fold]}.isdisjoint(documents[np.setdiff1d(np.arange(60), fold)])
        assert (0 in fold) == (59 in fold)
    warned()
    grouped.warn_of_near_duplicates()
    (warning,) = warned()
    assert warning.startswith(
        "31 texts are near-duplicates of others or have the same attack or document."
    )
    assert grouped.select(range(30)).distinct == 5


def test_broad_group_column_is_dropped_before_first_named_column():
    words = [text for text, _ in versions(60)[::3]]
    rows = [
        {"text": word, "label": n % 2, "document": "the same", "attack": n // 2}
        for n, word in enumerate(words)
    ]
    assert load_examples(rows, groups="attack,document").distinct == 30


def test_near_duplicates_stay_together_when_group_column_is_dropped(warned):
    rows = [
        {"text": text, "label": n // 3 % 2, "site": "a" if n < 60 else None}
        for n, (text, _) in enumerate(versions(30))
    ]
    assert load_examples(rows).distinct == 30
    examples = load_examples(rows, groups="site")
    assert examples.distinct == 30
    examples.warn_of_near_duplicates()
    assert any("are near-duplicates of too many others" in each for each in warned())


def test_warning_counts_all_rows_of_split_group(warned):
    """Also those whose own label would not have asked for it."""
    words = [text for text, _ in versions(40)[::3]]
    rows = [
        {"text": word, "label": int(n < 20 and n % 2), "document": n // 10 if n < 20 else None}
        for n, word in enumerate(words)
    ]
    load_examples(rows, groups="document").warn_of_near_duplicates()
    *_, warning = warned()
    assert warning.startswith("20 texts are near-duplicates of too many others")


def test_long_text_with_inserted_paragraph_is_near_duplicate():
    random = np.random.default_rng(0)
    words = ["".join(random.choice([*"abcdefghijklmnopqrstuvwxyz"], 6)) for _ in range(3000)]
    rows = []
    for n in range(20):
        text = [*random.choice(words, 800)]
        place = random.integers(800)
        inserted = [*text[:place], *random.choice(words, 60), *text[place:]]
        rows += [(" ".join(text), n % 2), (" ".join(inserted), n % 2)]
    examples = load_examples(rows)
    assert examples.distinct == 20
    for fold in examples.folds(5, seed=0):
        assert len({*(fold // 2).tolist()}) == len(fold) / 2


def test_texts_differing_only_in_numbers_stay_together():
    rows = [(f"Please cancel order number {7919 * n} at once", n % 2) for n in range(60)]
    examples = load_examples([*rows, *versions(100)])
    assert examples.distinct == 101
    for fold in examples.folds(5, seed=0):
        assert (fold < 60).sum() in (0, 60)


def test_similar_groups_of_near_duplicates_are_merged():
    """More than are looked for beside each text: they are found by one of each group."""
    random = np.random.default_rng(0)
    words = ["".join(random.choice([*"abcdefghijklmnopqrstuvwxyz"], 6)) for _ in range(500)]
    rows = []
    for _ in range(6):
        text = [*random.choice(words, 60)]
        for _ in range(2):
            version = [*text]
            for place in random.integers(60, size=5):
                version[place] = random.choice(words)
            for n in range(30):
                rows.append((" ".join([*version[:-1], random.choice(words)]), n % 2))
    examples = load_examples(rows)
    assert examples.distinct == 6


def test_distinct_texts_are_not_grouped(warned):
    texts = [
        "Where is my parcel? It should have been here on Monday.",
        "My parcel has not arrived, who can tell me when it will?",
        "How do I bake bread without yeast?",
        "How do I bake a cake without eggs or butter?",
        "Please cancel my subscription, I am moving abroad.",
        "I would like to subscribe to your newsletter.",
        *(f"{word} is all that I have to say about {word}" for word in ("Rain", "Iron", "Jazz")),
        "ok",
        "yes",
    ]
    examples = load_examples([(text, n % 2) for n, text in enumerate(texts)])
    assert examples.distinct == len(texts)
    warned()
    examples.warn_of_near_duplicates()
    assert warned() == []


def test_template_groups_are_split_when_folds_would_be_impossible(warned):
    """Each label has its template, so that a group would be all texts of a label."""
    rows = [(f"Please cancel order number {n} at once", "cancel") for n in range(20)]
    rows += [(f"Where is my parcel with the number {n}?", "parcel") for n in range(20)]
    examples = load_examples(rows)
    for fold in examples.folds(5, seed=0):
        assert examples.select(fold).label_counts.tolist() == [4, 4]
    warned()
    examples.warn_of_near_duplicates()
    (warning,) = warned()
    assert warning.startswith("40 texts are near-duplicates of too many others")
    assert "the metrics are too optimistic" in warning
    # One label's template parts no other text.
    mixed = load_examples([*rows[:20], *((text, "other") for text, _ in versions(20))])
    templated = np.arange(20, 80)
    for fold in mixed.folds(5, seed=0):
        held_out = set((templated[np.isin(templated, fold)] - 20) // 3)
        assert held_out.isdisjoint((templated[~np.isin(templated, fold)] - 20) // 3)


def test_sources_omit_suffixes_and_default_to_empty():
    cells = ("mail: 3", "mail", None, "", float("nan"), 7)
    rows = [{"text": f"text {row}", "source": cell} for row, cell in enumerate(cells)]
    examples = load_examples(rows, label=None)
    assert examples.sources == ["mail", "mail", "", "", "", "7"]
