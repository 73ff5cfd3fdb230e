"""The laws of ``sidelight.engines.base.Engine``, which the tests of each engine run.

They subclass ``EngineContract`` and give it the fixture ``subject``.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig

import wordings
from sidelight.engines.base import Engine, EngineUnavailableError, PromptClassified
from sidelight.errors import (
    ContextLengthError,
    FingerprintMismatchError,
    SidelightError,
    VerdictError,
)
from sidelight.models.conversation import EncodedPrompt, Message, Reads, TokenRole, has_response
from sidelight.probes.probe import Probe
from worlds.models import SIZES, SPECIAL_TOKENS, broken, tiny_backbone, untrained_probe
from worlds.servers import ask
from worlds.vllm import ROUNDING, Model, expected

TEXTS = [f"{'word ' * (i % 9)}number {i}" for i in range(12)]
CHANGES = 5


def user(text: str) -> list[Message]:
    return [Message("user", text)]


@dataclass(frozen=True)
class Subject:
    """A started engine that serves ``model.probes``, and one that was never started.

    Attributes:
        control_tokens: Names that a user may write.
        template: What stands before a user's text, between it and the answer, and after that.
        letter: One token, however often it is repeated.
        many: More texts than may wait.
        write_single: The greedy answer of the model alone to a text, and its number of tokens;
            None: the engine writes nothing.
    """

    engine: Engine
    model: Model
    runner: asyncio.Runner
    unstarted: Engine
    control_tokens: Sequence[str] = tuple(SPECIAL_TOKENS)
    template: tuple[str, str, str] = ("<|user|>", "<|end|>\n<|assistant|>", "<|end|>\n")
    letter: str = "x"
    many: int = 130
    write_single: Callable[[str], tuple[str, int]] | None = None

    def run(self, work: Any) -> Any:
        return self.runner.run(work)

    def classify(self, conversations) -> list[PromptClassified]:
        return self.run(self.engine.classify(conversations))

    def replace(self, probes: Sequence[Probe]) -> None:
        self.run(self.engine.replace_probes(probes))

    def encode(self, turns) -> EncodedPrompt:
        encode = self.model.backbone.encoder.encode
        return encode(turns[:-1], turns[-1].content) if has_response(turns) else encode(turns)

    def require(self, events, conversations, probes: Sequence[Probe] | None = None) -> None:
        """Checks that these are the verdicts of these probes by one plain pass each."""
        probes = self.model.probes if probes is None else probes
        prompts = [self.encode(turns) for turns in conversations]
        wanted = expected(replace(self.model, probes=probes), prompts)
        for turns, event, row in zip(conversations, events, wanted, strict=True):
            require_verdicts(event.verdicts, row, classifying_probes(probes, turns))


def classifying_probes(probes, turns) -> list[str]:
    """The names of the probes that judge a conversation."""
    return [p.name for p in probes if has_response(turns) or not p.reads.includes_response]


def require_verdicts(found, wanted, names) -> None:
    probabilities = {v.probe: [*v.probabilities.values()] for v in found.verdicts}
    assert {*probabilities} | {*found.failed} == {*names}
    for name in names:
        if np.isnan(wanted[name]).any():
            assert name in found.failed
        else:
            np.testing.assert_allclose(probabilities[name], wanted[name], rtol=0, atol=ROUNDING)


class EngineContract:
    """The laws of every engine; one that writes nothing refuses to."""

    def test_verdicts_match_single_pass_results_in_input_order(self, subject):
        turns = [user(text) for text in TEXTS]
        turns += [[*user(text), Message("assistant", text[::-1])] for text in TEXTS[::4]]
        events = subject.classify(turns)
        subject.require(events, turns)
        assert [event.tokens for event in events] == [len(subject.encode(each)) for each in turns]
        # No two texts have the same.
        assert len({str(event.verdicts.verdicts) for event in events}) == len(turns)
        assert subject.classify(turns[-1:])[0].verdicts.failed == events[-1].verdicts.failed
        subject.require(subject.classify(turns[-1:]), turns[-1:])

    def test_list_may_exceed_the_queue_limit_when_queue_is_empty(self, subject):
        turns = [user(TEXTS[i % 3]) for i in range(subject.many)]
        events = subject.classify(turns)
        wanted = expected(subject.model, [subject.encode(each) for each in turns[:3]])
        names = classifying_probes(subject.model.probes, turns[0])
        for i, event in enumerate(events):
            require_verdicts(event.verdicts, wanted[i % 3], names)
        assert (subject.engine.load.running, subject.engine.load.waiting) == (0, 0)

    def test_probe_without_tokens_to_read_fails_individually(self, subject):
        turns = [*user("hello"), Message("assistant", "")]
        (event,) = subject.classify([turns])
        response_probes = [p.name for p in subject.model.probes if p.reads.side == "response"]
        assert {*response_probes} <= {*event.verdicts.failed}
        assert event.verdicts.verdicts
        subject.require([event], [turns])

    def test_content_never_becomes_a_control_token(self, subject):
        texts = [f"go {name}now" for name in subject.control_tokens]
        turns = [[*user(text), Message("assistant", text)] for text in texts]
        for text, event in zip(texts, subject.classify(turns), strict=True):
            letters, control = (
                expected(subject.model, [by_hand(subject, text, split=split)])[0]
                for split in (True, False)
            )
            names = [probe.name for probe in subject.model.probes]
            require_verdicts(event.verdicts, letters, names)
            assert any(np.abs(letters[n] - control[n]).max() > 10 * ROUNDING for n in names)

    def test_longest_text_is_classified_and_longer_ones_are_rejected(self, subject):
        engine = subject.engine
        room = engine.max_tokens - len(subject.encode(user("")))
        longest = user(subject.letter * room)
        assert len(subject.run(engine.tokenize(longest))) == engine.max_tokens
        (event,) = subject.classify([longest])
        assert event.tokens == engine.max_tokens
        subject.require([event], [longest])
        for work in (engine.classify, engine.tokenize):
            text = user(subject.letter * (room + 1))
            with pytest.raises(ContextLengthError, match=str(engine.max_tokens)):
                subject.run(work(text if work == engine.tokenize else [text]))

    def test_tokenize_returns_the_tokens_that_are_classified(self, subject):
        for turns in (user("hello <|end|>"), [*user("hello"), Message("assistant", "no")]):
            assert subject.run(subject.engine.tokenize(turns)) == subject.encode(turns).token_ids

    def test_replacement_probes_classify_immediately_without_old_state(self, subject):
        replacements = replacement_probes(subject.model)
        turns = [user("the same long text " * 8), [*user("hi"), Message("assistant", "so " * 20)]]
        subject.require(subject.classify(turns), turns)
        for probes in (replacements, replacements[:2], subject.model.probes):
            subject.replace(probes)
            subject.require(subject.classify(turns), turns, probes)
            # All may go, and come back.
            subject.replace([])
            assert all(not event.verdicts.verdicts for event in subject.classify(turns))
            subject.replace(probes)

    def test_each_request_under_load_uses_one_set_of_probes(self, subject):
        engine = subject.engine
        sets = [tuple(subject.model.probes), tuple(replacement_probes(subject.model))]
        answers = []

        async def ask_and_replace():
            async def keep_replacing():
                for turn in range(1, 1 + CHANGES):
                    await engine.replace_probes(sets[turn % 2])
                    before = len(answers)
                    # A large model takes longer for one text than all changes would.
                    while turn % 2 not in {which for which, *_ in answers[before:]}:
                        await asyncio.sleep(0.02)
                await engine.replace_probes(sets[0])

            async def keep_asking(text):
                while not replacing.done():
                    async with engine.serving():
                        which = sets.index(tuple(engine.probes))
                        (event,) = await engine.classify([user(text)])
                    answers.append((which, text, event))

            replacing = asyncio.create_task(keep_replacing())
            await asyncio.gather(replacing, *(keep_asking(text) for text in TEXTS[:4]))

        subject.run(ask_and_replace())
        for i, probes in enumerate(sets):
            of_probes = [(user(text), event) for which, text, event in answers if which == i]
            turns, events = zip(*of_probes[:40], strict=True)
            subject.require(events, turns, probes)

    def test_invalid_probes_are_rejected_without_any_change(self, subject):
        backbone = subject.model.backbone
        foreign = tiny_backbone(LlamaConfig(**{**SIZES, "rope_theta": 5000.0}))
        good = untrained_probe(backbone, "good")
        unsound = broken(untrained_probe(backbone, "broken", reads=Reads("both")))
        for error, probes in (
            (FingerprintMismatchError, [good, untrained_probe(foreign, "foreign")]),
            (VerdictError, [good, unsound]),
            (SidelightError, [good, good]),
        ):
            with pytest.raises(error):
                subject.replace(probes)
            assert tuple(subject.engine.probes) == tuple(subject.model.probes)
        turns = [user(TEXTS[0])]
        subject.require(subject.classify(turns), turns)

    def test_cancelled_requests_leave_no_load_behind(self, subject):
        engine = subject.engine

        async def give_up():
            asking = asyncio.create_task(engine.classify([user(text) for text in TEXTS * 4]))
            while not (engine.load.running or engine.load.waiting):
                await asyncio.sleep(0)
            asking.cancel()
            await asyncio.wait({asking})
            async with asyncio.timeout(60):
                while engine.load.running or engine.load.waiting:
                    await asyncio.sleep(0.005)

        subject.run(give_up())
        subject.require(subject.classify([user("after")]), [user("after")])

    def test_unstarted_engine_rejects_requests(self, subject):
        engine = subject.unstarted
        assert (engine.is_ready, subject.engine.is_ready) == (False, True)
        for work in (
            engine.classify([user("too early")]),
            engine.replace_probes(subject.model.probes),
        ):
            with pytest.raises(EngineUnavailableError):
                subject.run(work)

    def test_concurrent_responses_match_individual_generation(self, subject):
        texts = [f"{'word ' * (5 * i % 17)}number {i}" for i in range(9)]
        if subject.write_single is None:
            with pytest.raises(SidelightError, match=wordings.ONLY_CLASSIFIES):
                subject.run(ask(subject.engine, texts[0]))
            return

        async def all_at_once():
            asking = (ask(subject.engine, text, delay_s=i / 500) for i, text in enumerate(texts))
            return await asyncio.gather(*asking)

        for text, answer in zip(texts, subject.run(all_at_once()), strict=True):
            expected, tokens = subject.write_single(text)
            assert answer.text.rstrip("\ufffd") == expected
            assert answer.finished.completion_tokens == tokens
            # Probes of the response have read what was written.
            assert answer.finished.verdicts.verdicts


def replacement_probes(model: Model) -> list[Probe]:
    """As many columns of a layer, in another order and with other names."""
    return [probe.changed(name=f"{probe.name}-again") for probe in reversed(model.probes)]


def by_hand(subject: Subject, text: str, *, split: bool) -> EncodedPrompt:
    """A user's text, and the same as the response, of a tokenizer that merges no two pieces.

    Args:
        subject: Has the template.
        text: The text.
        split: Whether the text's control tokens are letters.
    """
    ids, token_roles = [], []
    before, between, after = subject.template
    for content, role in (
        (before, TokenRole.UNREAD),
        (text, TokenRole.PROMPT),
        (between, TokenRole.TEMPLATE),
        (text, TokenRole.RESPONSE),
        (after, TokenRole.UNREAD),
    ):
        tokens = subject.model.backbone.encoder.tokenizer(
            content, split_special_tokens=split and content == text
        )
        ids += tokens["input_ids"]
        token_roles += [role] * (len(ids) - len(token_roles))
    return EncodedPrompt(tuple(ids), tuple(token_roles))
