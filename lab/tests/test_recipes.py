"""Recipes: those of the package, and mistakes in one's own."""

import pytest
from planted_tables import TABLE, recipe

from sidelight.errors import SidelightError
from sidelight_lab.tables.recipes import (
    BaselineConfig,
    ProbeConfig,
    build_rows,
    parse_recipe,
    recipe_names,
    recipe_text,
    suggested,
)


def test_rows_that_are_left_are_those_compared():
    text = TABLE.replace('ours = ["readout"]', 'ours = ["readout", "pooling"]')
    assert recipe(text).only(["tfidf", "pooling"]).ours == ("pooling",)


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_of_the_package_parse(name: str):
    parsed = parse_recipe(recipe_text(name), name=name)
    assert set(parsed.ours) <= set(parsed.names())


def test_the_package_has_a_recipe_for_every_table():
    assert set(recipe_names()) >= {
        "toxicchat", "sst2", "emotion", "imdb", "wildguardmix", "ood", "downcast", "latency",
        "sensitivity", "fewshot",
    }  # fmt: skip


@pytest.mark.parametrize("name", [n for n in recipe_names() if n != "latency"])
def test_recipes_of_the_package_name_what_exists(name: str):
    parsed = parse_recipe(recipe_text(name), name=name)
    rows = build_rows(parsed, suggested)
    swept = len(parsed.sweep.values) if parsed.sweep else 1
    assert sum(isinstance(row, ProbeConfig) for row in rows) == swept * len(parsed.probe)
    baselines = [row.name for row in rows if isinstance(row, BaselineConfig)]
    assert baselines == [row.name for row in parsed.baseline]


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_ask_a_prompted_model_about_the_classes(name: str):
    for row in parse_recipe(recipe_text(name), name=name).baseline:
        if (row.baseline or row.name) in ("zero_shot", "few_shot"):
            # The data's own names may be 0 and 1, which say nothing to the model.
            assert "question" in row.options or name == "own"
            assert "names" in row.options or name in ("own", "emotion", "fewshot-emotion")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("metric =", "metrc ="), r"unknown key 'metrc'.* Did you mean 'metric'"),
        (("options =", "optins ="), r"unknown key 'probe.1.optins'.* Did you mean 'options'"),
        (("seeds = 1", "seed = 1"), r"unknown key 'baseline.0.seed'.* Did you mean 'seeds'"),
        (("seeds = 2", 'seeds = "2"'), "seeds"),
        (('"auprc"', '"auprcc"'), "'metric' must be one of"),
        (('ours = ["readout"]', 'ours = ["readot"]'), "'ours' must name rows"),
        (('"comparison"', '"transfer"'), "test_data"),
        (('"comparison"', '"sensitivity"'), "sweep"),
        (('name = "pooling"', 'name = "readout"'), "name of its own"),
        (("title =", "title"), "not plain TOML"),
        (("seeds = 2", "seeds = 0"), "1 or more"),
        (("seeds = 1", "seeds = 0"), "1 or more"),
        (
            ('"comparison"', '"sensitivity"\nsweep = { parameter = "epochs", values = [] }'),
            "values",
        ),
        (
            ('"comparison"', '"sensitivity"\nsweep = { parameter = "epochs", values = [2, 2] }'),
            "differ",
        ),
    ],
)
def test_a_mistake_in_a_recipe_is_refused(change: tuple[str, str], complaint: str):
    with pytest.raises(SidelightError, match=complaint):
        parse_recipe(TABLE.replace(*change, 1), name="test")


def test_a_sweep_has_no_row_that_is_ours():
    text = TABLE.partition("[[baseline]]")[0].replace('"comparison"', '"sensitivity"')
    with pytest.raises(SidelightError, match="no 'ours'"):
        recipe(text + '[sweep]\nparameter = "epochs"\nvalues = [1, 2]\n')


def test_an_unknown_recipe_names_the_known_ones():
    with pytest.raises(SidelightError, match="Did you mean 'toxicchat'"):
        recipe_text("toxichat")
