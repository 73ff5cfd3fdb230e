"""What training makes of few texts is measured on others."""

import pytest

from corpora import rows
from sidelight.data.loading import load_examples
from sidelight.errors import SidelightError
from sidelight_lab.bench.defaults import AUTO, candidates_table, compare_candidates


def test_every_candidate_and_the_taken_one_have_figures(tiny, tmp_path):
    found = compare_candidates(
        tiny,
        load_examples(rows("binary", 120)),
        sizes=(5, 8),
        draws=2,
        held_out=20,
        cache_root=tmp_path,
    )
    titles = [row["row"] for row in found]
    assert len(found) == 2 * 2 * len(set(titles))
    assert {AUTO, "linear"} < set(titles)
    for row in found:
        assert 0 <= row["accuracy"] <= 1
        assert row["log loss"] > 0
        if row["row"] == AUTO:
            (same,) = (
                other
                for other in found
                if (other["size"], other["draw"], other["row"])
                == (row["size"], row["draw"], row["taken"])
            )
            assert same["log loss"] == row["log loss"]
    printed = candidates_table(found)
    assert printed.count("linear") == 2


def test_too_few_texts_of_a_class_are_refused_before_anything_runs(tiny, tmp_path):
    with pytest.raises(SidelightError, match="needs 520, but"):
        compare_candidates(
            tiny,
            load_examples(rows("binary", 40)),
            sizes=(500,),
            draws=1,
            held_out=20,
            cache_root=tmp_path,
        )
