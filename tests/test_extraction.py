"""Extraction writes what a tap sees: whole or absent, within the budget, also after a kill."""

import os
import shutil
import signal
from dataclasses import replace
from itertools import count

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import wordings
from sidelight import storage
from sidelight.engines.transformers import backbone as engine
from sidelight.errors import SidelightError
from sidelight.models.conversation import Message, Reads, shared_unread
from sidelight.probes.ragged import by_length, padded_length
from sidelight.states.cache import ActivationCache, Memory, random_shards
from sidelight.states.extraction import extract
from worlds.data import encoded
from worlds.models import family_backbone, tiny_backbone

TEXTS = ["one", "two words", "a third text that is longer than the others", "four", "five"]
# bf16 keeps 8 bits, and batches of another shape may round to the neighbouring value.
ROUNDING_TO_BF16 = {"rtol": 2**-7, "atol": 1e-4}
law = settings(max_examples=25, deadline=None)


def cache_of(backbone, root, prompts=None, **options):
    options = {"reads": Reads(), "fingerprint": backbone.fingerprint, **options}
    return ActivationCache(root, prompts or encoded(backbone, TEXTS), **options)


def extracted(backbone, root, prompts=None, **options):
    return extract(backbone, cache_of(backbone, root, prompts, **options))


def states_by_row(cache):
    """Each text's states, ``[layer, token, width]``, whichever shard holds them."""
    states = {}
    for rows in cache.shards:
        shard = cache.read(rows)
        assert shard.hidden.dtype == torch.bfloat16
        assert shard.rows.tolist() == rows
        assert shard.lengths.tolist() == [cache.lengths[row] for row in rows]
        texts_of_shard = shard.hidden.split(shard.lengths.tolist(), 1)
        states |= dict(zip(rows, texts_of_shard, strict=True))
    return states


@pytest.mark.parametrize(
    ("reads", "shard_bytes"),
    [(Reads(), 5_000), (Reads("response"), 10**6), (Reads("both", template=False), 5_000)],
)
def test_shards_match_tapped_states_of_each_text(tiny, tmp_path, reads, shard_bytes):
    prompts = [tiny.encoder.encode([Message("user", text)], text[::-1]) for text in TEXTS]
    cache = extracted(tiny, tmp_path, prompts, reads=reads, shard_bytes=shard_bytes)
    assert (len(cache.shards) > 1) == (shard_bytes < 10**6)
    assert not cache.missing()
    states = states_by_row(cache)
    assert sorted(states) == list(range(len(TEXTS)))
    for row, prompt in enumerate(prompts):
        seen = []
        with tiny.tapped(lambda layer, hidden, seen=seen: seen.append(hidden[0])):
            tiny.run([prompt])
        expected = torch.stack(seen)[:, prompt.mask(reads)]
        torch.testing.assert_close(states[row].float(), expected, **ROUNDING_TO_BF16)


def test_shared_prefix_runs_once_per_batch(tiny, tmp_path):
    prompts = encoded(tiny, TEXTS)
    shared = shared_unread(prompts, Reads())
    assert shared
    ran = []
    hook = tiny.model.base_model.register_forward_pre_hook(
        lambda _module, _args, inputs: ran.append(tuple(inputs["input_ids"].shape)),
        with_kwargs=True,
    )
    extracted(tiny, tmp_path, prompts)
    hook.remove()
    longest = max(map(len, prompts))
    assert ran == [(1, shared), (len(TEXTS), longest - shared)]


def test_extraction_is_deterministic_and_complete_cache_runs_nothing(tiny, tmp_path, ran):
    first, second = (extracted(tiny, tmp_path / name, shard_bytes=5_000) for name in ("a", "b"))
    assert contents(first.directory) == contents(second.directory)
    ran.clear()
    extract(tiny, first)
    assert not ran


def test_insufficient_disk_space_is_reported_before_extraction(tiny, tmp_path, ran, monkeypatch):
    cache = cache_of(tiny, tmp_path)
    needed = sum(cache.lengths) * tiny.fingerprint.layers * 32 * 2
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=free))
    free = 2**31 + needed - 1
    with pytest.raises(SidelightError, match=wordings.NO_DISK_FOR_STATES):
        extract(tiny, cache)
    assert not ran
    assert not list(tmp_path.rglob("*.safetensors"))
    free += 1
    extract(tiny, cache)


