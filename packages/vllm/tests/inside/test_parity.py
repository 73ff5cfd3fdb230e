"""vLLM's verdicts are those of ``transformers``, however it schedules the work.

Steps of 48 tokens, 8 requests at a time, on the dense model; of 200 tokens, 16 at a time, on the
hybrid one. ``test_schedules.py`` draws the rest.
"""

import asyncio
from uuid import uuid4

import numpy as np
import pytest

from sidelight.probes.mechanisms.base import mechanism_names
from worlds.vllm import (
    IS_INTERPRETED,
    expected,
    followed,
    mixed_prompts,
    random_prompt,
    require_equal,
    sampling_of,
    verdicts,
)

PROMPTS, LONGEST = (16, 400) if IS_INTERPRETED else (48, 1000)
# Tokens of short answers, and of one over several blocks.
SHORT, LONG = (8, 30) if IS_INTERPRETED else (24, 60)


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in ("llama", "gemma")],
)
def subject(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def prompts(subject):
    return mixed_prompts(subject.model.backbone, PROMPTS, longest=LONGEST)


@pytest.fixture(scope="module")
def wanted(subject, prompts):
    return expected(subject.model, prompts)


def run(subject, prompts, **sampling) -> list:
    """vLLM's outputs for these prompts, which it runs together."""
    from vllm.sampling_params import RequestOutputKind

    async def output_of(prompt):
        params = sampling_of(prompt, output_kind=RequestOutputKind.FINAL_ONLY, **sampling)
        vllm_prompt = {"prompt_token_ids": list(prompt.token_ids)}
        generate = subject.engine._llm.generate(vllm_prompt, params, uuid4().hex)
        return [output async for output in generate][-1]

    async def all_outputs():
        return await asyncio.gather(*map(output_of, prompts))

    return subject.run(all_outputs())


def test_reference_values_vary_enough_to_reveal_differences(subject, wanted):
    """Every mechanism is there, and no probe says the same of all prompts."""
    probes = subject.model.probes
    assert set(mechanism_names()) < {probe.name for probe in probes}
    for probe in probes:
        values = np.array([row[probe.name][0] for row in wanted])
        finite = values[~np.isnan(values)]
        assert len(finite) > PROMPTS / 2
        assert finite.std() > 0.01
        assert ((finite > 0.01) & (finite < 0.99)).mean() > 0.4


def test_computed_and_cached_verdicts_match_transformers_and_repeat_exactly(
    subject, prompts, wanted
):
    first, second = (run(subject, prompts) for _ in range(2))
    # Most of what they read was not computed for them.
    assert max(output.num_cached_tokens or 0 for output in second) >= LONGEST / 2
    require_equal(verdicts(first), wanted)
    require_equal(verdicts(second), wanted)
    prompt = random_prompt(subject.model.backbone, 300, seed=5)
    repeated = [verdicts(run(subject, [prompt]))[0] for _ in range(2)]
    for name, values in repeated[0].items():
        np.testing.assert_array_equal(values, repeated[1][name])


def test_response_probes_classify_generated_tokens_across_turns(subject, prompts):
    """Also in later turns, whose prompt holds tokens that were computed while they were decoded."""
    chosen = [prompt for prompt in prompts if len(prompt) < 300][:8]
    outputs = run(subject, chosen, max_tokens=SHORT, ignore_eos=True)
    read = [followed(p, o.outputs[0].token_ids[:-1]) for p, o in zip(chosen, outputs, strict=True)]
    require_equal(verdicts(outputs), expected(subject.model, read))
    opening = random_prompt(subject.model.backbone, 70, seed=11)
    (output,) = run(subject, [opening], max_tokens=LONG, ignore_eos=True)
    prefix = opening.token_ids + tuple(output.outputs[0].token_ids)
    full = random_prompt(subject.model.backbone, len(prefix) + 20, seed=12, prefix=prefix)
    require_equal(verdicts(run(subject, [full])), expected(subject.model, [full]))
