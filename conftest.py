"""Backbones that many tests share. They are frozen; a test that changes one makes its own."""

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import torch
from openai import OpenAI

from sidelight.engines.transformers.backbone import TransformersBackbone
from sidelight.errors import SidelightWarning
from sidelight.models.conversation import EncodedPrompt
from worlds.judges import ScriptedJudge, scripted_judge
from worlds.models import FAMILIES, family_backbone, saved, tiny_backbone
from worlds.servers import http_client, openai_client

# Laws that several test files run say as much as tests do where they fail.
pytest_plugins = ["worlds.inside_vllm"]
pytest.register_assert_rewrite(
    "defer_contract", "engine_contract", "mechanism_contract", "policy_contract"
)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Refuses versions of pytest and pytest-xdist that silently keep no group on one worker."""
    if session.config.getoption("loadgroup", default=False):
        grouped = [item for item in session.items if item.get_closest_marker("xdist_group")]
        assert all("@" in item.nodeid for item in grouped), "See the versions in pyproject.toml."


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Matmuls this small only lose by threads, above all on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny() -> TransformersBackbone:
    """A tiny Llama with a chat template."""
    return tiny_backbone()


@pytest.fixture(scope="session")
def model(tiny: TransformersBackbone, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of the tiny Llama, as ``--model`` takes it."""
    return saved(tiny, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> TransformersBackbone:
    """A tiny backbone of each family, with a chat template."""
    return family_backbone(request.param)


@pytest.fixture(scope="module")
def judge_server() -> Iterator[ScriptedJudge]:
    """A server that answers as an LLM judge, for all tests of a module."""
    with scripted_judge() as judge:
        yield judge


@pytest.fixture
def judge(judge_server: ScriptedJudge) -> ScriptedJudge:
    """The module's judge, as if no test had asked it yet."""
    judge_server.reset()
    return judge_server


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[EncodedPrompt]:
    """Every prompt that a backbone runs from now on."""
    prompts: list[EncodedPrompt] = []
    run = TransformersBackbone.run

    def counted(self, batch, **options):
        prompts.extend(batch)
        return run(self, batch, **options)

    monkeypatch.setattr(TransformersBackbone, "run", counted)
    return prompts


@pytest.fixture
def warned(recwarn: pytest.WarningsRecorder) -> Callable[[], list[str]]:
    """Gives the sentences that the user was warned with since it was last called."""
    warnings.simplefilter("always", SidelightWarning)

    def sentences() -> list[str]:
        found = [str(each.message) for each in recwarn if each.category is SidelightWarning]
        recwarn.clear()
        return found

    return sentences


@pytest.fixture
def temporary_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Keeps a test out of the user's cache."""
    monkeypatch.setenv("SIDELIGHT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def trap(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that exists once Python imports a module from the working directory."""
    folder = tmp_path_factory.mktemp("downloads")
    sprung = folder / "sprung"
    for module in ("click", "numpy", "signal", "socket"):
        (folder / f"{module}.py").write_text(f"open({str(sprung)!r}, 'w')\n")
    monkeypatch.chdir(folder)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    # Without the empty entries, which stand for the working directory.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    return sprung


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub answers nothing."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def hub_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Makes an address the hub's, with an empty cache."""
    from huggingface_hub import constants

    def point(address: str) -> None:
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)

    return point


@pytest.fixture
def without_shape_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments of a wrong type are answered by our own errors."""
    import jaxtyping

    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture
def client(address: str) -> Iterator[OpenAI]:
    """The real client of the server at a test file's own ``address``."""
    with openai_client(address) as client:
        yield client


@pytest.fixture
def http(address: str) -> Iterator[httpx.Client]:
    """A bare client of the same server."""
    with http_client(address) as client:
        yield client
