"""Training on vLLM's hidden states, without a server."""

import json
from contextlib import closing

import numpy as np
import pytest
import torch

import wordings
from sidelight.engines.transformers.backbone import load_backbone, read_model
from sidelight.errors import SidelightError
from sidelight.models.conversation import Reads
from sidelight.probes.artifact import load_probe
from sidelight.progress import progress
from sidelight.states.cache import ActivationCache
from sidelight.states.extraction import extract, streamed
from sidelight_vllm import KEY
from sidelight_vllm.requests import read_report
from sidelight_vllm.settings import STATES
from worlds.data import planted
from worlds.servers import cli
from worlds.vllm import in_this_process, mixed_prompts

OPTIONS = {
    "enforce_eager": True,
    "block_size": 32,
    "max_num_seqs": 8,
    "max_model_len": 1024,
    "num_gpu_blocks_override": 64,
}
STEPS = [
    word
    for name, value in {**OPTIONS, "max_num_batched_tokens": 200}.items()
    for word in ("--engine-option", f"{name}={json.dumps(value)}")
]
# bf16 keeps 8 bits, and the value before it was rounded may lie at the other side of a tie.
ROUNDING_TO_BF16 = {"rtol": 2**-7, "atol": 1e-3}


@pytest.fixture(scope="module")
def backbone(llama_model):
    return load_backbone(llama_model.path, dtype="float32", device="cpu")


@pytest.fixture
def reader(llama_model):
    """Steps of 48 tokens; ``sidelight train`` below has steps of 200."""
    from sidelight_vllm.offline import VllmReader

    options = {**OPTIONS, "max_num_batched_tokens": 48}
    with (
        in_this_process(),
        closing(
            VllmReader(read_model(llama_model.path), dtype="float32", options=options)
        ) as vllm_reader,
    ):
        yield vllm_reader


def test_activation_cache_matches_transformers_and_resumes_after_a_stop(reader, backbone, tmp_path):
    """Prompts of 1 to 300 tokens, several at once, of which some tokens are kept."""
    from sidelight_vllm.offline import capture_params, captured

    prompts = mixed_prompts(backbone, 16, longest=300)

    def cache_of(engine):
        return ActivationCache(
            tmp_path,
            prompts,
            reads=Reads("both", template=False),
            fingerprint=backbone.fingerprint,
            engine=engine,
            shard_bytes=150_000,
        )

    cache = cache_of(reader.engine)
    with (
        progress("Extracting", 1, unit="tokens") as advance,
        closing(reader.states(cache, cache.open(), advance)) as texts,
    ):
        cache.write(next(texts))
    assert len(cache.missing()) == len(prompts) - 1
    (text,) = cache.directory.glob("*.safetensors")
    first = text.stat().st_mtime_ns
    extract(reader, cache)
    assert text.stat().st_mtime_ns == first
    # What was being computed has left nothing.
    assert {path.suffix for path in cache.directory.iterdir()} <= {".safetensors", ""}
    assert not any(path.is_dir() for path in cache.directory.iterdir())
    expected = extract(backbone, cache_of("transformers"))
    assert expected.directory != cache.directory
    for row in range(len(prompts)):
        torch.testing.assert_close(cache.text(row), expected.text(row), **ROUNDING_TO_BF16)
    # A streamed training reads states before anything has made the folder.
    fresh = ActivationCache(
        tmp_path / "fresh",
        prompts,
        reads=Reads("both", template=False),
        fingerprint=backbone.fingerprint,
        engine=reader.engine,
    )
    states = streamed(reader, fresh)
    for row in states.shards[0]:
        torch.testing.assert_close(states.text(row), expected.text(row), **ROUNDING_TO_BF16)
    assert not [*(tmp_path / "fresh").rglob("*.safetensors")]
    # States that were not written are an error.
    gone = tmp_path / "gone" / "0"
    params = capture_params(prompts[0], Reads(), gone)
    ((_, _, output),) = reader.run([(0, prompts[0], params)])
    assert read_report(output.kv_transfer_params).failed == ("states",)
    with pytest.raises(SidelightError, match=wordings.STATES_MISSING):
        captured(gone, backbone.fingerprint.layers)


@pytest.fixture
def data(tmp_path):
    """Texts of many lengths, of which labels are learned."""
    texts, labels = planted("binary", 60, seed=1)
    texts = [text * (1 + i % 20) for i, text in enumerate(texts)]
    texts[-3:] = ["Ann Lee and Bo came to Rome", "400 more, é李 in a lake", "yes"]
    rows = zip(texts, labels.tolist(), strict=True)
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(json.dumps({"text": t, "label": int(label)}) for t, label in rows))
    return path


def test_probe_learns_from_vllm_states(backbone, data, tmp_path):
    probe = tmp_path / "probe"
    train = [
        *("train", "--data", str(data), "--out", str(probe), "--model", backbone.name),
        *("--mechanism", "readout", "--background", "none", "--engine", "vllm", *STEPS),
    ]
    with in_this_process():
        assert cli(*train) == 0
    assert load_probe(probe).card.training.engine.startswith("vllm ")
    # States of other texts would teach it nothing.
    out = tmp_path / "verdicts.jsonl"
    assert cli("predict", str(probe), "--data", str(data), "--out", str(out)) == 0
    verdicts = [json.loads(line) for line in out.read_text().splitlines()]
    labels = [json.loads(line)["label"] for line in data.read_text().splitlines()]
    assert np.mean([verdict["flagged"] for verdict in verdicts] == np.array(labels, bool)) > 0.9


def test_server_configuration_rejects_hidden_state_capture(backbone):
    """Its clients could choose the files."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    config = {KEY: {"probes": [], STATES: True}}
    arguments = AsyncEngineArgs(model=backbone.name, max_model_len=512, additional_config=config)
    with pytest.raises(SidelightError, match=wordings.OFFLINE_ONLY):
        arguments.create_engine_config()


def test_maximum_length_leaves_room_for_the_generated_token(llama_model):
    from sidelight_vllm.offline import VllmReader

    model = read_model(llama_model.path)
    assert VllmReader(model).max_tokens == model.encoder.max_tokens - 1
    assert VllmReader(model, options={"max_model_len": 512}).max_tokens == 511


def test_training_record_contains_no_secret_options(llama_model):
    from sidelight_vllm.offline import VllmReader

    options = {"hf_token": "hf_secret", "max_num_batched_tokens": 48, "tokenizer_mode": "auto"}
    told = VllmReader(read_model(llama_model.path), options=options).engine
    assert "secret" not in told
    assert '"max_num_batched_tokens": 48, "tokenizer_mode": "auto"' in told
