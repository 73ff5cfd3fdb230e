"""What the batching engine writes is what the model alone would write."""

import asyncio
from dataclasses import dataclass

import pytest
import torch
from transformers import Gemma3TextConfig, GemmaConfig

from sidelight.engines.base import Finished, PromptJudged, Sampling, TextDelta
from sidelight.engines.queue import Limits
from sidelight.engines.transformers import TransformersEngine
from sidelight.errors import ContextLengthError, SidelightError
from sidelight.prompts import Message
from tiny import SIZES, three_probes, tiny_backbone

GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
# Beyond the families that backbones are tested on: windows narrower than the prompts.
MORE_CONFIGS = [GemmaConfig(**GROUPED), Gemma3TextConfig(**GROUPED, sliding_window=8)]
TEXTS = ["hi", "a longer text than the others, so that they are padded", "of middle length"]
GREEDY = Sampling(temperature=0.0, max_tokens=16)


@dataclass(frozen=True)
class Answer:
    judged: PromptJudged
    text: str
    finished: Finished


async def ask(engine, text, sampling=GREEDY, delay_s=0.0):
    await asyncio.sleep(delay_s)
    events = [event async for event in engine.generate([Message("user", text)], sampling)]
    assert isinstance(events[0], PromptJudged)
    assert isinstance(events[-1], Finished)
    assert all(isinstance(event, TextDelta) for event in events[1:-1])
    return Answer(events[0], "".join(event.text for event in events[1:-1]), events[-1])


def run(backbone, work, *, probes=(), limits=None):
    """The outcome of ``work(engine)`` with a started engine."""

    async def main():
        engine = TransformersEngine(backbone, probes, limits=limits)
        await engine.start()
        try:
            return await work(engine)
        finally:
            await engine.close()

    return asyncio.run(main())


def reference(backbone, text):
    ids = torch.tensor([backbone.encoder.encode([Message("user", text)]).token_ids])
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
    written = backbone.model.generate(ids, max_new_tokens=16, **options)[0, ids.shape[1] :]
    # An unfinished character at the end is not sent.
    text = backbone.tokenizer.decode(written, skip_special_tokens=True).rstrip("\ufffd")
    return text, len(written)


@pytest.fixture(scope="module")
def llama():
    return tiny_backbone()


def check_batches(backbone):
    async def ask_all(engine):
        # Together first; then one enters and leaves while another is being written.
        together = await asyncio.gather(*(ask(engine, text) for text in TEXTS))
        staggered = (ask(engine, text, delay_s=i / 100) for i, text in enumerate(TEXTS))
        return [together, await asyncio.gather(*staggered)]

    expected = [reference(backbone, text) for text in TEXTS]
    for answers in run(backbone, ask_all):
        assert [(a.text, a.finished.completion_tokens) for a in answers] == expected


def test_a_batch_writes_what_the_model_alone_writes(family):
    check_batches(family)


@pytest.mark.parametrize("config", MORE_CONFIGS, ids=lambda config: config.model_type)
def test_windows_move_with_the_rows(config):
    check_batches(tiny_backbone(config))


def test_tokens_are_counted(llama):
    answer = run(llama, lambda engine: ask(engine, "hi"))
    assert answer.finished.prompt_tokens == len(llama.encoder.encode([Message("user", "hi")]))
    assert answer.finished.completion_tokens == 16
    assert answer.finished.reason == "length"


def test_a_stop_string_ends_the_text(llama):
    async def ask_both(engine):
        whole = await ask(engine, TEXTS[0])
        stop = whole.text[5:7]
        sampling = Sampling(temperature=0.0, max_tokens=16, stop=("never", stop))
        return whole.text, stop, await ask(engine, TEXTS[0], sampling)

    whole, stop, answer = run(llama, ask_both)
    assert answer.text == whole[: whole.index(stop)]
    assert answer.finished.reason == "stop"
    assert answer.finished.completion_tokens < 16


def test_an_end_of_turn_token_ends_the_text(llama):
    backbone = tiny_backbone()
    first = int(backbone.model.generate(**_inputs(backbone), max_new_tokens=1)[0, -1])
    backbone.model.generation_config.eos_token_id = [first, 2]
    answer = run(backbone, lambda engine: ask(engine, "hi"))
    assert (answer.text, answer.finished.reason) == ("", "stop")
    assert answer.finished.completion_tokens == 1


def _inputs(backbone):
    ids = torch.tensor([backbone.encoder.encode([Message("user", "hi")]).token_ids])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "do_sample": False}


def test_a_seed_gives_the_same_text_beside_any_neighbours(llama):
    seeded = Sampling(temperature=1.0, top_p=0.9, max_tokens=16, seed=3)

    async def ask_twice(engine):
        alone = await ask(engine, TEXTS[0], seeded)
        neighbours = [ask(engine, text, Sampling(max_tokens=9)) for text in TEXTS[1:]]
        beside, *_ = await asyncio.gather(ask(engine, TEXTS[0], seeded), *neighbours)
        other = await ask(engine, TEXTS[0], Sampling(max_tokens=16, seed=4))
        return alone.text, beside.text, other.text

    alone, beside, other = run(llama, ask_twice)
    assert alone == beside
    assert alone != other


def test_text_ends_with_the_context(llama):
    text = "x" * 240
    answer = run(llama, lambda engine: ask(engine, text, Sampling(temperature=0.0)))
    in_all = answer.finished.prompt_tokens + answer.finished.completion_tokens
    assert in_all == llama.encoder.max_tokens
    assert answer.finished.reason == "length"


@pytest.mark.parametrize("length", [253, 400])
def test_a_prompt_without_room_for_an_answer_is_refused(llama, length):
    with pytest.raises(ContextLengthError, match="Shorten it"):
        run(llama, lambda engine: ask(engine, "x" * length))


def test_a_line_longer_than_the_limits_is_worked_off(llama):
    limits = Limits(running=2, prefill_tokens=64, cache_tokens=256)

    async def ask_many(engine):
        return await asyncio.gather(*(ask(engine, text) for text in TEXTS * 4))

    answers = run(llama, ask_many, limits=limits)
    assert [a.text for a in answers] == [reference(llama, text)[0] for text in TEXTS] * 4


def test_a_model_with_another_kind_of_state_is_refused():
    backbone = tiny_backbone()
    backbone.model.config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    with pytest.raises(SidelightError, match="linear_attention"):
        TransformersEngine(backbone, [])


def test_two_probes_of_one_name_are_refused(llama):
    probes = three_probes(llama)
    with pytest.raises(SidelightError, match="distinct names"):
        TransformersEngine(llama, [*probes, probes[0]])
