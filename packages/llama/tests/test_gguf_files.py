"""GGUF files by name: where they are found, and which options they do not take."""

import asyncio
import json
import re
import shlex
from pathlib import Path

import pytest

import sidelight
import wordings
from sidelight.cli.runtime import Runtime
from sidelight.errors import SidelightError
from sidelight.models.conversation import Message
from sidelight.models.fingerprint import ACCEPTED
from sidelight.models.smollm2 import packaged_gguf
from sidelight.probes.artifact import load_probe
from sidelight.probes.card import read_card
from sidelight.server.config import read_config
from sidelight_llama.backend import LlamaOptions
from sidelight_llama.files import EMBEDDED_GGUF, find_gguf, is_gguf, served_name
from worlds.data import write
from worlds.gguf import CONFIGS, needs_llama, write_gguf
from worlds.models import saved, tiny_backbone
from worlds.servers import cli, in_process

MODEL, ADAPTER, TEMPLATE = (
    f"application/vnd.ollama.image.{kind}" for kind in ("model", "adapter", "template")
)
LIBRARY = "registry.ollama.ai/library"
ROWS = [
    {"text": f"{word} {number}", "label": int(word == "bad")}
    for number in range(20)
    for word in ("good", "bad")
]


@pytest.fixture
def ollama(tmp_path, monkeypatch):
    """Adds a model to a folder of Ollama's, and returns its file of weights."""
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path))
    (tmp_path / "blobs").mkdir()

    def add(place, *kinds):
        layers = [
            {"mediaType": kind, "digest": f"sha256:{place.replace('/', '')}{number}"}
            for number, kind in enumerate(kinds)
        ]
        manifest = tmp_path / "manifests" / place
        manifest.parent.mkdir(parents=True, exist_ok=True)
        manifest.write_text(json.dumps({"schemaVersion": 2, "layers": layers}))
        for layer in layers:
            blob = tmp_path / "blobs" / layer["digest"].replace(":", "-")
            blob.write_text(layer["mediaType"])
        return manifest

    return add


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A tiny GGUF file with the tokenizer in it."""
    tiny = tiny_backbone(CONFIGS["llama"])
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return write_gguf(tiny.model, path, "llama", tiny.tokenizer)


def test_is_gguf_recognises_gguf_file_and_ollama_names():
    assert all(map(is_gguf, ("a/b.gguf", "B.GGUF", "ollama:llama3.2", EMBEDDED_GGUF)))
    assert not any(map(is_gguf, ("smollm2", "folder", "owner/model-GGUF", "gguf")))


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("/models/Llama-3.2-3B-Q4_K_M.gguf", "Llama-3.2-3B-Q4_K_M"),
        (EMBEDDED_GGUF, "smollm2"),
        ("ollama:llama3.2", "llama3.2"),
        ("ollama:hf.co/owner/model:Q4_K_M", "hf.co/owner/model:Q4_K_M"),
        ("smollm2", "smollm2"),
        ("owner/model-1.5", "owner/model-1.5"),
    ],
)
def test_served_name_is_the_file_stem_or_ollama_name(model, name):
    assert served_name(model) == name


def test_server_uses_the_configured_model_name(tmp_path):
    model = saved(tiny_backbone(CONFIGS["llama"]), tmp_path / "model")
    runtime = Runtime(model=model, dtype="auto", device="auto", served_model_name="assistant")
    with in_process(runtime.load_engine([])) as http:
        assert http.get("/v1/models").json()["data"][0]["id"] == "assistant"
        body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
        for name, wanted in ((model, 404), ("assistant", 200)):
            answer = http.post("/v1/chat/completions", json={"model": name, **body})
            assert answer.status_code == wanted
        assert answer.json()["model"] == "assistant"


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (f"{LIBRARY}/llama3.2/latest", "llama3.2"),
        (f"{LIBRARY}/llama3.2/1b", "llama3.2:1b"),
        ("registry.ollama.ai/me/mine/latest", "me/mine"),
        ("hf.co/owner/model/Q4_K_M", "hf.co/owner/model:Q4_K_M"),
    ],
)
def test_ollama_models_are_found_by_their_displayed_name(ollama, place, name):
    ollama(place, TEMPLATE, MODEL)
    assert find_gguf(f"ollama:{name}").read_text() == MODEL


def test_unknown_ollama_model_error_lists_available_models(ollama, tmp_path):
    with pytest.raises(
        SidelightError, match=wordings.NO_OLLAMA_MODEL.format(name="qwen3:latest", folder=tmp_path)
    ):
        find_gguf("ollama:qwen3")
    for place in (f"{LIBRARY}/llama3.2/1b", "hf.co/owner/model/Q8_0"):
        ollama(place, MODEL)
    with pytest.raises(SidelightError, match=r"Known: hf.co/owner/model:Q8_0, llama3.2:1b\. "):
        find_gguf("ollama:llama3.2")


@pytest.mark.parametrize("kinds", [(MODEL, ADAPTER), (MODEL, MODEL), (TEMPLATE,)])
def test_ollama_models_without_exactly_one_weights_file_are_rejected(ollama, kinds):
    ollama(f"{LIBRARY}/mine/latest", *kinds)
    with pytest.raises(SidelightError, match=wordings.OLLAMA_WEIGHTS):
        find_gguf("ollama:mine")


def test_damaged_ollama_folder_is_rejected(ollama, tmp_path):
    manifest = ollama(f"{LIBRARY}/mine/latest", MODEL)
    for path in (tmp_path / "blobs").iterdir():
        path.unlink()
    with pytest.raises(SidelightError, match=wordings.OLLAMA_FILE_MISSING):
        find_gguf("ollama:mine")
    (tmp_path / "secret").write_text("not Ollama's")
    layer = f'{{"layers": [{{"mediaType": "{MODEL}", "digest": %s}}]}}'
    for digest in ("../secret", str(tmp_path / "secret")):
        manifest.write_text(layer % json.dumps(digest))
        with pytest.raises(SidelightError, match=wordings.OLLAMA_FILE_MISSING):
            find_gguf("ollama:mine")
    for content in ("{", "[]", "{}", '{"layers": [{}]}', layer % 5):
        manifest.write_text(content)
        with pytest.raises(SidelightError, match=wordings.OLLAMA_PULL):
            find_gguf("ollama:mine")


def test_embedded_gguf_name_resolves_to_the_packaged_file():
    assert find_gguf(EMBEDDED_GGUF) == packaged_gguf()
    assert Runtime(model=None, dtype="auto", device="auto", engine="llama").model_of([]) == (
        EMBEDDED_GGUF
    )


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        ("--model {file} --dtype float32", "--dtype float32 does not apply to GGUF files"),
        ("--model {file} --device cpu", "--device cpu does not apply to GGUF files"),
        ("--engine llama --dtype float16", "--dtype float16 does not apply to GGUF files"),
        (
            "--model {file} --engine-option a=1",
            "no option 'a'. Known: texts, threads, tokens.",
        ),
        ("--engine llama --engine-option thread=1", "no option 'thread'. Did you mean 'threads'?"),
        (
            "--model {file} --engine-option threads=0",
            "threads=0: Input should be greater",
        ),
        (
            "--engine llama --engine-option threads=513",
            "threads=513: Input should be less",
        ),
        (
            "--model {file} --engine-option threads=2.0",
            "threads=2.0: Input should be a",
        ),
        ("--model {file} --engine-option threads=true", "threads=True: Input should be a"),
        (
            "--model {file} --engine-option threads=all",
            "threads=...: Input should be a",
        ),
        ("--model {file} --engine-option texts=256", "texts=256: Input should be less than 256."),
        ("--model {file} --engine-option texts=2,tokens=9", "Repeat --engine-option for each"),
        (
            "--model {file} --engine-option tokens=-1",
            "tokens=-1: Input should be greater",
        ),
        (
            "--model smollm2 --engine-option threads=1",
            "transformers has no option 'threads'",
        ),
        (
            "--engine transformers --engine-option a=1",
            "has no option 'a'. It has none",
        ),
        ("--model {file} --engine transformers", "runs only in llama, not in transformers"),
        ("--model a/folder --engine llama", "--engine llama runs GGUF files, but 'a/folder' is"),
        (
            "--model smollm2 --tokenizer t",
            "'smollm2' comes with its tokenizer",
        ),
        ("--model absent.gguf", "There is no file 'absent.gguf'"),
    ],
)
def test_commands_reject_incompatible_model_and_engine_options(file, options, refusal, capsys):
    arguments = shlex.split(options.format(file=file))
    for command in (
        ("train", "--data", "x.jsonl", "--out", "x"),
        ("predict", "probe", "a text"),
        ("serve",),
    ):
        assert cli(*command, *arguments) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert refusal in error[-1], error


@pytest.mark.parametrize("command", ["train --data x.jsonl --out x", "serve"])
def test_vllm_rejects_gguf_files(file, command, capsys):
    assert cli(*command.split(), "--model", str(file), "--engine", "vllm") == 2
    assert "runs only in llama, not in vllm" in capsys.readouterr().err


def test_gguf_page_documents_every_llama_option():
    page = (Path(__file__).parents[3] / "docs" / "gguf.md").read_text()
    table = page.partition("| option | default | meaning |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)`", table, re.MULTILINE) == [*LlamaOptions.model_fields]


@pytest.mark.parametrize("option", ["texts=3", "tokens=100"])
def test_single_text_commands_reject_server_size_options(file, option, capsys):
    arguments = ("--model", str(file), "--engine-option", option)
    for command in (
        ("train", "--data", "x.jsonl", "--out", "x"),
        ("predict", "probe", "a text"),
        ("eval", "probe", "--data", "x.jsonl"),
        ("guard", "--out", "x"),
        ("recalibrate", "probe", "--data", "x.jsonl"),
    ):
        assert cli(*command, *arguments) == 2
        name = option.partition("=")[0]
        error = capsys.readouterr().err
        assert f"--engine-option {name} applies only to serve and parity" in error
        assert error.count("\n") == 1


@needs_llama
def test_engine_options_set_concurrent_texts_and_context_length(file):
    def engine(**options):
        options = {"model": str(file), "dtype": "auto", "device": "auto", "engine_option": options}
        return Runtime(**options, engine="auto", serves=True).load_engine([])

    with pytest.raises(SidelightError, match=wordings.CONTEXT_LENGTH.format(asked=257, limit=256)):
        engine(tokens=257)
    # 4 bytes of a value, 2 of them in 2 heads of 8 numbers, and 3 layers; beside the weights.
    size = file.stat().st_size
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sidelight_llama.backbone.free_memory", lambda: 3 * 256 * 384 + size - 1)
        with pytest.raises(
            SidelightError,
            match=wordings.CACHE_DOES_NOT_FIT.format(texts=3, tokens=256)
            + r".*\(--engine-option texts=N --engine-option tokens=N\)",
        ):
            engine()
        with pytest.MonkeyPatch.context() as unloaded:
            # Nothing is taken first.
            unloaded.delattr("sidelight_llama.backbone.LlamaModel")
            with pytest.raises(
                SidelightError,
                match=wordings.CACHE_DOES_NOT_FIT.format(texts=256, tokens=250) + wordings.TAKES_GB,
            ):
                engine(texts=255, tokens=250)
        runtime = Runtime(model=str(file), dtype="auto", device="auto", engine="auto")
        patch.setattr("sidelight_llama.backbone.free_memory", lambda: 0)
        with pytest.raises(SidelightError, match=wordings.CACHE_IN_SEGMENTS.format(tokens=9)):
            runtime.load_backbone().context(sequences=1, positions=9)
        patch.setattr("sidelight_llama.backbone.free_memory", lambda: 2 * 256 * 384 + size)
        assert engine(texts=1).max_tokens == 256
    assert engine(tokens=256).max_tokens == 256
    served = engine(threads=1, texts=3, tokens=100)
    assert served._batch._decoder._context.sequences == 4
    assert served._backbone.threads == 1
    template = asyncio.run(served.tokenize([Message("user", "a")]))
    with in_process(served) as http:
        for letters, wanted in ((99, 200), (100, 400), (200, 400)):
            content = "a" * (letters - len(template) + 1)
            body = {"model": "tiny", "messages": [{"role": "user", "content": content}]}
            answer = http.post("/v1/chat/completions", json={**body, "max_tokens": 4})
            assert answer.status_code == wanted
            if wanted == 400:
                assert answer.json()["error"]["code"] == "context_length_exceeded"
                assert "256 tokens that the model knows" in answer.text
                assert "--engine-option tokens=N" in answer.text


def test_server_config_file_validates_engine_options(file, tmp_path, capsys):
    path = tmp_path / "server.toml"
    path.write_text(f'model = "{file}"\nengine_option = {{ threads = 1, texts = 0 }}\n')
    assert cli("serve", "--config", str(path)) == 2
    assert "--engine-option texts=0: Input should be greater" in capsys.readouterr().err


@needs_llama
@pytest.mark.parametrize("is_gguf", [True, False], ids=["gguf", "transformers"])
def test_missing_chat_template_warns_unless_raw_is_chosen(is_gguf, tmp_path, capsys, caplog):
    tiny = tiny_backbone(CONFIGS["llama"])
    tiny.tokenizer.chat_template = None
    absent = {"tokenizer.chat_template": None}
    model = (
        str(write_gguf(tiny.model, tmp_path / "base.gguf", "llama", tiny.tokenizer, **absent))
        if is_gguf
        else saved(tiny, tmp_path / "base")
    )
    runtime = Runtime(model=model, dtype="auto", device="auto", engine="auto")
    capsys.readouterr()
    assert runtime.load_backbone().encoder.prompt_format == "raw"
    warned = capsys.readouterr().err
    assert warned.startswith("Warning: The model has no chat template, so a chat is read as one")
    assert "name the original with --tokenizer." in warned
    assert warned.count("\n") == 1
    runtime.load_backbone("raw")
    assert not capsys.readouterr().err
    # A server logs it, whatever its probes were trained on.
    runtime.load_engine([])
    assert [f"Warning: {record.message}\n" for record in caplog.records] == [warned]


def test_gguf_files_are_rejected_where_transformers_is_required(file):
    with pytest.raises(
        SidelightError, match=wordings.RUNS_ONLY_IN.format(engine="llama", another="transformers")
    ):
        Runtime(model=str(file), dtype="auto", device="auto")


@pytest.mark.parametrize("name", ["a/b.gguf", "ollama:llama3.2"])
def test_python_api_selects_the_engine_by_model_name(name):
    with pytest.raises(SidelightError, match=wordings.INSTALL_ENGINE.format(engine="llama")):
        sidelight.load_backbone(name)
    with pytest.raises(SidelightError, match=wordings.NO_GGUF):
        sidelight.train(name, ROWS)


def test_server_config_file_sets_engine_model_and_tokenizer(tmp_path):
    path = tmp_path / "server.toml"
    path.write_text('engine = "llama"\nmodel = "ollama:llama3.2"\ntokenizer = "owner/model"\n')
    config = read_config(config=path)
    assert (config.engine, config.model, config.tokenizer) == (
        "llama",
        "ollama:llama3.2",
        "owner/model",
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(write(tmp_path_factory.mktemp("data") / "rows.jsonl", ROWS))


@pytest.fixture(scope="module")
def probe(file, data, tmp_path_factory):
    """The folder of a probe that was trained on the file."""
    out = tmp_path_factory.mktemp("trained") / "probe"
    quickly = ("--set", "epochs=4", "--set", "batch_size=16", "--set", "learning_rate=0.03")
    training = ("train", "--data", data, "--out", str(out), "--background", "none", *quickly)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIDELIGHT_CACHE", str(tmp_path_factory.mktemp("cache")))
        assert cli(*training, "--model", str(file)) == 0
        yield out


@needs_llama
@pytest.mark.slow
def test_gguf_probe_classifies_and_is_served_under_file_name(file, probe, data, capsys):
    card = read_card(probe)
    assert card.backbone.name == str(file)
    assert card.training.engine.startswith("llama.cpp")
    assert cli("eval", str(probe), "--data", data, "--engine-option", "threads=1") == 0
    capsys.readouterr()
    for engine in ("auto", "llama"):
        assert cli("predict", str(probe), "bad 7", "--engine", engine) == 0
        assert json.loads(capsys.readouterr().out)["probe"] == "probe"
    # In Python the probe's model is found by its name, too.
    (verdict,) = sidelight.load(probe).predict(["bad 7"])
    assert verdict.probe == "probe"
    assert cli("predict", str(probe), "bad 7", "--explain") == 0
    assert "explanation" in json.loads(capsys.readouterr().out)
    runtime = Runtime(model=None, dtype="auto", device="auto", engine="auto")
    served = runtime.load_engine([load_probe(probe)])
    with in_process(served) as http:
        (listed,) = http.get("/v1/models").json()["data"]
        assert listed["id"] == "tiny"
        body = {"model": "tiny", "messages": [{"role": "user", "content": "bad 7"}]}
        answer = http.post("/v1/chat/completions", json={**body, "max_tokens": 4})
    assert answer.status_code == 200, answer.text
    # Where the file lies is the operator's.
    assert str(file.parent) not in answer.text + json.dumps(listed)
    assert [each["probe"] for each in answer.json()["sidelight"]["verdicts"]] == ["probe"]


@needs_llama
@pytest.mark.slow
def test_accepted_digest_allows_evaluation_on_a_modified_gguf_copy(
    file, probe, data, tmp_path, monkeypatch, capsys
):
    copy = tiny_backbone(CONFIGS["llama"])
    copy.model.model.layers[1].mlp.down_proj.weight[0, 0] += 1e-3
    copy_path = str(write_gguf(copy.model, tmp_path / "copy.gguf", "llama", copy.tokenizer))
    measured = ("parity", str(probe), "--data", data, "--limit", "8", "--quantised", copy_path)
    assert cli(*measured) == 2
    error = capsys.readouterr().err
    assert f"{ACCEPTED} is not set" in error
    digest = re.search(f"{ACCEPTED}=([0-9a-f]+) accepts", error)[1]
    monkeypatch.setenv(ACCEPTED, digest)
    sizes = ("--engine-option", "texts=3", "--engine-option", "tokens=256")
    assert cli(*measured, *sizes, "--gate", "0.2") == 0
    assert "llama - quantised" in capsys.readouterr().out
    on_copy = ("--data", data, "--model", copy_path)
    assert cli("eval", str(probe), *on_copy) == 0
    assert cli("predict", str(probe), "bad 7", "--model", copy_path) == 0
    # What it writes would be served on the file.
    new = tmp_path / "new"
    assert cli("recalibrate", str(probe), *on_copy, "--out", str(new)) == 2
    assert not new.exists()
    monkeypatch.setenv(ACCEPTED, "0" * 16)
    capsys.readouterr()
    for command in (("eval", str(probe), *on_copy), ("predict", str(probe), "a", *on_copy[2:])):
        assert cli(*command) == 2
        assert f"{ACCEPTED}={digest} accepts" in capsys.readouterr().err.splitlines()[-1]
