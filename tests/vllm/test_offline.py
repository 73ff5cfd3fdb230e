"""Training on vLLM's hidden states, and its verdicts on files: both without a server."""

import json
from contextlib import closing

import numpy as np
import pytest
import torch

from sidelight.artifact import load_probe
from sidelight.backbone import load_backbone
from sidelight.errors import SidelightError
from sidelight.progress import progress
from sidelight.prompts.conversation import Reads
from sidelight.states.cache import ActivationCache
from sidelight.states.extraction import BackboneSource, extract
from sidelight.vllm.requests import read_report
from sidelight.vllm.settings import KEY, STATES
from worlds.data import planted
from worlds.models import spans_probe
from worlds.servers import cli
from worlds.vllm import mixed_prompts

OPTIONS = {
    "enforce_eager": True,
    "block_size": 32,
    "max_num_seqs": 8,
    "max_model_len": 1024,
    "num_gpu_blocks_override": 64,
}
WORDS = [w for k, v in OPTIONS.items() for w in ("--engine-option", f"{k}={json.dumps(v)}")]
# bf16 keeps 8 bits, and the value before it was rounded may lie at the other side of a tie.
ROUNDING_TO_BF16 = {"rtol": 2**-7, "atol": 1e-3}
VERDICTS = 1e-4


@pytest.fixture(scope="module")
def backbone(llama_model):
    return load_backbone(llama_model.path, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def source(backbone):
    """Steps of 48 tokens; ``sidelight train`` below has steps of 200."""
    from sidelight.vllm.offline import VllmSource

    options = {**OPTIONS, "max_num_batched_tokens": 48}
    with closing(VllmSource(backbone, options=options)) as made:
        yield made


def test_a_cache_has_the_states_of_transformers_and_goes_on_after_a_stop(
    source, backbone, tmp_path
):
    """Prompts of 1 to 600 tokens, several at once, of which some tokens are kept."""
    prompts = mixed_prompts(backbone, 24, longest=600)

    def cache_of(engine):
        return ActivationCache(
            tmp_path,
            prompts,
            reads=Reads("both", template=False),
            fingerprint=backbone.fingerprint,
            engine=engine,
            shard_bytes=150_000,
        )

    cache = cache_of(source.engine)
    with (
        progress("Extracting", 1, unit="tokens") as advance,
        closing(source.states(cache, cache.open(), advance)) as texts,
    ):
        cache.write(next(texts))
    assert len(cache.missing()) == len(prompts) - 1
    (text,) = cache.directory.glob("*.safetensors")
    first = text.stat().st_mtime_ns
    extract(source, cache)
    assert text.stat().st_mtime_ns == first
    # What was being computed has left nothing.
    assert {path.suffix for path in cache.directory.iterdir()} <= {".safetensors", ""}
    assert not any(path.is_dir() for path in cache.directory.iterdir())
    other = extract(BackboneSource(backbone), cache_of("transformers"))
    assert other.directory != cache.directory
    for row in range(len(prompts)):
        torch.testing.assert_close(cache.text(row), other.text(row), **ROUNDING_TO_BF16)


def test_train_and_predict_through_vllm(backbone, tmp_path, capsys):
    model = backbone.name
    texts, labels = planted("binary", 60, seed=1)
    data, probe = tmp_path / "train.jsonl", tmp_path / "probe"
    rows = [
        {"text": text * (1 + i % 20), "label": int(label)}
        for i, (text, label) in enumerate(zip(texts, labels, strict=True))
    ]
    data.write_text("\n".join(map(json.dumps, rows)))
    steps = [*WORDS, "--engine-option", "max_num_batched_tokens=200"]
    train = [
        *("train", "--data", str(data), "--out", str(probe), "--model", model),
        *("--mechanism", "readout", "--background", "none", "--engine", "vllm", *steps),
    ]
    assert cli(*train) == 0
    assert load_probe(probe).record["engine"].startswith("vllm ")
    found = {}
    for engine, options in {"transformers": [], "vllm": ["--engine", "vllm", *steps]}.items():
        out = tmp_path / f"{engine}.jsonl"
        judge = ["predict", str(probe), "--data", str(data), "--out", str(out), *options]
        assert cli(*judge) == 0
        assert "Judging: 100%" in capsys.readouterr().err
        found[engine] = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(found["vllm"]) == len(rows)
    assert [v["label"] for v in found["vllm"]] == [v["label"] for v in found["transformers"]]
    mine, theirs = ([[*v["probabilities"].values()] for v in found[e]] for e in found)
    np.testing.assert_allclose(mine, theirs, rtol=0, atol=VERDICTS)
    # Different texts, in their order: the verdicts of any other order would be far off.
    assert np.std(np.array(theirs)[:, 1]) > 0.1


def test_a_server_writes_no_hidden_states(backbone):
    """Its clients could choose the files."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    config = {KEY: {"probes": [], STATES: True}}
    arguments = AsyncEngineArgs(model=backbone.name, max_model_len=512, additional_config=config)
    with pytest.raises(SidelightError, match="offline only"):
        arguments.create_engine_config()


def test_hidden_states_that_were_not_written_are_an_error(source, backbone, tmp_path):
    from sidelight.vllm.offline import capture_params, captured

    (prompt,) = mixed_prompts(backbone, 1, longest=20)
    params = capture_params(prompt, Reads(), tmp_path / "gone" / "0")
    ((_, _, output),) = source.run([(0, prompt, params)])
    assert read_report(output.kv_transfer_params).failed == ("states",)
    with pytest.raises(SidelightError, match="hidden states are missing"):
        captured(tmp_path / "gone" / "0", backbone.fingerprint.layers)


def test_a_text_that_leaves_no_room_is_refused_before_vllm_starts(backbone, llama_model):
    from sidelight.data.examples import as_example
    from sidelight.errors import ContextLengthError
    from sidelight.vllm.engine import predict

    probe, texts = llama_model.probes[0], [as_example("x" * 600)]
    with pytest.raises(ContextLengthError, match=r"Text 1: .* at most 511"):
        predict(probe, texts, model=backbone.name, options={"max_model_len": 512})


def test_words_of_texts_are_labelled_as_by_transformers(backbone):
    from sidelight.data.examples import as_example
    from sidelight.training.judging import find_spans
    from sidelight.vllm.engine import predict

    probe = spans_probe(backbone, "words", threshold=0.7)
    texts = ["Ann Lee and Bo came to Rome", "400 more, é李 in a lake", "yes"]
    examples = [as_example(text) for text in texts]
    _, expected = find_spans(backbone, probe, examples)
    assert sum(map(len, expected)) > 3
    verdicts = predict(probe, examples, model=backbone.name, options=OPTIONS)
    for verdict, spans in zip(verdicts, expected, strict=True):
        assert verdict.spans == tuple(spans)
        scores = [span.probability for span in verdict.spans]
        np.testing.assert_allclose(scores, [s.probability for s in spans], rtol=0, atol=VERDICTS)
