"""What training makes of a file is measured on other texts, beside rivals."""

import numpy as np
import pytest

from corpora import rows
from sidelight.data.loading import load_examples
from sidelight.errors import SidelightError
from sidelight_lab.bench.defaults import (
    AUTO,
    Judged,
    compare_defaults,
    defaults_table,
    described,
    differences,
)


def test_every_candidate_the_taken_one_and_every_rival_have_figures(tiny, tmp_path):
    judged = compare_defaults(
        tiny,
        load_examples(rows("binary", 120)),
        sizes=(5,),
        texts=(20,),
        draws=2,
        held_out=40,
        rivals=("tfidf", "means_all_layers", "attention_probe"),
        cache_root=tmp_path,
    )
    rows_of = {(one.size, one.draw, one.row): one for one in judged}
    assert len(rows_of) == len(judged)
    for size in ("5 a class", "20 texts"):
        for draw in (0, 1):
            taken = rows_of[size, draw, AUTO]
            assert taken.figures == rows_of[size, draw, taken.taken].figures
            for row in ("linear", "tfidf", "means_all_layers", "attention_probe"):
                one = rows_of[size, draw, row]
                assert one.right.shape == one.losses.shape == (40,)
                assert one.figures["accuracy"] == one.right.mean()
    printed = defaults_table(judged)
    assert printed.count("attention_probe") == 2
    gained = {(one["size"], one["row"]): one for one in described(judged)["differences"]}
    mean, low, high = gained["5 a class", "tfidf"]["log loss saved"]
    assert low <= mean <= high
    # No hidden states are left behind.
    assert not [*tmp_path.rglob("*.safetensors")] or all(
        "shared-" in str(path) for path in tmp_path.rglob("*.safetensors")
    )


def test_a_gain_is_paired_by_draw_and_its_interval_covers_draws_and_texts():
    def judged(row: str, draw: int, right: list[bool]) -> Judged:
        return Judged("5 a class", row, draw, {}, np.array(right), np.zeros(4))

    two = [
        judged(AUTO, 0, [True] * 4),
        judged(AUTO, 1, [True] * 4),
        judged("a", 0, [False] * 4),
        judged("a", 1, [True] * 4),
        judged("b", 1, [True] * 4),
    ]
    of_a, of_b = differences(two)
    assert of_a["accuracy gained"] == (0.5, 0.0, 1.0)
    assert (of_b["draws"], of_b["accuracy gained"]) == (1, (0.0, 0.0, 0.0))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"sizes": (500,)}, "Drawing 500 texts of each class .*: '.' has"),
        ({"texts": (500,)}, "Drawing 500 texts beside those that are held out: 20 are left"),
        ({"sizes": (5,), "rivals": ("tfdif",)}, "Unknown rival 'tfdif'. Did you mean 'tfidf'"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_anything_runs(tiny, tmp_path, given, says):
    with pytest.raises(SidelightError, match=says):
        compare_defaults(
            tiny,
            load_examples(rows("binary", 40)),
            draws=1,
            held_out=20,
            cache_root=tmp_path,
            **{"rivals": (), **given},
        )
