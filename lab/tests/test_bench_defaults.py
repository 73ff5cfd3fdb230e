"""What training makes of a file, and of labels in the queue's order, beside rivals."""

import pytest

from corpora import rows
from sidelight.data.loading import load_examples
from sidelight.prompts import Message
from sidelight.training.background import Background
from sidelight_lab.bench.defaults import ALONE, DEFAULT, LINEAR, compare_defaults, defaults_table


@pytest.mark.slow
def test_the_default_and_every_rival_have_figures(tiny, tmp_path):
    judged = compare_defaults(
        tiny,
        load_examples(rows("binary", 70)),
        sizes=(5,),
        texts=(16,),
        draws=1,
        held_out=40,
        rivals=("tfidf", "last_layer", "attention_probe"),
        background=Background(tuple((Message("user", f"Ordinary {i}."),) for i in range(10))),
        cache_root=tmp_path,
    )
    rows_of = {(one.size, one.draw, one.row): one for one in judged}
    assert len(rows_of) == len(judged)
    for size in ("5 a class", "16 texts"):
        regressions = ("last_layer", "last_layer in contexts")
        for row in (DEFAULT, ALONE, LINEAR, "tfidf", *regressions, "attention_probe"):
            one = rows_of[size, 0, row]
            assert one.right.shape == one.losses.shape == (40,)
            assert one.figures["accuracy"] == one.right.mean()
            assert 0 <= one.figures["auprc in contexts"] <= 1
    assert defaults_table(judged).count("attention_probe") == 2
    # No hidden states are left behind.
    assert all("shared-" in str(path) for path in tmp_path.rglob("*.safetensors"))
