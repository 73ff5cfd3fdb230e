"""The transformers engine at work: what to ask it, and what the model alone would answer."""

import asyncio
from dataclasses import dataclass

import torch

from sidelight.engines.base import Finished, PromptJudged, Sampling, TextDelta
from sidelight.engines.transformers import TransformersEngine
from sidelight.prompts import Message

GREEDY = Sampling(temperature=0.0, max_tokens=16)
# Batches of other shapes add in another order: float32 rounding over three layers.
ROUNDING = 1e-5


@dataclass(frozen=True)
class Answer:
    judged: PromptJudged
    text: str
    finished: Finished


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


async def ask(engine, text, sampling=GREEDY, delay_s=0.0):
    """The answer to a text, of which no probe is watched."""
    await asyncio.sleep(delay_s)
    events = await events_of(engine, text, sampling)
    assert isinstance(events[0], PromptJudged)
    assert isinstance(events[-1], Finished)
    assert all(isinstance(event, TextDelta) for event in events[1:-1])
    return Answer(events[0], "".join(event.text for event in events[1:-1]), events[-1])


async def events_of(engine, text, sampling=GREEDY, **options):
    conversation = [Message("user", text)]
    return [event async for event in engine.generate(conversation, sampling, **options)]


async def until_idle(engine):
    async with asyncio.timeout(5):
        while engine.load.running or engine.load.waiting:
            await asyncio.sleep(0.005)


def count_passes(backbone):
    """The shape of the tokens of every forward pass from now on."""
    shapes: list[torch.Size] = []

    def note(_module, _args, kwargs):
        shapes.append(kwargs["input_ids"].shape)

    backbone.model.register_forward_pre_hook(note, with_kwargs=True)
    return shapes


def written_alone(backbone, text, *, max_tokens=GREEDY.max_tokens):
    """The prompt, and the tokens that follow it when the model alone writes."""
    prompt = backbone.encoder.encode([Message("user", text)])
    ids = torch.tensor([prompt.token_ids])
    tokens = backbone.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=max_tokens,
        pad_token_id=0,
    )[0, len(prompt) :]
    return prompt, tokens.tolist()


def reference(backbone, text):
    """The text that the model alone writes, and how many tokens it has."""
    _, written = written_alone(backbone, text)
    # An unfinished character at the end is not sent.
    text = backbone.tokenizer.decode(written, skip_special_tokens=True).rstrip("\ufffd")
    return text, len(written)


def probabilities(verdicts):
    return [p for verdict in verdicts for p in verdict.probabilities.values()]
