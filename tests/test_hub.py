"""``hf:OWNER/NAME@REVISION`` in place of a probe's folder, from a hub on this machine."""

import json
import os
import threading
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import wordings
from sidelight import load
from sidelight.errors import SidelightError
from sidelight.guards import named_sources, probe_folder, probe_folders
from sidelight.probes.artifact import load_probe, save_probe
from sidelight.probes.card import PROBE, README
from worlds.models import broken, untrained_probe
from worlds.servers import cli, free_port

FIRST, SECOND = "1" * 40, "2" * 40


class Hub(ThreadingHTTPServer):
    """The files of each commit of each repository, and how often a file was downloaded."""

    def __init__(self, repositories, revisions):
        super().__init__(("127.0.0.1", 0), Answer)
        self.repositories, self.revisions = repositories, revisions
        self.downloads = []

    def handle_error(self, request, client_address):
        """A client may close its connection while it is answered."""


class Answer(BaseHTTPRequestHandler):
    """What huggingface_hub asks for: the commit of a revision, its list of files, and a file."""

    server: Hub

    def do_GET(self):
        path = self.path.partition("?")[0].strip("/")
        if path.startswith("api/models/"):
            owner, name, what, revision = path.removeprefix("api/models/").split("/")
        else:
            owner, name, what, revision, file = path.split("/")
        commits = self.server.repositories.get(f"{owner}/{name}")
        if commits is None:
            return self.answer(404, x_error_code="RepoNotFound")
        commit = self.server.revisions.get(revision, revision)
        if commit not in commits:
            return self.answer(404, x_error_code="RevisionNotFound")
        files = commits[commit]
        if what == "resolve":
            self.server.downloads += [file] * (self.command == "GET")
            etag = f'"{sha256(files[file]).hexdigest()}"'
            return self.answer(200, files[file], etag=etag, x_repo_commit=commit)
        siblings = [{"rfilename": file} for file in files]
        tree = [
            {"type": "file", "path": file, "size": len(content), "oid": sha256(content).hexdigest()}
            for file, content in files.items()
        ]
        info = {"id": f"{owner}/{name}", "sha": commit, "siblings": siblings}
        return self.answer(200, json.dumps(tree if what == "tree" else info).encode())

    do_HEAD = do_GET  # noqa: N815

    def answer(self, status, content=b"", **headers):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(hub_at, tiny, tmp_path):
    """A hub with two versions of a probe, of which the first is ``v1`` and the second ``main``."""
    folders = [save_probe(untrained_probe(tiny, name), tmp_path / name) for name in ("old", "new")]
    commits = [
        {path.name: path.read_bytes() for path in folder.iterdir()} | {"notes.txt": b"mine"}
        for folder in folders
    ]

    versions = dict(zip((FIRST, SECOND), commits, strict=True))
    hub = Hub({"me/mine": versions}, {"v1": FIRST, "main": SECOND})
    threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True).start()
    hub_at(f"http://127.0.0.1:{hub.server_port}")
    yield hub
    hub.shutdown()
    hub.server_close()


def test_hub_revision_accepts_tag_branch_or_commit(hub):
    for revision, name in (("v1", "old"), ("main", "new"), (FIRST, "old"), (SECOND, "new")):
        assert load_probe(probe_folder(f"hf:me/mine@{revision}")).name == name
    hub.revisions["main"] = FIRST
    assert load_probe(probe_folder("hf:me/mine@main")).name == "old"


def test_hub_downloads_only_probe_file_and_caches_it(hub, hub_at):
    folder = probe_folder("hf:me/mine@v1")
    assert probe_folder("hf:me/mine@v1") == folder
    assert hub.downloads == [PROBE]
    # The cache has it while the hub cannot be reached.
    hub_at(f"http://127.0.0.1:{free_port()}")
    assert probe_folder("hf:me/mine@v1") == folder


def test_commands_and_load_accept_hub_names(hub, tiny, model, tmp_path, capsys):
    version = load_probe(tmp_path / "old").version
    assert cli("predict", "--model", model, "hf:me/mine@v1", "a text") == 0
    assert json.loads(capsys.readouterr().out)["version"] == version
    assert cli("inspect", "hf:me/mine@v1", "--json") == 0
    assert json.loads(capsys.readouterr().out)["name"] == "old"
    (verdict,) = load("hf:me/mine@v1", model=tiny).predict(["a text"])
    assert verdict.version == version


def test_hub_names_mix_with_folders_and_guards_in_lists(hub, tmp_path):
    listed = os.pathsep.join(("hf:me/mine@v1", str(tmp_path / "new"), "hf:me/mine@main", "guard:a"))
    named = named_sources(listed)
    assert named == ["hf:me/mine@v1", str(tmp_path / "new"), "hf:me/mine@main", "guard:a"]
    assert [load_probe(f).name for f in probe_folders(named[:3])] == ["old", "new", "new"]


def test_recalibrate_requires_out_folder_for_hub_probe(hub, capsys):
    assert cli("recalibrate", "hf:me/mine@v1", "--threshold", "f1") == 2
    error = capsys.readouterr().err.strip()
    assert error.endswith("Name a folder for the recalibrated hf:me/mine@v1 with --out.")


@pytest.mark.parametrize(
    ("named", "says"),
    [
        ("hf:me/mine", r"Cannot read 'hf:me/mine' .*Write hf:OWNER/NAME@REVISION"),
        ("hf:me/mine@", r"Cannot read 'hf:me/mine@'"),
        ("hf:@v1", r"Cannot read 'hf:@v1'"),
        ("hf:not a name@v1", r"'hf:not a name@v1' \(HFValidationError.*hf auth login"),
        ("hf:me/typo@v1", r"'hf:me/typo@v1' \(RepositoryNotFoundError.*hf auth login"),
        ("hf:me/mine@v3", r"'hf:me/mine@v3' \(RevisionNotFoundError.*hf auth login"),
        ("hf:me/empty@v1", r"'hf:me/empty@v1' contains no probe\.safetensors"),
    ],
)
def test_invalid_hub_name_error_is_one_line_with_remedy(hub, named, says, capsys):
    hub.repositories["me/empty"] = {FIRST: {README: b"Nothing yet."}}
    with pytest.raises(SidelightError, match=says):
        probe_folder(named)
    assert cli("predict", named, "a text") == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert len(error.splitlines()) == 1


def test_unreachable_hub_error_suggests_checking_network(hub_at):
    hub_at(f"http://127.0.0.1:{free_port()}")
    with pytest.raises(SidelightError, match="'hf:me/mine@v1'.*" + wordings.CHECK_NETWORK):
        probe_folder("hf:me/mine@v1")


def test_hub_probe_that_gives_no_verdict_is_rejected(hub, tiny, tmp_path, capsys):
    folder = save_probe(broken(untrained_probe(tiny, "broken")), tmp_path / "broken")
    hub.repositories["me/broken"] = {FIRST: {PROBE: (folder / PROBE).read_bytes()}}
    assert cli("inspect", "hf:me/broken@v1") == 2
    assert "it gives no verdict" in capsys.readouterr().err
