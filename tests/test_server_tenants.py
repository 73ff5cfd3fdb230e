"""Of several clients with keys of their own, none can keep the others waiting."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from live import MODEL, http_client, served
from sidelight.engines.queue import Limits
from sidelight.engines.transformers import TransformersEngine
from sidelight.policy.rules import Policy, Rule
from tiny import three_probes, tiny_backbone

CHAT = "/v1/chat/completions"
PATIENCE_S = 60.0
# A policy that blocks what is not judged in time.
BLOCKING = Policy(input={"toxicity": Rule("block", threshold=1.0)}, timeout_s=10.0)


def chat(text, max_tokens=16):
    message = {"role": "user", "content": text}
    return {"model": MODEL, "messages": [message], "max_tokens": max_tokens, "temperature": 0}


def key(number):
    return {"Authorization": f"Bearer key-{number}"}


def paced_engine():
    """An engine whose passes take time by their tokens, whatever else the machine does."""
    backbone = tiny_backbone()

    def wait(_module, _args, kwargs):
        rows, tokens = kwargs["input_ids"].shape
        time.sleep(0.01 + 0.004 * tokens * max(1, rows / 8))

    backbone.model.register_forward_pre_hook(wait, with_kwargs=True)
    return TransformersEngine(backbone, three_probes(backbone), limits=Limits(prefill_tokens=32))


@pytest.mark.slow
def test_long_prompts_of_some_do_not_starve_short_ones_of_others():
    keys = [f"key-{number}" for number in range(22)]
    engine = paced_engine()
    with (
        served(engine, policy=BLOCKING, api_key=keys) as address,
        http_client(address) as http,
        ThreadPoolExecutor(22) as pool,
    ):

        def seconds(number):
            start = time.perf_counter()
            answer = http.post(CHAT, json=chat("hi"), headers=key(number), timeout=PATIENCE_S)
            assert answer.status_code == 200, answer.text
            return time.perf_counter() - start

        def read_on(number):
            answers = []
            while not is_over:
                body = chat("x" * 230, max_tokens=8)
                answers.append(http.post(CHAT, json=body, headers=key(number), timeout=PATIENCE_S))
            return answers

        is_over = False
        alone = min(seconds(2) for _ in range(3))
        long = [pool.submit(read_on, number) for number in range(2)]
        while engine.load.running < 2:
            time.sleep(0.01)
        short = [pool.submit(seconds, number) for number in range(2, 22)]
        slowest = max(one.result() for one in short)
        is_over = True
        assert all(answer.status_code == 200 for one in long for answer in one.result())
    assert slowest < 5 * alone
