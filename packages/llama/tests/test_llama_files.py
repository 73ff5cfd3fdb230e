"""What is no GGUF file that probes can read is refused in one line, and ends no process."""

import json
import os
import resource
import signal
import sys
import tempfile
from contextlib import suppress

import pytest
import transformers
from gguf import GGUFWriter

import wordings
from sidelight.errors import SidelightError
from sidelight.models.conversation import Message
from sidelight.models.fingerprint import hash_of
from sidelight.models.smollm2 import cache_root
from sidelight_llama import library, trial
from sidelight_llama.backbone import LlamaBackbone
from sidelight_llama.library import PINNED
from sidelight_llama.trial import try_once
from worlds.gguf import CONFIGS, needs_llama, write_gguf
from worlds.models import merging_tokenizer, tiny_backbone
from worlds.servers import cli

SIZES = {f"llama__{size}": 3 for size in ("block_count", "context_length", "embedding_length")}


@pytest.fixture(scope="module")
def tiny():
    return tiny_backbone(CONFIGS["llama"])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SIDELIGHT_CACHE", str(tmp_path / "cache"))
    # Otherwise a debugger looks at what has ended.
    monkeypatch.setenv("GGML_NO_BACKTRACE", "1")


def refusal(path, **options):
    with pytest.raises(SidelightError) as refused:
        LlamaBackbone(path, **options)
    message = str(refused.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def header(path, architecture, **entries):
    """A file that has no weights."""
    writer = GGUFWriter(path, architecture)
    for key, value in entries.items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(key.replace("__", "."), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_incomplete_or_corrupt_gguf_files_are_rejected(tiny, tmp_path):
    path = write_gguf(tiny.model, tmp_path / "tiny.gguf", "llama", tiny.tokenizer)
    content = path.read_bytes()
    for size in (0, 3, 20, 400, 20_000, len(content) - 5):
        path.write_bytes(content[:size])
        assert ("not a GGUF file" if size < 4 else "not a complete GGUF file") in refusal(path)
    path.write_bytes(content.replace(b"<|user|>", b"<|us\xffr|>"))
    assert "not a complete GGUF file" in refusal(path)
    assert "not a complete GGUF file" in refusal(header(path, "llama", split__count="two"))
    path.write_bytes(b"PK" + content)
    assert "not a GGUF file" in refusal(path)
    assert "No such file" in refusal(tmp_path / "absent.gguf")


@pytest.mark.parametrize(
    ("architecture", "entries", "why"),
    [
        ("mamba", {}, "keeps a state other than keys and values"),
        ("lfm2", {}, "keeps a state other than keys and values"),
        ("t5", {}, "has an encoder"),
        ("bert", {}, "embeds texts but generates none"),
        ("llada", {}, "generates by diffusion"),
        ("clip", {}, "reads images or sound"),
        ("lama", {}, "unknown architecture 'lama'. Did you mean 'llama'?"),
        ("llama", {"general__type": "adapter"}, "such as a LoRA adapter"),
        ("llama", {"split__count": 3}, "one of several parts"),
        ("llama", {"llama__nextn_predict_layers": 1}, "multi-token prediction"),
        ("llama", {}, "lacks the header fields block_count, context_length, embedding_length"),
        ("llama", {**SIZES, "llama__block_count": "3"}, "lacks the header fields block_count."),
        ("llama", SIZES, "contains a vocabulary but no weights"),
    ],
)
def test_unsupported_models_are_rejected_with_a_reason(tmp_path, architecture, entries, why):
    assert why in refusal(header(tmp_path / "model.gguf", architecture, **entries))


@needs_llama
def test_llama_cpp_crash_does_not_terminate_the_calling_process(tmp_path):
    tiny = tiny_backbone(CONFIGS["qwen2"])
    path = write_gguf(tiny.model, tmp_path / "tiny.gguf", "qwen2", tiny.tokenizer)
    with pytest.raises(SidelightError) as refused:
        # This architecture has what its file does not give.
        try_once(path, "qwen3", "this file")
    message = str(refused.value)
    name = signal.SIGABRT.name
    assert f"terminated by {name} while reading the first tokens of {path}" in message
    assert "GGML_ASSERT(t_layer_inp[il] != nullptr" in message
    assert "\n" not in message
    # Only the result of a file that was read is kept.
    assert try_once(path, "qwen2", "this file")


@needs_llama
@pytest.mark.parametrize(
    ("damage", "why"),
    [
        ("truncated", "is not a complete GGUF file"),
        ("architecture", "'mamba', which keeps a state other than keys and values"),
        ("killed", "llama.cpp was terminated by SIGKILL while reading the first tokens of"),
        ("version", "xllamacpp 2026.1.9000 is installed, but Sidelight needs exactly"),
    ],
)
def test_serving_an_unreadable_file_prints_a_one_line_error(
    tiny, tmp_path, monkeypatch, capsys, damage, why
):
    path = write_gguf(tiny.model, tmp_path / "tiny.gguf", "llama", tiny.tokenizer)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-5])
    elif damage == "architecture":
        header(path, "mamba")
    elif damage == "killed":
        # In place of Python, what is killed at once.
        script = tmp_path / "python"
        script.write_text("#!/bin/sh\nkill -9 $$\n")
        script.chmod(0o700)
        monkeypatch.setattr(sys, "executable", str(script))
    else:
        install(tmp_path, monkeypatch, "2026.1.9000")
    assert cli("serve", "--model", str(path), "--port", "0") == 2
    error = capsys.readouterr().err
    assert error.count("Error: ") == 1
    assert why in error.splitlines()[-1]
    assert "Traceback" not in error


