"""Emotion: one of six emotions of an English tweet (Saravia et al. 2018)."""

from sidelight.datasets.publication import Columns, Layout, Part, Published

# Rows: the hub's data set card, configuration `split`.
_TRAINING, _VALIDATION, _TEST = 16000, 2000, 2000

EMOTION = Published(
    name="emotion",
    title="Emotion",
    folder="emotion",
    repository="dair-ai/emotion",
    local=Layout(
        columns=Columns("text", "label_name"),
        training=Part("train", _TRAINING),
        validation=Part("validation", _VALIDATION),
        test=Part("test", _TEST),
    ),
    hub=Layout(
        columns=Columns("text", "label"),
        training=Part("train", _TRAINING, "split"),
        validation=Part("validation", _VALIDATION, "split"),
        test=Part("test", _TEST, "split"),
    ),
    notes=("Licence: for education and research only.",),
)
