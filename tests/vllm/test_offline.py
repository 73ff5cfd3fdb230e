"""Training on vLLM's hidden states, and its verdicts on files: both without a server."""

import json
from contextlib import closing

import numpy as np
import pytest
import torch

from commands import run
from corpora import planted
from sidelight.artifact import load_probe
from sidelight.backbone import load_backbone
from sidelight.errors import SidelightError
from sidelight.progress import progress
from sidelight.prompts import Reads
from sidelight.states.cache import ActivationCache
from sidelight.states.extraction import BackboneSource, extract
from sidelight.vllm.settings import CAPTURE, KEY
from vllm_served import mixed_prompts

OPTIONS = {
    "enforce_eager": True,
    "block_size": 32,
    "max_num_seqs": 8,
    "max_model_len": 1024,
    "num_gpu_blocks_override": 64,
}
WORDS = [w for k, v in OPTIONS.items() for w in ("--engine-option", f"{k}={json.dumps(v)}")]
# Float32 products in other orders, over all layers; states of this model are of size one to ten.
ROUNDING = {"rtol": 1e-4, "atol": 1e-4}
# bf16 keeps 8 bits, and the value before it was rounded may lie at the other side of a tie.
ROUNDING_TO_BF16 = {"rtol": 2**-7, "atol": 1e-3}
VERDICTS = 1e-4


@pytest.fixture(scope="module")
def backbone(llama_model):
    return load_backbone(llama_model.path, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def prompts(backbone):
    return mixed_prompts(backbone, 24, longest=600)


@pytest.fixture(scope="module")
def source(backbone):
    """Steps of 48 tokens; ``sidelight train`` below has steps of 200."""
    from sidelight.vllm.offline import VllmSource

    options = {**OPTIONS, "max_num_batched_tokens": 48}
    with closing(VllmSource(backbone, options=options)) as made:
        yield made


def states_of(backbone, prompt, reads) -> torch.Tensor:
    """What a tap sees, ``[layer, token, width]``."""
    seen: list[torch.Tensor] = []
    with backbone.tapped(lambda _layer, hidden: seen.append(hidden[0].clone())):
        backbone.run([prompt])
    return torch.stack(seen)[:, prompt.mask(reads)]


def cache_of(backbone, prompts, root, engine, *, shard_bytes=150_000):
    return ActivationCache(
        root,
        prompts,
        reads=Reads(),
        fingerprint=backbone.fingerprint,
        engine=engine,
        shard_bytes=shard_bytes,
    )


@pytest.mark.parametrize("reads", [Reads(), Reads("both", template=False)], ids=lambda r: r.side)
def test_states_are_those_of_transformers(source, backbone, prompts, reads, tmp_path):
    """Prompts of 1 to 600 tokens, several at once, of which some tokens are kept."""
    from sidelight.vllm.capture import Spool, SpoolShape
    from sidelight.vllm.offline import require_whole, spool_requests

    wanted = [states_of(backbone, prompt, reads) for prompt in prompts]
    who, tokens = backbone.fingerprint, sum(states.shape[1] for states in wanted)
    shape = SpoolShape(who.layers, tokens, who.width, len(prompts), "float32")
    spool = Spool.create(tmp_path, shape)
    requests = spool_requests(spool, prompts, reads, indices=range(len(prompts)))
    assert {request.index for request, _ in source.running().run(requests)} == set(
        range(len(prompts))
    )
    require_whole(spool, prompts)
    torch.testing.assert_close(spool.hidden, torch.cat(wanted, 1), **ROUNDING)


def test_a_cache_is_of_the_usual_format_and_goes_on_after_a_stop(
    source, backbone, prompts, tmp_path
):
    cache = cache_of(backbone, prompts, tmp_path, source.engine)
    with (
        cache.filling() as missing,
        progress("Extracting", 1, unit="tokens") as shown,
        closing(source.shards(cache, missing, shown)) as shards,
    ):
        cache.write(*next(shards))
    done = set(range(len(cache))) - set(cache.missing())
    assert done == {0}
    first = cache.directory / "shard-00000.safetensors"
    before = (first.stat().st_ino, first.stat().st_mtime_ns)
    # The shards that were being computed have left their spools.
    assert list(cache.directory.glob("spool-*.partial"))

    extract(source, cache)
    assert (first.stat().st_ino, first.stat().st_mtime_ns) == before
    assert not cache.missing()
    assert not list(cache.directory.glob("*.partial"))
    other = extract(BackboneSource(backbone), cache_of(backbone, prompts, tmp_path, "transformers"))
    assert other.directory != cache.directory
    assert len(cache) == len(other) > 2
    for mine, theirs in ((cache.read(i), other.read(i)) for i in range(len(cache))):
        assert torch.equal(mine.rows, theirs.rows)
        assert torch.equal(mine.lengths, theirs.lengths)
        torch.testing.assert_close(mine.hidden, theirs.hidden, **ROUNDING_TO_BF16)
    # One engine never fills the cache of another.
    for own, engine in ((source, "transformers"), (BackboneSource(backbone), source.engine)):
        with pytest.raises(SidelightError, match="would fill it"):
            extract(own, cache_of(backbone, prompts, tmp_path / "new", engine))


def test_train_and_predict_through_vllm(backbone, tmp_path):
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
        *("--mechanism", "readout", "--scope", "conversation", "--engine", "vllm", *steps),
    ]
    assert run(*train) == 0
    assert load_probe(probe).record["engine"].startswith("vllm ")
    found = {}
    for engine, options in {"transformers": [], "vllm": ["--engine", "vllm", *steps]}.items():
        out = tmp_path / f"{engine}.jsonl"
        judge = ["predict", str(probe), "--data", str(data), "--out", str(out), *options]
        assert run(*judge) == 0
        found[engine] = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(found["vllm"]) == len(rows)
    assert [v["label"] for v in found["vllm"]] == [v["label"] for v in found["transformers"]]
    mine, theirs = ([[*v["probabilities"].values()] for v in found[e]] for e in found)
    np.testing.assert_allclose(mine, theirs, rtol=0, atol=VERDICTS)
    # Different texts, in their order: the verdicts of any other order would be far off.
    assert np.std(np.array(theirs)[:, 1]) > 0.1


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("EngineArgs", {"enable_prefix_caching": True}, "prefix cache"),
        (
            "EngineArgs",
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "--kv-transfer-config",
        ),
        ("AsyncEngineArgs", {"enable_prefix_caching": False}, "offline only"),
    ],
)
def test_what_would_lose_states_or_serve_them_is_refused(backbone, kind, options, message):
    from vllm.engine import arg_utils

    who = backbone.fingerprint
    config = {KEY: {CAPTURE: {"layers": who.layers, "width": who.width}}}
    path = backbone.name
    arguments = getattr(arg_utils, kind)(
        model=path, additional_config=config, dtype="float32", max_model_len=512, **options
    )
    with pytest.raises(SidelightError, match=message):
        arguments.create_engine_config()


def test_a_text_that_leaves_no_room_is_refused_before_vllm_starts(backbone, llama_model):
    from sidelight.errors import ContextLengthError
    from sidelight.training.classifier import Classifier
    from sidelight.vllm.offline import predict

    probe = llama_model.probes[0]
    with pytest.raises(ContextLengthError, match="at most 511"):
        predict(Classifier(backbone, probe), ["x" * 600], options={"max_model_len": 512})