@needs_llama
def test_trial_result_of_a_file_is_cached(tiny, tmp_path, monkeypatch):
    path = write_gguf(tiny.model, tmp_path / "tiny.gguf", "llama", tiny.tokenizer)
    sample = try_once(path, "llama", "this file")
    monkeypatch.setattr(sys, "executable", "/absent")
    assert try_once(path, "llama", "this file") == sample
    with pytest.raises(FileNotFoundError):
        try_once(path, "llama", "another file")
    (cached,) = (cache_root() / "gguf").glob("*.json")
    for damaged in ("", "[]", "{}", "null"):
        cached.write_text(damaged)
        with pytest.raises(FileNotFoundError):
            try_once(path, "llama", "this file")


@needs_llama
def test_trial_runs_no_code_from_the_working_directory(tiny, tmp_path, trap):
    path = write_gguf(tiny.model, tmp_path / "tiny.gguf", "llama", tiny.tokenizer)
    assert try_once(path, "llama", "this file")
    assert not trap.exists()


@needs_llama
def test_weights_larger_than_free_memory_are_rejected_before_the_trial(tmp_path, monkeypatch):
    path = tmp_path / "large.gguf"
    path.write_bytes(b"12")
    monkeypatch.setattr(trial, "free_memory", lambda: 1)
    with pytest.raises(SidelightError, match=wordings.NO_ROOM_FOR_WEIGHTS):
        try_once(path, "llama", "this file")


@needs_llama
@pytest.mark.parametrize(
    "damaged",
    ['{"sample": 3}', '{"sample": []}', '{"sample": ["a"]}', "{}", "[1]", "null", '{"sample": [1'],
)
def test_malformed_cached_trials_are_ignored(tmp_path, monkeypatch, damaged):
    (cache_root() / "gguf").mkdir(parents=True)
    cached = cache_root() / "gguf" / f"{hash_of(PINNED, 'this file')}.json"
    monkeypatch.setattr(sys, "executable", "/absent")
    cached.write_text('{"sample": [1, 2]}')
    assert try_once(tmp_path, "llama", "this file") == [1, 2]
    cached.write_text(damaged)
    with pytest.raises(FileNotFoundError, match="/absent"):
        try_once(tmp_path, "llama", "this file")