@pytest.mark.parametrize(
    ("value", "dtype", "remedy"),
    [
        (float("inf"), "float16", "a larger range, such as bfloat16"),
        (float("nan"), "float32", "weights"),
    ],
)
def test_non_finite_state_error_names_its_text(tmp_path, value, dtype, remedy):
    backbone = tiny_backbone()
    prompts = encoded(backbone, [*TEXTS, "Z", "six"])
    (broken,) = set(prompts[5].token_ids) - set(prompts[6].token_ids)
    backbone.model.get_input_embeddings().weight.data[broken, 3] = value
    backbone.fingerprint = replace(backbone.fingerprint, dtype=dtype)
    cache = cache_of(backbone, tmp_path, prompts)
    with pytest.raises(
        SidelightError,
        match=wordings.STATES_NOT_FINITE.format(text=6, layer=0, dtype=dtype) + rf"\. .*{remedy}",
    ):
        extract(backbone, cache)
    assert cache.missing()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def identities(folder):
    """What changes when a file is written again."""
    stats = {path.name: path.stat() for path in folder.glob("*.safetensors")}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def several_batches(backbone, root):
    texts = [f"text number {i} " + "and so on " * (4 * (i % 5)) for i in range(120)]
    return cache_of(backbone, root, encoded(backbone, texts))


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_killed_extraction_resumes_where_it_stopped(tiny, tmp_path):
    cache, passes = several_batches(tiny, tmp_path / "killed"), count()

    def die(*_):
        if next(passes) == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        try:
            tiny.model.base_model.register_forward_pre_hook(die)
            extract(tiny, cache)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    before = identities(cache.directory)
    assert 0 < len(before) < len(cache.prompts)

    extract(tiny, cache)
    after = identities(cache.directory)
    assert {name: after[name] for name in before} == before
    assert len(after) == len(cache.prompts)
    complete = extract(tiny, several_batches(tiny, tmp_path / "whole"))
    assert cache.directory.name == complete.directory.name
    wanted = states_by_row(complete)
    for row, states in states_by_row(cache).items():
        torch.testing.assert_close(states, wanted[row], **ROUNDING_TO_BF16)


@pytest.mark.parametrize("shard_bytes", [5_000, 10**6])
def test_caches_sharing_a_folder_run_each_text_once(tiny, tmp_path, ran, shard_bytes):
    # Equal texts are one.
    prompts = encoded(tiny, [*TEXTS, TEXTS[0]])
    separate = states_by_row(extracted(tiny, tmp_path / "alone", prompts))
    ran.clear()
    for rows in ([0, 1, 2], [3, 1, 5], [4, 3, 2, 1, 0]):
        chosen = [prompts[row] for row in rows]
        states = states_by_row(extracted(tiny, tmp_path, chosen, shard_bytes=shard_bytes))
        for place, row in enumerate(rows):
            torch.testing.assert_close(states[place], separate[row], **ROUNDING_TO_BF16)
    assert sorted(map(prompts.index, ran)) == [0, 1, 2, 3, 4]
    assert not cache_of(tiny, tmp_path, prompts).missing()
    assert cache_of(tiny, tmp_path, prompts, reads=Reads("both")).missing()


@law
@given(lengths=st.lists(st.integers(0, 50), max_size=40), room=st.integers(1, 80))
def test_shards_and_batches_cover_texts_once_within_budget(lengths, room):
    shards = random_shards(lengths, tokens=room)
    assert shards == random_shards(lengths, tokens=room)
    assert sorted(row for rows in shards for row in rows) == list(range(len(lengths)))
    for rows in shards:
        assert sum(lengths[row] for row in rows) <= room or len(rows) == 1
    batches = by_length(lengths, batch_tokens=room)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = padded_length(max(lengths[i] for i in batch))
        assert longest * len(batch) <= room or len(batch) == 1


def test_padded_lengths_are_few_and_at_most_an_eighth_longer():
    lengths = range(1, 8193)
    padded = [*map(padded_length, lengths)]
    assert all(n <= longer <= n * 9 / 8 for n, longer in zip(lengths, padded, strict=True))
    assert len({*padded}) < 100


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_bfloat16_passes_on_a_cpu_have_few_shapes_and_the_same_states(
    family, tmp_path, monkeypatch
):
    backbone = family_backbone(family, dtype=torch.bfloat16)
    lengths: list[int] = []
    room = backbone.max_tokens - len(encoded(backbone, ["x"])[0])
    prompts = encoded(backbone, ["x" * count for count in range(1, room + 1, 7)])
    for prompt in prompts:
        with backbone.tapped(lambda layer, hidden: lengths.append(hidden.shape[1])):
            backbone.run([prompt], layers=1)
    wanted = [min(backbone.max_tokens, padded_length(len(prompt))) for prompt in prompts]
    assert lengths == wanted
    assert len({*lengths}) < len(prompts)
    padded = states_by_row(extracted(backbone, tmp_path / "padded", prompts))
    monkeypatch.setattr(engine, "keeps_shapes", lambda *_: False)
    for row, states in states_by_row(extracted(backbone, tmp_path / "exact", prompts)).items():
        torch.testing.assert_close(padded[row], states, rtol=0.05, atol=0.05)


