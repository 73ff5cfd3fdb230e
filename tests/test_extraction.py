"""What extraction writes is what a tap sees, also after a kill in the middle."""

import os
import signal
from dataclasses import replace
from itertools import count

import pytest
import torch

from corpora import encoded
from sidelight.backbone import TransformersBackbone
from sidelight.data.loading import load_examples
from sidelight.errors import SidelightError
from sidelight.prompts import Message, Reads, shared_unread
from sidelight.states.cache import ActivationCache
from sidelight.states.extraction import BackboneSource, SharedSource, extract
from sidelight_lab.bench.training import compare_extraction
from tiny import tiny_backbone

TEXTS = ["one", "two words", "a third text that is longer than the others", "four", "five"]
# bf16 keeps 8 bits, and batches of another shape may round to the neighbouring value.
ROUNDING_TO_BF16 = {"rtol": 2**-7, "atol": 1e-4}


def cache_of(backbone, prompts, root, *, reads=None, shard_bytes=10**6, engine="transformers"):
    return ActivationCache(
        root,
        prompts,
        reads=reads or Reads(),
        fingerprint=backbone.fingerprint,
        shard_bytes=shard_bytes,
        engine=engine,
    )


def extracted(backbone, prompts, root, **options):
    return extract(BackboneSource(backbone), cache_of(backbone, prompts, root, **options))


def states_by_row(cache):
    """Each text's states, ``[layer, token, width]``, whichever shard holds them."""
    states = {}
    for index in range(len(cache)):
        shard = cache.read(index)
        assert shard.hidden.dtype == torch.bfloat16
        parts = shard.hidden.split(shard.lengths.tolist(), 1)
        states.update(zip(shard.rows.tolist(), parts, strict=True))
    return states


@pytest.mark.parametrize(
    ("reads", "shard_bytes"),
    [(Reads(), 5_000), (Reads("response"), 10**6), (Reads("both", template=False), 5_000)],
)
def test_shards_hold_what_a_tap_sees_of_each_text(tiny, tmp_path, reads, shard_bytes):
    prompts = [tiny.encoder.encode([Message("user", text)], text[::-1]) for text in TEXTS]
    cache = extracted(tiny, prompts, tmp_path, reads=reads, shard_bytes=shard_bytes)
    assert (len(cache) > 1) == (shard_bytes < 10**6)
    assert not cache.missing()
    states = states_by_row(cache)
    assert sorted(states) == list(range(len(TEXTS)))
    for row, prompt in enumerate(prompts):
        seen = []
        with tiny.tapped(lambda layer, hidden, seen=seen: seen.append(hidden[0])):
            tiny.run([prompt])
        expected = torch.stack(seen)[:, prompt.mask(reads)]
        torch.testing.assert_close(states[row].float(), expected, **ROUNDING_TO_BF16)


def test_what_all_texts_begin_with_runs_once_a_batch(tiny, tmp_path):
    prompts = encoded(tiny, TEXTS)
    shared = shared_unread(prompts, Reads())
    assert shared
    ran = []
    hook = tiny.model.base_model.register_forward_pre_hook(
        lambda _module, _args, given: ran.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    extracted(tiny, prompts, tmp_path)
    hook.remove()
    longest = max(map(len, prompts))
    assert ran == [(1, shared), (len(TEXTS), longest - shared)]


def test_the_same_data_give_the_same_files_and_a_complete_cache_runs_no_forward_pass(
    tiny, tmp_path
):
    prompts = encoded(tiny, TEXTS)
    first, second = (
        extracted(tiny, prompts, tmp_path / name, shard_bytes=5_000) for name in ("a", "b")
    )
    assert first.plan == second.plan
    assert contents(first.directory) == contents(second.directory)
    passes = []
    hook = tiny.model.base_model.register_forward_pre_hook(lambda *_: passes.append(1))
    extract(BackboneSource(tiny), first)
    hook.remove()
    assert not passes


def test_a_budget_that_is_too_small_is_an_error_before_anything_is_run_or_written(
    tiny, tmp_path, ran
):
    cache = cache_of(tiny, encoded(tiny, TEXTS), tmp_path)
    with pytest.raises(SidelightError, match=r"--cache-budget.*--cache.*--limit"):
        extract(BackboneSource(tiny), cache, budget_bytes=1000)
    assert not ran
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "lock"]


@pytest.mark.parametrize(
    ("value", "dtype", "remedy"),
    [(float("inf"), "float16", "--dtype"), (float("nan"), "float32", "weights")],
)
def test_a_state_that_is_not_finite_is_an_error_that_names_its_text(tmp_path, value, dtype, remedy):
    backbone = tiny_backbone()
    prompts = encoded(backbone, [*TEXTS, "Z", "six"])
    (broken,) = set(prompts[5].token_ids) - set(prompts[6].token_ids)
    backbone.model.get_input_embeddings().weight.data[broken, 3] = value
    backbone.fingerprint = replace(backbone.fingerprint, dtype=dtype)
    cache = cache_of(backbone, prompts, tmp_path)
    with pytest.raises(SidelightError, match=rf"Text 6 .* layer 0 .* {dtype}\. .*{remedy}"):
        extract(BackboneSource(backbone), cache)
    assert cache.missing()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def identities(folder):
    """What changes when a file is written again."""
    return {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in folder.glob("*.safetensors")
    }


