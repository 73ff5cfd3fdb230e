"""What training makes of a file by default, beside rivals, on texts held out."""

import pytest

from sidelight.data.loading import load_examples
from sidelight.models.conversation import Message
from sidelight.training.background import Background
from sidelight.training.settings import SUGGESTED, TrainingSettings
from sidelight_lab.bench.defaults import (
    DEFAULT,
    WITHOUT_CONTEXT,
    compare_defaults,
    defaults_table,
)
from worlds.data import planted_rows


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "figure"),
    [("binary", "auprc in contexts"), ("multiclass", "accuracy in contexts")],
)
def test_default_and_every_rival_have_metrics(tiny, tmp_path, monkeypatch, kind, figure):
    monkeypatch.setitem(SUGGESTED, "readout", TrainingSettings(epochs=2, least_steps=0))
    turns = (Message("assistant", "Yes."), Message("user", "Thanks."))
    conversations = tuple((Message("user", f"Hello {i}."), *turns) for i in range(10))
    evaluated = compare_defaults(
        tiny,
        load_examples(planted_rows(kind, 100)),
        sizes=(8,),
        texts=(16,),
        draws=1,
        held_out=40,
        rivals=("tfidf", "last_layer", "means_all_layers", "attention_probe"),
        background=Background(conversations),
        cache_root=tmp_path,
    )
    rows_of = {(one.size, one.draw, one.row): one for one in evaluated}
    assert len(rows_of) == len(evaluated)
    for size in ("8 a class", "16 texts"):
        regressions = [
            name + end
            for name in ("last_layer", "means_all_layers")
            for end in ("", " in contexts")
        ]
        for row in (DEFAULT, WITHOUT_CONTEXT, "tfidf", *regressions, "attention_probe"):
            one = rows_of[size, 0, row]
            assert one.right.shape == one.losses.shape == (40,)
            assert one.metrics["accuracy"] == one.right.mean()
            assert 0 <= one.metrics[figure] <= 1
    # Background traffic is flagged where there are thresholds and background to measure it by.
    has_traffic = {one.row for one in evaluated if "traffic flagged" in one.metrics}
    assert has_traffic == ({DEFAULT} if kind == "binary" else set())
    assert defaults_table(evaluated).count("attention_probe") == 2