@needs_llama
def test_changed_vocabulary_invalidates_the_cached_trial(tiny, tmp_path, monkeypatch):
    path = write_gguf(tiny.model, tmp_path / "tiny.gguf", "llama", tiny.tokenizer)
    LlamaBackbone(path)
    monkeypatch.setattr(sys, "executable", "/absent")
    LlamaBackbone(path)
    path.write_bytes(path.read_bytes().replace(b"gpt-2", b"qwen2"))
    with pytest.raises(FileNotFoundError, match="/absent"):
        LlamaBackbone(path)


def test_code_beside_a_gguf_file_never_runs_even_with_consent(tiny, tmp_path, monkeypatch):
    path = write_gguf(tiny.model, tmp_path / "tiny.gguf", "llama", tiny.tokenizer)
    (tmp_path / "tokenizer_config.json").write_text(
        '{"auto_map": {"AutoTokenizer": ["a.T", "a.T"]}}'
    )
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "a.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda _: "y")
    with suppress(SidelightError):
        LlamaBackbone(path)
    assert not (tmp_path / "ran").exists()


@needs_llama
def test_cached_tokenizer_is_reused_and_rebuilt_when_damaged_or_outdated(
    tiny, tmp_path, monkeypatch
):
    path = write_gguf(tiny.model, tmp_path / "tiny.gguf", "llama", tiny.tokenizer)
    built = LlamaBackbone(path)
    (cached,) = (cache_root() / "gguf").glob("*.tokenizer.json")
    content, written = cached.read_bytes(), cached.stat().st_mtime_ns
    read = LlamaBackbone(path)
    assert cached.stat().st_mtime_ns == written
    assert read.fingerprint == built.fingerprint
    messages = [Message("user", "Hi <|end|> you")]
    assert read.encoder.encode(messages, "Yes") == built.encoder.encode(messages, "Yes")
    for damaged in (content[:-100], content.replace(b"<|user|>", b"<|usar|>")):
        cached.write_bytes(damaged)
        assert LlamaBackbone(path).fingerprint == built.fingerprint
        assert cached.read_bytes() == content
    monkeypatch.setattr(transformers, "__version__", "5.0.0")
    assert LlamaBackbone(path).fingerprint == built.fingerprint
    assert len([*cached.parent.glob("*.tokenizer.json")]) == 2


@needs_llama
def test_cached_tokenizer_cannot_write_files_outside_its_folder(tiny, tmp_path):
    path = write_gguf(tiny.model, tmp_path / "tiny.gguf", "llama", tiny.tokenizer)
    built = LlamaBackbone(path)
    (cached,) = (cache_root() / "gguf").glob("*.tokenizer.json")
    content = cached.read_bytes()
    elsewhere = tmp_path / "elsewhere"
    for name in (str(elsewhere), os.path.relpath(elsewhere, tempfile.gettempdir() + "/folder")):
        entry = json.loads(content)
        entry["files"][name] = "text"
        cached.write_text(json.dumps(entry))
        assert LlamaBackbone(path).fingerprint == built.fingerprint
        assert not elsewhere.exists()
        # It is built again.
        assert cached.read_bytes() == content


