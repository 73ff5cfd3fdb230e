"""vLLM's verdicts are those of ``transformers`` for every architecture that is allowed.

``SIDELIGHT_COMPILED=1`` runs them compiled instead of eager, and the lanes ``families-...`` of
``.ci/vllm_lanes.py`` on other versions and runners.
"""

import os

import pytest
from architectures import TESTED, architecture_model
from packaging.version import Version

from sidelight.prompts import EncodedPrompt, Part
from sidelight.vllm.patches import ARCHITECTURES
from vllm_served import expected, llm_of, mixed_prompts, reported, require_equal, run

PROMPTS = 16
# Long enough that windows of 64 tokens have moved on.
LONGEST = 300
WRITTEN = 100
IS_EAGER = os.environ.get("SIDELIGHT_COMPILED") != "1"
# Triton's interpreter has nothing to warm up, and does not take all kernels of vLLM's warm-up.
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
WARM_UP = {"kernel_config": {"enable_jit_warmup": False}} if IS_INTERPRETED else {}
# What vLLM 0.29 itself cannot run here.
NOT_ON_0_29 = {
    "GptOssForCausalLM": "its attention with sinks takes bfloat16 alone on a CPU",
    "Mistral3ForConditionalGeneration": "it imports what transformers 5 no longer has",
}


def test_what_is_allowed_is_tested():
    assert {*TESTED} == ARCHITECTURES


@pytest.mark.parametrize("name", TESTED)
def test_verdicts_are_those_of_transformers(name, tmp_path, monkeypatch):
    from vllm.distributed import cleanup_dist_env_and_memory

    from vllm import __version__

    if Version(__version__) < Version("0.30") and name in NOT_ON_0_29:
        pytest.skip(f"vLLM {__version__}: {NOT_ON_0_29[name]}")
    # In this process if possible, since importing vLLM in another takes longer than the test.
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", str(int(TESTED[name].is_apart)))
    model = architecture_model(TESTED[name], tmp_path)
    prompts = mixed_prompts(model.backbone, PROMPTS, longest=LONGEST)
    wanted = expected(model, prompts)
    with llm_of(model, enforce_eager=IS_EAGER, **TESTED[name].options, **WARM_UP) as llm:
        config = llm.llm_engine.vllm_config
        assert config.model_config.architecture == name
        assert (config.compilation_config.mode == 0) == IS_EAGER
        for _ in ("computed", "from the prefix cache"):
            require_equal([reported(output) for output in run(llm, prompts)], wanted)
        begun = [prompt for prompt in prompts if len(prompt) < LONGEST // 2][:6]
        outputs = run(llm, begun, max_tokens=WRITTEN, ignore_eos=True)
    cleanup_dist_env_and_memory()
    read = [
        EncodedPrompt(
            prompt.token_ids + tuple(output.outputs[0].token_ids[:-1]),
            prompt.parts + (Part.RESPONSE,) * (WRITTEN - 1),
        )
        for prompt, output in zip(begun, outputs, strict=True)
    ]
    require_equal([reported(output) for output in outputs], expected(model, read))
