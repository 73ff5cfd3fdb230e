"""Laws of capturing hidden states that hold without vLLM: its scheduler and passes are played."""

import json
import os
import subprocess
import sys

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
STAGES = (range(1), range(1, LAYERS))


def prompt_of(length: int, seed: int) -> EncodedPrompt:
    random = np.random.default_rng(seed)
    parts = [Part(int(p)) for p in random.integers(0, 4, length)]
    parts[-1] = Part.PROMPT
    return EncodedPrompt(tuple(range(length)), tuple(parts))


PROMPTS = [prompt_of(length, seed) for seed, length in enumerate(LENGTHS)]


class Played:
    """Requests that are run in chunks, several in a pass, by the stages of a pipeline."""

    def __init__(self, folder, reads):
        counts = [int(prompt.mask(reads).sum()) for prompt in PROMPTS]
        shape = SpoolShape(LAYERS, sum(counts), WIDTH, len(PROMPTS), "float32")
        self.spool = Spool.create(folder, shape)
        self.captures = Captures(block_size=BLOCK)
        self.recorders = [
            Recorder(own, tokens=26, width=WIDTH, dtype=torch.float32, device=torch.device("cpu"))
            for own in STAGES
        ]
        self.hidden = [torch.randn(LAYERS, len(p), WIDTH) for p in PROMPTS]
        for i, start in enumerate(np.cumsum([0, *counts[:-1]])):
            place = SpoolPlace(str(self.spool.path), shape, i, int(start))
            # As it travels.
            params = json.loads(json.dumps(capture_params(PROMPTS[i], reads, place)))
            self.captures.enter(str(i), params, len(PROMPTS[i]))

    def step(self, start, stop, *, untapped=()):
        """A pass over some tokens of each request, the longest first, as no order is promised."""
        chunks = [(i, start, min(stop, n)) for i, n in enumerate(LENGTHS) if start < n][::-1]
        pieces = self.captures.plan(
            Step(str(i), stop, start == 0, BLOCKS[i]) for i, start, stop in chunks
        )
        slots = [
            BLOCKS[i][token // BLOCK] * BLOCK + token % BLOCK
            for i, start, stop in chunks
            for token in range(start, stop)
        ]
        for own, recorder in zip(STAGES, self.recorders, strict=True):
            for local, layer in enumerate(own):
                if layer not in untapped:
                    states = [self.hidden[i][layer, start:stop] for i, start, stop in chunks]
                    recorder.receive(local, torch.cat(states))
            recorder.keep(torch.tensor([*slots, -1, -1]))
            recorder.save(pieces)

    @property
    def is_whole(self) -> bool:
        return self.spool.is_whole(torch.tensor(LENGTHS))


@pytest.mark.parametrize("reads", [Reads("both"), Reads("prompt", template=False)])
@pytest.mark.parametrize("chunk", [1, 5, 14])
def test_what_is_kept_are_the_states_of_the_read_tokens(tmp_path, reads, chunk):
    played = Played(tmp_path, reads)
    # Some of it is run, preempted, and run again.
    played.step(0, 6)
    played.spool.hidden.zero_()
    for start in range(0, max(LENGTHS), chunk):
        assert not played.is_whole
        played.step(start, start + chunk)
    kept = [h[:, p.mask(reads)] for h, p in zip(played.hidden, PROMPTS, strict=True)]
    assert played.is_whole
    torch.testing.assert_close(played.spool.hidden, torch.cat(kept, 1), rtol=0, atol=0)


def test_what_was_not_tapped_is_noticed_and_what_was_not_run_is_an_error(tmp_path):
    played = Played(tmp_path, Reads())
    # As if the first block had come from a prefix cache.
    (piece,) = played.captures.plan([Step("1", 9, True, BLOCKS[1])])
    with pytest.raises(SidelightError, match="prefix"):
        played.recorders[0].save([piece])
    played.step(0, 9)
    played.step(9, 14, untapped={1})
    assert not played.is_whole


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
