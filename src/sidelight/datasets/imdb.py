"""IMDB: positive or negative film reviews of many sentences (Maas et al. 2011)."""

from sidelight.datasets.publication import Columns, Layout, Part, Published

# Rows: Maas et al. 2011, the labelled reviews. The hub has the same columns as local files.
_LAYOUT = Layout(
    columns=Columns("text", "label"),
    training=Part("train", 25000),
    test=Part("test", 25000),
)

IMDB = Published(
    name="imdb",
    title="IMDB",
    folder="imdb",
    repository="stanfordnlp/imdb",
    local=_LAYOUT,
    hub=_LAYOUT,
    notes=("Licence: none is stated by the authors.",),
)
