"""Any schedule of requests gives the verdicts of one pass, in a vLLM whose cache is too small."""

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from sidelight.models.conversation import EncodedPrompt, TokenRole
from worlds.vllm import (
    IS_INTERPRETED,
    WARM_UP,
    Model,
    expected,
    llm_of,
    random_prompt,
    reported,
    require_equal,
    sampling_of,
)

EXAMPLES = 6 if IS_INTERPRETED else 14
# One of the longest requests fits, where up to six run.
BLOCK, BLOCKS, LONGEST = 32, 8, 192


class Asked(NamedTuple):
    """A request as Hypothesis draws it; some of its tokens are those of other requests."""

    prefix: int
    prefix_length: int
    tail_length: int
    seed: int
    max_tokens: int

    def prompt(self, model: Model) -> EncodedPrompt:
        shared = random_prompt(model.backbone, 97, seed=self.prefix).token_ids
        length, prefix = self.prefix_length + self.tail_length, shared[: self.prefix_length]
        return random_prompt(model.backbone, length, seed=100 + self.seed, prefix=prefix)


@dataclass
class Followed:
    """A request in the engine, with every report it got and after how many written tokens."""

    prompt: EncodedPrompt
    written: list[int] = field(default_factory=list)
    reports: list[tuple[int, dict[str, np.ndarray]]] = field(default_factory=list)
    is_finished: bool = False


asked = st.builds(
    Asked,
    st.integers(0, 1),
    st.sampled_from([0, 31, 64, 97]),
    st.integers(1, 30),
    st.integers(0, 3),
    st.sampled_from([1, 2, 30, 60]),
)
# Requests that arrive together, passes after them, and who leaves then (None: no request).
waves = st.lists(
    st.tuples(
        st.lists(asked, min_size=1, max_size=6), st.integers(0, 40), st.none() | st.integers(0, 7)
    ),
    min_size=1,
    max_size=3,
)


class Driver:
    """One vLLM in this process, stepped by hand. ``seen`` proves that it tried what it claims."""

    def __init__(self, llm, model: Model):
        self.engine = llm.llm_engine
        self.model = model
        self.seen = Counter()

    def run(self, drawn) -> list[Followed]:
        """Every request of a schedule that was not aborted, to its end."""
        self.engine.reset_prefix_cache()
        following: dict[str, Followed] = {}
        for arrivals, steps, leaves in drawn:
            for one in arrivals:
                self._add(one, following)
            for _ in range(steps):
                self._step(following)
            running = [name for name, one in following.items() if not one.is_finished]
            if leaves is not None and running:
                name = running[leaves % len(running)]
                self.engine.abort_request([name])
                del following[name]
                self.seen["aborted"] += 1
        while self.engine.has_unfinished_requests():
            self._step(following)
        return list(following.values())

    def _add(self, one: Asked, following):
        prompt = one.prompt(self.model)
        self.seen["added"] += 1
        name = f"r{self.seen['added']}"
        following[name] = Followed(prompt)
        sampling = sampling_of(prompt, max_tokens=one.max_tokens, ignore_eos=True)
        self.engine.add_request(name, {"prompt_token_ids": list(prompt.token_ids)}, sampling)

    def _step(self, following):
        if not self.engine.has_unfinished_requests():
            return
        for output in self.engine.step():
            one = following[output.request_id]
            one.written = list(output.outputs[0].token_ids)
            one.reports.append((len(one.written), reported(output)))
            one.is_finished = output.finished
            if output.finished:
                self.seen["finished"] += 1
                self.seen["cached tokens"] += output.num_cached_tokens or 0


@pytest.fixture
def driver(llama_model):
    options = {
        "block_size": BLOCK,
        "num_gpu_blocks_override": BLOCKS,
        "max_model_len": LONGEST,
        "max_num_seqs": 6,
        "max_num_batched_tokens": 48,
    }
    with llm_of(llama_model, is_apart=False, **options, **WARM_UP) as llm:
        yield Driver(llm, llama_model)


def test_any_request_schedule_gives_single_pass_verdicts(driver, llama_model):
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
    metrics = {metric.name: metric for metric in driver.engine.get_metrics()}
    seen = driver.seen
    assert seen["finished"] > EXAMPLES, seen
    assert seen["aborted"] > EXAMPLES / 4, seen
    assert seen["cached tokens"] > EXAMPLES * BLOCK / 2, seen
    assert metrics["vllm:num_preemptions"].value >= EXAMPLES / 4, seen


def compare(model, followed, which):
    read, reports = [], []
    for one in followed:
        assert one.is_finished
        written, verdicts = one.reports[which % len(one.reports) if which >= 0 else which]
        # The newest token has been drawn but not read.
        tokens = tuple(one.written[: written - 1])
        token_roles = one.prompt.token_roles + (TokenRole.RESPONSE,) * len(tokens)
        read.append(EncodedPrompt(one.prompt.token_ids + tokens, token_roles))
        reports.append(verdicts)
    if read:
        require_equal(reports, expected(model, read))
