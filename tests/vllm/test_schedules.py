"""Any schedule of requests gives the verdicts of one pass, in a vLLM whose cache is too small."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from sidelight.prompts import EncodedPrompt, Part
from vllm_served import (
    Model,
    expected,
    llm_of,
    random_prompt,
    reported,
    require_equal,
    sampling_of,
)
from vllm_suite import IS_INTERPRETED, WARM_UP

EXAMPLES = 6 if IS_INTERPRETED else 14
# One of the longest requests fits, where up to six run.
BLOCK, BLOCKS, LONGEST = 32, 8, 192
PREFIXES = 2


@dataclass
class Seen:
    """What happened in all examples, so that the test can say that it tried what it claims."""

    finished: int = 0
    aborted: int = 0
    cached_tokens: int = 0
    written: int = 0


@dataclass(frozen=True)
class RequestContext:
    """A request as Hypothesis draws it."""

    prefix: int
    prefix_length: int
    tail_length: int
    seed: int
    max_tokens: int

    def prompt(self, model: Model) -> EncodedPrompt:
        """Its tokens, some of them those of other requests."""
        shared = random_prompt(model.backbone, 97, seed=self.prefix).token_ids
        return random_prompt(
            model.backbone,
            self.prefix_length + self.tail_length,
            seed=100 + self.seed,
            prefix=shared[: self.prefix_length],
        )


@dataclass
class Followed:
    """A request in the engine, with every report it got and after how many written tokens."""

    prompt: EncodedPrompt
    written: list[int] = field(default_factory=list)
    reports: list[tuple[int, dict[str, np.ndarray]]] = field(default_factory=list)
    is_finished: bool = False


@dataclass(frozen=True)
class Wave:
    """Requests that arrive together, passes after them, and who leaves then (None: nobody)."""

    arrivals: list[RequestContext]
    steps: int
    leaves: int | None


asked = st.builds(
    RequestContext,
    prefix=st.integers(0, PREFIXES - 1),
    prefix_length=st.sampled_from([0, 31, 64, 97]),
    tail_length=st.integers(1, 30),
    seed=st.integers(0, 3),
    max_tokens=st.sampled_from([1, 2, 30, 60]),
)
waves = st.lists(
    st.builds(
        Wave,
        arrivals=st.lists(asked, min_size=1, max_size=6),
        steps=st.integers(0, 40),
        leaves=st.none() | st.integers(0, 7),
    ),
    min_size=1,
    max_size=3,
)


class Driver:
    """One vLLM in this process, stepped by hand."""

    def __init__(self, llm, model: Model):
        self.engine = llm.llm_engine
        self.model = model
        self.seen = Seen()
        self._number = 0

    def run(self, drawn: list[Wave]) -> list[Followed]:
        """Every request of a schedule that was not aborted, to its end."""
        self.engine.reset_prefix_cache()
        following: dict[str, Followed] = {}
        for wave in drawn:
            for one in wave.arrivals:
                self._add(one, following)
            for _ in range(wave.steps):
                self._step(following)
            if wave.leaves is not None:
                self._abort(wave.leaves, following)
        while self.engine.has_unfinished_requests():
            self._step(following)
        return list(following.values())

    def _add(self, one: RequestContext, following):
        prompt = one.prompt(self.model)
        self._number += 1
        name = f"r{self._number}"
        following[name] = Followed(prompt)
        self.engine.add_request(
            name,
            {"prompt_token_ids": list(prompt.token_ids)},
            sampling_of(prompt, max_tokens=one.max_tokens, ignore_eos=True),
        )

    def _abort(self, which, following):
        running = [name for name, one in following.items() if not one.is_finished]
        if running:
            name = running[which % len(running)]
            self.engine.abort_request([name])
            del following[name]
            self.seen.aborted += 1

    def _step(self, following):
        if not self.engine.has_unfinished_requests():
            return
        for output in self.engine.step():
            one = following[output.request_id]
            one.written = list(output.outputs[0].token_ids)
            one.reports.append((len(one.written), reported(output)))
            one.is_finished = output.finished
            if output.finished:
                self.seen.finished += 1
                self.seen.cached_tokens += output.num_cached_tokens or 0
                self.seen.written += len(one.written)


@pytest.fixture(scope="module", params=[True, False], ids=["asynchronous", "synchronous"])
def driver(request, llama_model):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        with llm_of(
            llama_model,
            block_size=BLOCK,
            num_gpu_blocks_override=BLOCKS,
            max_model_len=LONGEST,
            max_num_seqs=6,
            max_num_batched_tokens=48,
            async_scheduling=request.param,
            **WARM_UP,
        ) as llm:
            yield Driver(llm, llama_model)


def test_any_schedule_gives_the_verdicts_of_one_pass(driver, llama_model):
    """Arrivals, chunks, shared prefixes, aborts and preemptions as Hypothesis draws them."""

    @given(drawn=waves, chosen=st.integers(0, 100))
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def check(drawn, chosen):
        followed = driver.run(drawn)
        # The last report of each request, and one while it was written.
        for which in (-1, chosen):
            compare(llama_model, followed, which)

    check()
    seen, preempted = driver.seen, preemptions(driver)
    assert seen.finished > EXAMPLES
    assert seen.aborted > EXAMPLES / 4
    assert seen.cached_tokens > 10 * BLOCK
    assert preempted > 5


def compare(model, followed, which):
    read, reports = [], []
    for one in followed:
        assert one.is_finished
        written, verdicts = one.reports[which % len(one.reports) if which >= 0 else which]
        # The newest token has been drawn but not read.
        tokens = tuple(one.written[: written - 1])
        parts = one.prompt.parts + (Part.RESPONSE,) * len(tokens)
        read.append(EncodedPrompt(one.prompt.token_ids + tokens, parts))
        reports.append(verdicts)
    if read:
        require_equal(reports, expected(model, read))


def preemptions(driver) -> int:
    metrics = {metric.name: metric for metric in driver.engine.get_metrics()}
    return int(metrics["vllm:num_preemptions"].value)
