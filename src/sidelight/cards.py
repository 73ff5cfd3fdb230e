"""A probe's manifest for people: a summary, and a model card for sharing."""

from collections.abc import Mapping
from typing import Any

from sidelight.manifest import Manifest

_CARD = """---
library_name: sidelight
tags: [sidelight, probe, text-classification]
---

# {name}

A Sidelight probe: it classifies a text from the hidden
states that the frozen LLM `{backbone}` computes anyway, in the same forward pass that answers it.

{rows}

## Use

```python
import sidelight

clf = sidelight.load("path/to/this/folder")
print(clf.predict(["some text"])[0])
```

The probe fits one backbone (the fingerprint above); loading it on another is refused.
The figures are from the texts that chose its threshold: expect a little less on new data,
and measure on your own with `sidelight eval`.
"""


def summary(manifest: Manifest) -> dict[str, str]:
    """What the manifest says, a line each."""
    record, backbone = manifest.record, manifest.backbone
    options = ", ".join(f"{k}={v}" for k, v in manifest.mechanism.options.items())
    lines = {
        "name": manifest.name,
        "task": f"{manifest.task.kind}: {', '.join(manifest.task.labels)}",
        "mechanism": f"{manifest.mechanism.name} ({options})",
        "reads": manifest.reads.side,
        "format": manifest.prompt_format,
        "backbone": f"{backbone.name}, {backbone.layers} layers x {backbone.width}, "
        f"{backbone.dtype}, fingerprint {backbone.digest}",
        "thresholds": ", ".join(f"{t:.3f}" for t in manifest.thresholds) or "the largest wins",
        "calibration": str(manifest.calibration["kind"]),
    }
    if record:
        lines |= {
            "parameters": f"{record['parameters']:,}",
            "trained on": _taught(record),
            "validation": _figures(record["validation"]) + _folded(record.get("folds", 0)),
        }
    return lines


def model_card(manifest: Manifest) -> str:
    """The model card, in Markdown."""
    rows = "\n".join(f"- **{name}**: {value}" for name, value in summary(manifest).items())
    return _CARD.format(name=manifest.name, backbone=manifest.backbone.name, rows=rows)


def _taught(record: Mapping[str, Any]) -> str:
    is_long = record.get("settings", {}).get("long_inputs")
    among = ", also among others in long inputs" if is_long else ""
    return f"{record['training']['rows']:,} texts{among}, seed {record['seed']}"


def _folded(folds: int) -> str:
    return f", each fold of {folds} by a probe that the others taught" if folds else ""


def _figures(validation: Mapping[str, Any]) -> str:
    metrics = validation["metrics"]
    shown = [
        f"{name} {metrics[name]['value']:.3f}"
        for name in ("auprc", "f1", "accuracy")
        if metrics[name]["value"] is not None
    ]
    return f"{', '.join(shown)} on {validation['rows']:,} texts"
