"""vLLM's verdicts are those of ``transformers`` for every architecture that is allowed.

``SIDELIGHT_COMPILED=1`` runs them compiled instead of eager.
"""

import os

import pytest

from worlds.vllm import (
    TESTED,
    WARM_UP,
    architecture_model,
    expected,
    followed,
    llm_of,
    mixed_prompts,
    require_equal,
    run_llm,
    verdicts,
)

PROMPTS = 16
# Long enough that windows of 64 tokens have moved on.
LONGEST = 300
WRITTEN = 100
IS_EAGER = os.environ.get("SIDELIGHT_COMPILED") != "1"


def test_every_allowed_architecture_is_tested():
    from sidelight_vllm.plugin import ARCHITECTURES

    assert {*TESTED} == ARCHITECTURES


@pytest.mark.parametrize("name", TESTED)
def test_verdicts_match_transformers(name, tmp_path):
    architecture = TESTED[name]
    model = architecture_model(architecture, tmp_path)
    prompts = mixed_prompts(model.backbone, PROMPTS, longest=LONGEST)
    wanted = expected(model, prompts)
    options = {"enforce_eager": IS_EAGER, **architecture.options, **WARM_UP}
    with llm_of(model, is_apart=architecture.is_apart, **options) as llm:
        config = llm.llm_engine.vllm_config
        assert config.model_config.architecture == name
        assert (config.compilation_config.mode == 0) == IS_EAGER
        for _ in ("computed", "from the prefix cache"):
            require_equal(verdicts(run_llm(llm, prompts)), wanted)
        begun = [prompt for prompt in prompts if len(prompt) < LONGEST // 2][:6]
        outputs = run_llm(llm, begun, max_tokens=WRITTEN, ignore_eos=True)
    read = [
        followed(prompt, output.outputs[0].token_ids[:-1])
        for prompt, output in zip(begun, outputs, strict=True)
    ]
    require_equal(verdicts(outputs), expected(model, read))
