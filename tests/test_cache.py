"""A cache's shards are a fixed function of the data, whole or absent, and within the budget."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Event

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corpora import encoded
from sidelight.errors import SidelightError
from sidelight.prompts import Reads
from sidelight.ragged import by_length
from sidelight.states.cache import ActivationCache, Shard, ShardPlan, states_of
from sidelight.states.extraction import BackboneSource, extract
from sidelight.storage import FolderLock

TEXTS = ["one", "two words", "a third text that is longer", "four"]
law = settings(max_examples=25, deadline=None)


def cache_of(backbone, root, texts=TEXTS, *, reads=None, fingerprint=None, shard_bytes=10_000):
    return ActivationCache(
        root,
        encoded(backbone, texts),
        reads=reads or Reads(),
        fingerprint=fingerprint or backbone.fingerprint,
        shard_bytes=shard_bytes,
    )


@law
@given(lengths=st.lists(st.integers(0, 50), max_size=40), room=st.integers(1, 80))
def test_a_plan_has_every_text_once_in_shards_that_fit(lengths, room):
    plan = ShardPlan.of(lengths, shard_tokens=room)
    assert plan == ShardPlan.of(lengths, shard_tokens=room)
    assert sorted(row for rows in plan.rows for row in rows) == list(range(len(lengths)))
    for rows, tokens in zip(plan.rows, plan.tokens, strict=True):
        assert tokens == sum(lengths[row] for row in rows)
        assert tokens <= room or len(rows) == 1


def test_shards_are_random_samples_not_runs_of_the_file():
    plan = ShardPlan.of([10] * 400, shard_tokens=1000)
    assert len(plan.rows) == 4
    for rows in plan.rows:
        assert 120 < sum(rows) / len(rows) < 280


@law
@given(lengths=st.lists(st.integers(1, 60), max_size=40), room=st.integers(1, 200))
def test_batches_have_every_prompt_once_and_fit_padding_included(lengths, room):
    batches = by_length(lengths, batch_tokens=room)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert max(lengths[i] for i in batch) * len(batch) <= room or len(batch) == 1


def test_the_key_changes_with_backbone_reads_texts_and_size_of_shards_only(tiny, tmp_path):
    who, options = (
        tiny.fingerprint,
        [
            {},
            {"fingerprint": replace(tiny.fingerprint, weights="0" * 16)},
            {"fingerprint": replace(tiny.fingerprint, dtype="bfloat16")},
            {"reads": Reads("both")},
            {"reads": Reads(template=False)},
            {"texts": [*TEXTS[:3], "five"]},
            {"texts": TEXTS[::-1]},
            {"texts": TEXTS[:3]},
            {"shard_bytes": 50_000},
        ],
    )
    folders = [cache_of(tiny, tmp_path, **changed).directory for changed in options]
    assert len({*folders}) == len(options)
    for same in ({}, {"fingerprint": replace(who, name="another name")}):
        assert cache_of(tiny, tmp_path, **same).directory == folders[0]


def test_a_disk_that_is_too_small_is_an_error(tiny, tmp_path, monkeypatch):
    import shutil

    full = shutil.disk_usage(tmp_path)._replace(free=2**31 + 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: full)
    with pytest.raises(SidelightError, match="may be used"), cache_of(tiny, tmp_path).filling():
        pass


def test_what_is_already_there_is_within_the_budget(tiny, tmp_path):
    cache = cache_of(tiny, tmp_path)
    with cache.filling(budget_bytes=sum(cache.plan.tokens) * tiny.fingerprint.layers * 32 * 2):
        pass


def test_a_shard_is_read_as_it_was_written_and_half_of_one_is_missing(tiny, tmp_path):
    cache = cache_of(tiny, tmp_path)
    cache.directory.mkdir()
    half = cache.directory / "shard-00000.partial"
    half.write_bytes(b"half")
    hidden = torch.randn(4, 5, 32).bfloat16()
    with cache.filling() as missing:
        assert missing == list(range(len(cache)))
        assert not half.exists()
        cache.write(0, Shard(hidden, torch.tensor([2, 3]), torch.tensor([1, 0])))
    shard = cache.read(0)
    assert torch.equal(shard.hidden, hidden)
    assert shard.lengths.tolist() == [2, 3]
    assert shard.rows.tolist() == [1, 0]
    assert 0 not in cache.missing()


def test_remove_deletes_a_cache_that_no_other_run_reads_or_keeps(tiny, tmp_path):
    first, second = (extract(BackboneSource(tiny), cache_of(tiny, tmp_path)) for _ in range(2))
    other = extract(BackboneSource(tiny), cache_of(tiny, tmp_path, ["other"]))
    first.remove()
    assert not second.missing()
    assert second.read(0).hidden.isfinite().all()
    second.remove()
    assert not first.directory.exists()
    assert other.directory.exists()
    first.remove()
    extract(BackboneSource(tiny), cache_of(tiny, tmp_path)).keep()
    later = extract(BackboneSource(tiny), cache_of(tiny, tmp_path))
    later.remove()
    assert not later.missing()


@pytest.fixture
def waits(monkeypatch):
    """Set when a run begins to wait for another one."""
    event, take = Event(), FolderLock.take

    def noticed(lock, *, alone):
        is_held = take(lock, alone=alone)
        if not is_held:
            event.set()
        return is_held

    monkeypatch.setattr(FolderLock, "take", noticed)
    return event


def test_a_run_waits_for_the_one_that_writes_the_same_states(tiny, tmp_path, waits, capsys):
    first, second = cache_of(tiny, tmp_path), cache_of(tiny, tmp_path)
    with ThreadPoolExecutor(1) as other_run:
        with first.filling() as missing:
            half = first.directory / "shard-00000.1.partial"
            half.write_bytes(b"being written")
            waiting = other_run.submit(extract, BackboneSource(tiny), second)
            assert waits.wait(30)
            assert half.exists()
            half.unlink()
            for index in missing:
                hidden = torch.full((4, first.plan.tokens[index], 32), 7.0).bfloat16()
                rows = torch.tensor(first.plan.rows[index])
                first.write(index, Shard(hidden, torch.tensor(first.lengths)[rows], rows))
        waiting.result(timeout=60)
    assert "waiting for it" in capsys.readouterr().err
    # What the first wrote, not the backbone's.
    assert (second.read(0).hidden == 7).all()


def test_a_run_that_fails_while_it_writes_lets_the_next_one_in(tiny, tmp_path):
    failed = cache_of(tiny, tmp_path)
    with pytest.raises(SidelightError, match="midway"), failed.filling():
        raise SidelightError("midway")
    assert not extract(BackboneSource(tiny), cache_of(tiny, tmp_path)).missing()


def test_a_cache_removed_while_a_run_waits_is_made_again(tiny, tmp_path, waits):
    first, second = cache_of(tiny, tmp_path), cache_of(tiny, tmp_path)
    with ThreadPoolExecutor(1) as other_run:
        with first.filling():
            waiting = other_run.submit(extract, BackboneSource(tiny), second)
            assert waits.wait(30)
            shutil.rmtree(first.directory)
        waiting.result(timeout=60)
    assert not second.missing()


def test_a_shard_that_the_disk_does_not_take_is_an_error_with_a_remedy(tiny, tmp_path):
    cache = cache_of(tiny, tmp_path)
    shard = Shard(torch.zeros(4, 5, 32).bfloat16(), torch.tensor([5]), torch.tensor([0]))
    with pytest.raises(SidelightError, match=r"Cannot write .*shard-00000.*--cache"):
        cache.write(0, shard)


def by_text(states):
    """Each text's hidden states and where the plan says it is, whatever the shards."""
    found = {}
    for index in range(len(states)):
        shard = states.read(index)
        assert tuple(shard.rows.tolist()) == states.plan.rows[index]
        assert shard.hidden.shape[1] == states.plan.tokens[index]
        parts = shard.hidden.split(shard.lengths.tolist(), 1)
        found |= dict(zip(shard.rows.tolist(), parts, strict=True))
    return found


def test_some_texts_are_the_same_in_memory_and_from_disk(tiny, tmp_path):
    texts = [f"text {number} " * (number % 3 + 1) for number in range(30)]
    cache = extract(BackboneSource(tiny), cache_of(tiny, tmp_path, texts, shard_bytes=40_000))
    assert len(cache) > 3
    bounded = cache_of(tiny, tmp_path, texts, shard_bytes=40_000)
    bounded.memory_bytes = 100
    whole = by_text(cache)
    rows = [17, 3, 29, 0, 11]
    small, large = states_of(cache, rows), states_of(bounded, rows)
    assert (len(small), len(large) > 1) == (1, True)
    for states in (small, large):
        found = by_text(states)
        assert sorted(found) == list(range(len(rows)))
        assert all(torch.equal(found[text], whole[row]) for text, row in enumerate(rows))
