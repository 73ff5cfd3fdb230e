"""The command line in process, and a backbone on disk for it."""

import sys
from pathlib import Path

import pytest

from sidelight.backbone import TransformersBackbone
from sidelight.cli import main


def run(*arguments: str) -> int:
    """The exit code of ``sidelight`` with these arguments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sidelight", *arguments])
        try:
            main()
        except SystemExit as ended:
            return int(ended.code or 0)
    return 0


def saved(backbone: TransformersBackbone, folder: Path) -> str:
    """The folder that the backbone has been saved to, as ``--model`` takes it."""
    backbone.model.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
    return str(folder)