def test_shards_are_random_samples():
    shards = random_shards([10] * 400, tokens=1000)
    assert len(shards) == 4
    for rows in shards:
        assert 120 < sum(rows) / len(rows) < 280


def test_cache_key_depends_on_backbone_engine_reads_and_texts_only(tiny, tmp_path):
    who, prompts = tiny.fingerprint, encoded(tiny, [*TEXTS, "six"])
    options = [
        {},
        {"fingerprint": replace(who, weights="0" * 16)},
        {"fingerprint": replace(who, dtype="bfloat16")},
        {"reads": Reads("both")},
        {"reads": Reads(template=False)},
        {"reads": Reads(scope="last_turn")},
        {"engine": "other"},
        {"prompts": [prompts[5], *prompts[1:5]]},
        {"prompts": [*prompts[:4], prompts[5]]},
        {"prompts": prompts[:4]},
    ]
    caches = [cache_of(tiny, tmp_path, **changed) for changed in options]
    assert len({cache.key for cache in caches}) == len(options)
    # The last two begin with the same text as the first.
    assert len({cache.path(0) for cache in caches}) == len(options) - 2
    for same in ({}, {"fingerprint": replace(who, name="another name")}):
        cache = cache_of(tiny, tmp_path, **same)
        assert (cache.key, cache.path(0)) == (caches[0].key, caches[0].path(0))


def test_cached_text_round_trips_and_partial_file_counts_as_missing(tiny, tmp_path):
    cache = cache_of(tiny, tmp_path)
    cache.directory.mkdir()
    (cache.directory / f"{cache.path(0).name}.1.partial").write_bytes(b"half")
    assert sorted(cache.open()) == list(range(len(TEXTS)))
    texts = {row: torch.randn(4, tokens, 32).bfloat16() for row, tokens in ((1, 2), (0, 3))}
    cache.write(texts)
    for row, hidden in texts.items():
        assert torch.equal(cache.text(row), hidden)
    assert sorted(cache.missing()) == list(range(2, len(TEXTS)))


def test_storing_text_does_not_scan_folder(tiny, tmp_path, monkeypatch):
    """Of 50,000 texts that took 37 ms for each."""
    cache = cache_of(tiny, tmp_path)
    cache.directory.mkdir()
    monkeypatch.setattr(storage, "remove_stale", lambda *_: pytest.fail("The folder was read."))
    cache.write({0: torch.randn(4, 3, 32).bfloat16()})
    assert sorted(cache.missing()) == list(range(1, len(TEXTS)))


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_concurrent_writers_leave_states_intact(tiny, tmp_path):
    cache, written = several_batches(tiny, tmp_path / "both"), []
    child = os.fork()
    if not child:
        try:
            extract(tiny, cache)
            os._exit(bool(cache.missing()))
        finally:
            os._exit(1)
    extract(tiny, cache)
    written.append(states_by_row(cache))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    written.append(states_by_row(several_batches(tiny, tmp_path / "both")))
    assert len([*cache.directory.iterdir()]) == len(cache.prompts)
    wanted = states_by_row(extract(tiny, several_batches(tiny, tmp_path / "alone")))
    for states in written:
        for row, hidden in states.items():
            torch.testing.assert_close(hidden, wanted[row], **ROUNDING_TO_BF16)


def test_unwritable_or_unreadable_states_raise_errors(tiny, tmp_path):
    cache = cache_of(tiny, tmp_path)
    cache.directory.write_text("not a folder")
    with pytest.raises(
        SidelightError,
        match=wordings.CANNOT_WRITE.format(what="/.*safetensors") + ".*SIDELIGHT_CACHE",
    ):
        cache.write({0: torch.zeros(4, 5, 32).bfloat16()})
    cache.directory.unlink()
    cache.open()
    cache.path(0).write_bytes(b"")
    for row in (0, 1):
        with pytest.raises(SidelightError, match=wordings.STATES_UNREADABLE):
            cache.text(row)


def test_selected_texts_are_identical_in_memory_and_on_disk(tiny, tmp_path):
    prompts = encoded(tiny, [f"text {number} " * (number % 3 + 1) for number in range(30)])
    cache = extracted(tiny, tmp_path, prompts, shard_bytes=40_000)
    assert len(cache.shards) > 3
    bounded = cache_of(tiny, tmp_path, prompts, shard_bytes=40_000, memory=Memory(100))
    expected = states_by_row(cache)
    rows = [17, 3, 29, 0, 11]
    small, large = cache.select(rows), bounded.select(rows)
    for subset in (small, large):
        found = states_by_row(subset)
        assert sorted(found) == list(range(len(rows)))
        assert all(torch.equal(found[text], expected[row]) for text, row in enumerate(rows))
