"""SST-2: positive or negative sentences of film reviews (Socher et al. 2013)."""

from sidelight.datasets.publication import Columns, Layout, Part, Published

SST2 = Published(
    name="sst2",
    title="SST-2",
    folder="sst2",
    repository="stanfordnlp/sst2",
    # Rows: Socher et al. 2013, without the neutral sentences.
    local=Layout(
        columns=Columns("text", "label"),
        training=Part("train_sentences", 6920),
        validation=Part("validation", 872),
        test=Part("test", 1821),
        notes=(
            "Training texts are the whole sentences, not the 67,349 phrases that GLUE made of "
            "them; the test labels are those of the original treebank.",
        ),
    ),
    # Rows: Wang et al. 2019 (GLUE).
    hub=Layout(
        columns=Columns("sentence", "label"),
        training=Part("train", 67349),
        test=Part("validation", 872),
        notes=(
            "GLUE hides the labels of its 1,821 test rows: its validation split is the test here, "
            "not comparable with scores on the original test sentences.",
            "Training texts are phrases, and phrases of one sentence may be in both training and "
            "validation.",
        ),
    ),
    notes=("Licence: none is stated by the authors.",),
    positive="1",
)
