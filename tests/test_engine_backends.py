"""Engines are found by entry points; one of another package needs no line of ours."""

import json

import pytest

import wordings
from sidelight.cli.runtime import Runtime
from sidelight.engines.backend import engine_names, engines_of, find_backend
from sidelight.errors import SidelightError
from sidelight.probes.artifact import save_probe
from worlds.models import tiny_backbone, untrained_probe
from worlds.servers import cli

PACKAGE = '''"""Runs the model tiny:1 alone."""

from dataclasses import replace

from sidelight.engines.backend import Backend
from sidelight.errors import SidelightError


class TinyBackend(Backend):
    name = "tiny"
    runs_safetensors = False

    @classmethod
    def owns(cls, model):
        return model.startswith("tiny:")

    def find(self, model):
        if model != "tiny:1":
            raise SidelightError(f"tiny has no model '{model}'.")
        return model

    def read(self, model):
        from sidelight.states.reader import Model

        backbone = self.load(model, None)
        return Model(model, model, backbone.encoder, backbone.fingerprint)

    def load(self, model, prompt_format):
        from worlds.models import tiny_backbone

        backbone = tiny_backbone()
        backbone.name = model
        backbone.fingerprint = replace(backbone.fingerprint, name=model)
        return backbone

    def engine(self, model, probes):
        from sidelight.engines.transformers.engine import TransformersEngine
        from sidelight.probes.probe import common_format

        backbone = self.load(model, common_format(probes))
        return TransformersEngine(backbone, probes, model=self.options.served_model_name)
'''


def install_engine(folder, patch, package="tiny_engine"):
    """Installs a package with the engine ``tiny``."""
    (folder / f"{package}.py").write_text(PACKAGE)
    about = folder / f"{package}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[sidelight.engines]\ntiny = {package}:TinyBackend\n")
    patch.syspath_prepend(str(folder))


@pytest.fixture
def probe(tmp_path):
    return save_probe(untrained_probe(tiny_backbone(), "p"), tmp_path / "probe")


def test_third_party_engine_runs_its_models(probe, tmp_path, monkeypatch, capsys):
    install_engine(tmp_path, monkeypatch)
    first, *rest = engine_names()
    assert first == "transformers"
    assert {"llama", "tiny", "vllm"} <= {*rest}
    assert engines_of("tiny:1") == ["tiny"]
    assert engines_of("smollm2") == ["transformers", "vllm"]
    assert cli("predict", str(probe), "a text", "--model", "tiny:1") == 0
    assert json.loads(capsys.readouterr().out)["probe"] == "p"
    served = Runtime(model="tiny:1", engine="auto").load_engine([])
    assert served.model == "tiny:1"
    for words, says in (
        (("--model", "tiny:2"), "tiny has no model 'tiny:2'"),
        (
            ("--model", "tiny:1", "--engine-option", "a=1"),
            "tiny has no option 'a'. It has none",
        ),
    ):
        assert cli("predict", str(probe), "a text", *words) == 2
        assert says in capsys.readouterr().err


def test_unknown_and_ambiguous_engines_are_refused(tmp_path, monkeypatch):
    with pytest.raises(
        SidelightError, match=wordings.NO_ENGINE.format(name="vlm") + r".*mean 'vllm'\?.*packages/"
    ):
        find_backend("vlm")
    for package in ("one_engine", "other_engine"):
        install_engine(tmp_path, monkeypatch, package)
    with pytest.raises(SidelightError, match=wordings.SEVERAL_HAVE.format(name="tiny")):
        find_backend("tiny")
