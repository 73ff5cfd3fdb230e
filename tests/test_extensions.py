"""Other packages are found by entry points, and the core knows none of them by name."""

import ast
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import wordings
from sidelight.cli.runtime import Runtime
from sidelight.engines.backend import find_backend, owner_of
from sidelight.errors import SidelightError
from sidelight.extensions import extension_names, find_extension, load_extension, require_fit
from sidelight.probes.mechanisms.base import Geometry, MechanismSpec, build_mechanism
from worlds.servers import cli

ROOT = Path(__file__).parents[1]
PROJECTS = {
    path.parent.name: tomllib.loads(path.read_text())["project"]
    for path in (ROOT / "pyproject.toml", *ROOT.glob("packages/*/pyproject.toml"))
}


def install(folder, patch, *, requires, group="sidelight.engines", name="other", module="other"):
    """Installs a package that has one entry point and requires a version of Sidelight."""
    about = folder / f"{module}-3.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {module}\nVersion: 3.0\n"
        "Requires-Dist: numpy<0\n"
        f"Requires-Dist: {requires}\n"
    )
    (about / "entry_points.txt").write_text(f"[{group}]\n{name} = {module}:made\n")
    (folder / f"{module}.py").write_text("made = 'made'\n")
    patch.syspath_prepend(str(folder))


def test_packages_share_one_version_and_pin_the_core():
    core = PROJECTS[ROOT.name]
    assert {project["version"] for project in PROJECTS.values()} == {core["version"]}
    # The guards are texts and weights, which any version may read.
    for name in PROJECTS.keys() - {ROOT.name, "guards"}:
        asked = [line for line in PROJECTS[name]["dependencies"] if line.startswith("sidelight")]
        assert [line.partition("==")[2] for line in asked] == [core["version"]]


@pytest.mark.parametrize(
    "requires",
    [
        "sidelight",
        f"Sidelight[serve]=={version('sidelight')}",
        "sidelight<100,>=0.1",
        "sidelight==99; extra == 'absent'",
    ],
)
def test_compatible_package_is_loaded(requires, tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, requires=requires)
    assert "other" in extension_names("sidelight.engines")
    assert load_extension("sidelight.engines", "other") == "made"
    require_fit("other")


@pytest.mark.parametrize("requires", ["sidelight==99.1", "Sidelight[serve]<0.0.1"])
@pytest.mark.parametrize(
    ("group", "used"),
    [
        ("engines", lambda: Runtime(model=None, engine="other")),
        ("commands", lambda: cli("other")),
        ("mechanisms", lambda: build_mechanism(MechanismSpec("other", {}), Geometry(1, 1, 1))),
        ("guards", lambda: cli("predict", "guard:other", "a text")),
    ],
)
def test_incompatible_package_is_refused(group, used, requires, tmp_path, monkeypatch, capsys):
    install(tmp_path, monkeypatch, requires=requires, group=f"sidelight.{group}")
    try:
        assert used() == 2
        error = capsys.readouterr().err
    except SidelightError as raised:
        error = str(raised)
    assert "other 3.0 needs sidelight" in error
    assert f"sidelight {version('sidelight')} is installed" in error
    assert "\n" not in error.strip()


def test_incompatible_engine_does_not_affect_others(tmp_path, monkeypatch, capsys):
    install(tmp_path, monkeypatch, requires="sidelight==99.1")
    assert cli("train", "--help") == 0
    told = capsys.readouterr()
    assert "FILE.gguf" in " ".join(told.out.split())
    assert "Without the engine 'other': other 3.0 needs sidelight==99.1" in told.err
    assert Runtime(model=None, engine="transformers").model_of([]) == "smollm2"


def test_unimportable_engine_raises_error_only_when_selected(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, requires="sidelight", module="broken", name="broken")
    (tmp_path / "broken.py").write_text("import absent_package\n")
    with pytest.raises(
        SidelightError,
        match=wordings.CANNOT_LOAD.format(name="'broken'") + ".*absent_package",
    ):
        find_backend("broken")
    assert owner_of("smollm2") is None


def test_engine_option_errors_do_not_print_values(capsys):
    arguments = (
        "predict",
        "probe",
        "a text",
        "--engine",
        "llama",
        "--engine-option",
        "texts=secret",
    )
    assert cli(*arguments) == 2
    error = capsys.readouterr().err
    assert "texts=...: Input should be" in error
    assert "secret" not in error


def test_absent_extension_is_none_and_ambiguous_one_is_refused(tmp_path, monkeypatch):
    assert find_extension("sidelight.engines", "absent") is None
    for module in ("one", "two"):
        install(tmp_path, monkeypatch, requires="sidelight", module=module)
    with pytest.raises(SidelightError, match=r"'other' in 'sidelight.engines': one:made, two:made"):
        find_extension("sidelight.engines", "other")
    with pytest.raises(PackageNotFoundError):
        require_fit("absent-package")


# Where the core may write the name of an engine of another package: advice to users.
ADVICE = {
    "server/schemas.py": "requests that another engine takes",
    "judges/profiles.py": "Llama Guard is a judge",
    "models/smollm2.py": "GGUF is the format of the embedded model's file, and llama its type",
}


def strings(path):
    """The strings of a file's code, without its docstrings."""
    tree = ast.parse(path.read_text())
    documented = [
        node.body[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and ast.get_docstring(node) is not None
    ]
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and node not in documented
        ):
            yield node.value.lower()


def test_core_names_no_engine_except_transformers():
    core = ROOT / "src/sidelight"
    found = {
        str(path.relative_to(core))
        for path in core.rglob("*.py")
        for text in strings(path)
        if any(word in text for word in ("vllm", "llama", "gguf"))
    }
    assert found == ADVICE.keys()