@needs_llama
@pytest.mark.parametrize("why", ["Not a directory", "File too large"])
def test_unwritable_cache_warns_without_failing(tiny, tmp_path, monkeypatch, caplog, why):
    path = write_gguf(tiny.model, tmp_path / "tiny.gguf", "llama", tiny.tokenizer)
    built = LlamaBackbone(path)
    assert not caplog.messages
    if why == "Not a directory":
        monkeypatch.setenv("SIDELIGHT_CACHE", str(path / "cache"))
        names = [".tokenizer.json", ".json"]
        again = LlamaBackbone(path)
    else:
        monkeypatch.setenv("SIDELIGHT_CACHE", str(tmp_path / "full"))
        names = [".tokenizer.json"]
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        # A trial has fewer bytes than a tokenizer.
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            again = LlamaBackbone(path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        (cached,) = (tmp_path / "full" / "gguf").iterdir()
        assert not cached.name.endswith(".tokenizer.json")
    assert again.fingerprint == built.fingerprint
    for name, message in zip(names, caplog.messages, strict=True):
        assert message.startswith(f"Cannot keep {cache_root() / 'gguf'}")
        assert f"{name} ({why}" in message
        assert "SIDELIGHT_CACHE" in message


@needs_llama
def test_missing_weights_are_named_in_the_error(tiny, tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(tiny.model, path, "llama", tiny.tokenizer, **{"llama.block_count": 4})
    assert "cannot load" in (message := refusal(path))
    assert "blk.3.attn_norm.weight" in message


@needs_llama
def test_tokenizer_of_another_model_is_rejected(tiny, tmp_path):
    path = write_gguf(tiny.model, tmp_path / "tiny.gguf", "llama", tiny.tokenizer)
    tiny.tokenizer.save_pretrained(tmp_path / "own")
    backbone = LlamaBackbone(path, tokenizer=str(tmp_path / "own"))
    assert backbone.encoder.tokenizer.get_vocab() == tiny.tokenizer.get_vocab()
    merging_tokenizer(None).save_pretrained(tmp_path / "other")
    message = refusal(path, tokenizer=str(tmp_path / "other"))
    assert "does not belong to" in message
    assert "--tokenizer" in message
    with pytest.raises(SidelightError, match=wordings.NO_TOKENIZER.format(folder="absent")):
        LlamaBackbone(path, tokenizer=str(tmp_path / "absent"))


@needs_llama
def test_unreadable_tokenizer_error_suggests_the_tokenizer_option(tiny, tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(tiny.model, path, "llama", tiny.tokenizer, **{"tokenizer.ggml.model": "rwkv"})
    assert "--tokenizer" in refusal(path)


def install(folder, monkeypatch, version):
    """Pretends that this version of the package is installed."""
    metadata = folder / f"xllamacpp-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Name: xllamacpp\nVersion: {version}\n")
    monkeypatch.syspath_prepend(folder)


def test_broken_llama_cpp_install_loads_no_library_from_working_directory(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, PINNED)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    (downloads / "xllamacpp.so").touch()
    monkeypatch.chdir(downloads)
    with pytest.raises(SidelightError, match=wordings.WHEEL_BROKEN):
        library.load_library.__wrapped__()


@pytest.mark.parametrize("installed", ["2026.1.9000", None])
def test_missing_or_different_llama_cpp_version_is_rejected(tmp_path, monkeypatch, installed):
    if installed is None:
        monkeypatch.setattr(sys, "path", [])
    else:
        install(tmp_path, monkeypatch, installed)
    with pytest.raises(SidelightError) as refused:
        library.require_version()
    message = str(refused.value)
    assert library.PINNED in message
    assert (installed or "pip install './packages/llama'") in message


@needs_llama
def test_incompatible_llama_cpp_struct_layout_is_rejected(monkeypatch):
    defaults = library._DEFAULTS["llama_context_default_params"]
    monkeypatch.setitem(defaults, "n_batch", 4096)
    with pytest.raises(
        SidelightError, match=wordings.LAYOUT_DEFAULT.format(got=2048, name="n_batch", wanted=4096)
    ):
        library.load_library.__wrapped__()
    monkeypatch.setitem(defaults, "n_batch", 2048)

    class Longer(library.ContextParams):
        _fields_ = (("more", library.c.c_void_p * 2),)

    signature = (Longer, [])
    monkeypatch.setitem(library._SIGNATURES, "llama_context_default_params", signature)
    if library.platform.machine() == "x86_64":
        with pytest.raises(SidelightError, match=wordings.LAYOUT_SIZE.format(got=168, wanted=184)):
            library.load_library.__wrapped__()