def forty(backbone, root):
    texts = [f"text number {i} " + "and so on " * (i % 5) for i in range(40)]
    return cache_of(backbone, encoded(backbone, texts), root, shard_bytes=50_000)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_an_extraction_killed_in_the_middle_goes_on_where_it_stopped(tiny, tmp_path):
    cache, passes = forty(tiny, tmp_path / "killed"), count()

    def die(*_):
        if next(passes) == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        try:
            tiny.model.base_model.register_forward_pre_hook(die)
            extract(BackboneSource(tiny), cache)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    before = identities(cache.directory)
    assert 0 < len(before) < len(cache)
    leftover = cache.directory / "shard-00099.partial"
    leftover.write_bytes(b"half a shard")

    extract(BackboneSource(tiny), cache)
    after = identities(cache.directory)
    assert {name: after[name] for name in before} == before
    assert len(after) == len(cache)
    assert not list(cache.directory.glob("*.partial"))
    whole = extract(BackboneSource(tiny), forty(tiny, tmp_path / "whole"))
    assert contents(cache.directory) == contents(whole.directory)
    assert cache.directory.name == whole.directory.name


def test_an_engine_does_not_fill_the_cache_of_another(tiny, tmp_path):
    prompts = encoded(tiny, TEXTS)
    own, other = (
        cache_of(tiny, prompts, tmp_path, engine=engine) for engine in ("transformers", "other")
    )
    assert own.directory != other.directory
    with pytest.raises(SidelightError, match="would fill it"):
        extract(BackboneSource(tiny), other)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def ran(monkeypatch):
    """Every prompt that a backbone runs."""
    prompts = []
    run = TransformersBackbone.run

    def counted(self, batch, **options):
        prompts.extend(batch)
        return run(self, batch, **options)

    monkeypatch.setattr(TransformersBackbone, "run", counted)
    return prompts


def shared_states(source, prompts, root, shard_bytes=10**6):
    cache = cache_of(source.backbone, prompts, root, shard_bytes=shard_bytes)
    states = states_by_row(extract(source, cache))
    cache.remove()
    return states


@pytest.mark.parametrize("shard_bytes", [5_000, 10**6])
def test_a_shared_source_runs_each_text_once_for_all_caches(tiny, tmp_path, ran, shard_bytes):
    source = SharedSource(tiny, tmp_path)
    # Equal texts are one.
    prompts = encoded(tiny, [*TEXTS, TEXTS[0]])
    alone = states_by_row(extracted(tiny, prompts, tmp_path))
    ran.clear()
    for rows in ([0, 1, 2], [3, 1, 5], [4, 3, 2, 1, 0]):
        states = shared_states(source, [prompts[row] for row in rows], tmp_path, shard_bytes)
        for place, row in enumerate(rows):
            torch.testing.assert_close(
                states[place].float(), alone[row].float(), **ROUNDING_TO_BF16
            )
    assert sorted(map(prompts.index, ran)) == [0, 1, 2, 3, 4]


def test_a_shared_source_forgets_what_has_no_room(tiny, tmp_path, ran):
    prompts = encoded(tiny, TEXTS)
    fingerprint = tiny.fingerprint
    room = 2 * fingerprint.layers * fingerprint.width * max(map(len, prompts))
    source = SharedSource(tiny, tmp_path, budget_bytes=room)
    for text, is_known in ((0, False), (0, True), (1, False), (2, False), (0, False)):
        ran.clear()
        shared_states(source, prompts[text : text + 1], tmp_path)
        assert (not ran) == is_known
    # More than all the room: as without sharing.
    assert len(shared_states(source, prompts, tmp_path)) == len(prompts)
    assert source.remembers(prompts[0], Reads())
    assert not source.remembers(prompts[2], Reads())


def test_shared_states_end_with_their_source(tiny, tmp_path):
    source = SharedSource(tiny, tmp_path)
    shared_states(source, encoded(tiny, TEXTS), tmp_path)
    assert list(tmp_path.rglob("*.safetensors"))
    del source
    assert not list(tmp_path.iterdir())


def test_the_benchmark_compares_two_sources(tiny):
    rival = BackboneSource(tiny)
    rival.engine = "other"
    examples = load_examples([(text, i % 2) for i, text in enumerate(TEXTS)])
    figures = compare_extraction(backbone=tiny, examples=examples, repeats=2, rival=rival)
    rates = {f"{name} tokens/s" for name in ("plain", "extract", "other")}
    assert figures.keys() == {"tokens", *rates, "extract / plain", "other / extract"}
    assert figures["tokens"] == sum(map(len, encoded(tiny, TEXTS)))
