"""Laws of capturing hidden states that hold without vLLM: its scheduler and passes are played."""

import json
import os
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch

import orphaned
from commands import run, saved
from sidelight.artifact import save_probe
from sidelight.backbone import load_backbone
from sidelight.errors import SidelightError
from sidelight.prompts import EncodedPrompt, Part, Reads
from sidelight.vllm.capture import Captures, Recorder, Spool, SpoolPlace, SpoolShape, capture_params
from sidelight.vllm.columns import Step
from tiny import untrained_probe

BLOCK = 4
LAYERS, WIDTH = 3, 5
LENGTHS = (1, 9, 14)
# In no order, and not neighbours.
BLOCKS = ([7], [2, 11, 0], [9, 3, 8, 1])


def prompt_of(length: int, seed: int) -> EncodedPrompt:
    random = np.random.default_rng(seed)
    parts = [Part(int(p)) for p in random.integers(0, 4, length)]
    parts[-1] = Part.PROMPT
    return EncodedPrompt(tuple(range(length)), tuple(parts))


PROMPTS = [prompt_of(length, seed) for seed, length in enumerate(LENGTHS)]


class Played:
    """Requests that are run in chunks, several in a pass."""

    def __init__(self, folder, reads=None, layers=(range(LAYERS),)):
        self.reads = reads or Reads()
        counts = [int(prompt.mask(self.reads).sum()) for prompt in PROMPTS]
        shape = SpoolShape(LAYERS, sum(counts), WIDTH, len(PROMPTS), "float32")
        self.spool = Spool.create(folder, shape)
        self.captures = Captures(block_size=BLOCK)
        self.recorders = [
            Recorder(own, tokens=26, width=WIDTH, dtype=torch.float32, device=torch.device("cpu"))
            for own in layers
        ]
        self.layers = layers
        self.hidden = [torch.randn(LAYERS, len(p), WIDTH) for p in PROMPTS]
        starts = np.cumsum([0, *counts[:-1]])
        for i, prompt in enumerate(PROMPTS):
            place = SpoolPlace(str(self.spool.path), shape, i, int(starts[i]))
            # As it travels.
            params = json.loads(json.dumps(capture_params(prompt, self.reads, place)))
            self.captures.enter(str(i), params, len(prompt))

    def step(self, chunks, *, untapped=()):
        """A pass over some tokens of some requests: ``(request, start, stop)``."""
        pieces = self.captures.plan(
            Step(str(i), stop, start == 0, BLOCKS[i]) for i, start, stop in chunks
        )
        slots = [
            BLOCKS[i][token // BLOCK] * BLOCK + token % BLOCK
            for i, start, stop in chunks
            for token in range(start, stop)
        ]
        for own, recorder in zip(self.layers, self.recorders, strict=True):
            for local, layer in enumerate(own):
                if layer not in untapped:
                    states = [self.hidden[i][layer, start:stop] for i, start, stop in chunks]
                    recorder.receive(local, torch.cat(states))
            recorder.keep(torch.tensor([*slots, -1, -1]))
            recorder.save(pieces)

    @property
    def is_whole(self) -> bool:
        return self.spool.is_whole(torch.tensor(LENGTHS))

    def require_equal(self) -> None:
        kept = [h[:, p.mask(self.reads)] for h, p in zip(self.hidden, PROMPTS, strict=True)]
        assert self.is_whole
        torch.testing.assert_close(self.spool.hidden, torch.cat(kept, 1), rtol=0, atol=0)


@pytest.mark.parametrize("reads", [Reads(), Reads("both"), Reads("prompt", template=False)])
@pytest.mark.parametrize("chunk", [1, 5, 14])
def test_what_is_kept_are_the_states_of_the_read_tokens(tmp_path, reads, chunk):
    played = Played(tmp_path, reads)
    edges = [*range(0, max(LENGTHS), chunk), max(LENGTHS)]
    for start, stop in pairwise(edges):
        assert not played.is_whole
        ends = [(i, start, min(stop, n)) for i, n in enumerate(LENGTHS) if start < n]
        # The longest first, as no order is promised.
        played.step(ends[::-1])
    played.require_equal()


def test_a_preempted_text_is_run_again_and_pipeline_stages_fill_one_spool(tmp_path):
    played = Played(tmp_path, layers=(range(0, 1), range(1, LAYERS)))
    played.step([(0, 0, 1), (1, 0, 9)])
    played.step([(2, 0, 6)])
    played.spool.hidden.zero_()
    played.step([(0, 0, 1), (1, 0, 9)])
    played.step([(2, 0, 10)])
    played.step([(2, 10, 14)])
    played.require_equal()
    # What is written after the prompt is not kept.
    assert played.captures.plan([Step("2", 15, False, BLOCKS[2])]) == []


def test_a_layer_that_is_not_tapped_is_noticed(tmp_path):
    played = Played(tmp_path)
    played.step([(0, 0, 1), (1, 0, 9)])
    played.step([(2, 0, 14)], untapped={1})
    assert not played.is_whole


def test_tokens_that_the_pass_did_not_run_are_an_error(tmp_path):
    """As if the first block had come from a prefix cache."""
    played = Played(tmp_path)
    (piece,) = played.captures.plan([Step("1", 9, True, BLOCKS[1])])
    with pytest.raises(SidelightError, match="prefix"):
        played.recorders[0].save([piece])


def test_a_spool_that_was_given_up_stops_nobody(tmp_path):
    """Requests that were cancelled may be in a pass that has begun."""
    played = Played(tmp_path)
    played.spool.remove()
    played.step([(0, 0, 1), (1, 0, 9)])
    assert not played.spool.passed.any()


def test_a_request_that_names_no_place_is_run_and_not_kept(tmp_path):
    captures = Captures(block_size=BLOCK)
    captures.enter("warm", None, 8)
    assert captures.plan([Step("warm", 8, True, [0, 1])]) == []


def test_a_spool_is_found_by_its_path_and_shape(tmp_path):
    shape = SpoolShape(LAYERS, 6, WIDTH, 2)
    spool = Spool.create(tmp_path, shape)
    spool.hidden.fill_(3)
    again = Spool.find(spool.path, shape)
    assert again is not None
    assert again.hidden.dtype == torch.bfloat16
    assert (again.hidden == 3).all()
    assert not again.passed.any()
    assert Spool.find(spool.path, SpoolShape(LAYERS, 7, WIDTH, 2)) is None
    spool.remove()
    assert Spool.find(spool.path, shape) is None
    assert (spool.hidden == 3).all()


def test_a_full_disk_is_told_before_a_token_is_run(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(SidelightError, match="No space left"):
        Spool.create(tmp_path, SpoolShape(LAYERS, 6, WIDTH, 2))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_engine_whose_parent_is_killed_ends():
    starter = subprocess.Popen(
        [sys.executable, orphaned.__file__],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert starter.stdout is not None
    with starter.stdout as told:
        engine = int(told.readline())
        os.kill(engine, 0)
        starter.kill()
        # It holds the other end: nothing more is read until it has ended.
        assert told.read() == ""
    starter.wait()


@pytest.mark.slow
def test_without_vllm_the_remedy_is_one_line(tiny, tmp_path, capsys):
    model = saved(tiny, tmp_path / "model")
    probe = save_probe(untrained_probe(load_backbone(model), "p"), tmp_path / "p")
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"text": f"t {i}", "label": i % 2}) for i in range(20)))
    for words in (["train", "--out", str(tmp_path / "out")], ["predict", str(probe)]):
        assert run(*words, "--data", str(data), "--model", model, "--engine", "vllm") == 2
        assert "docs/vllm.md" in capsys.readouterr().err
