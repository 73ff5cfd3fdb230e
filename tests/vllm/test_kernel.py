"""The fused kernel in Triton's interpreter, which the conftest turns on, against float64."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from products import (
    LAYER,
    mixed_flags,
    random_projection,
    random_states,
    require_copied_in_place,
    require_float32s_error,
    require_no_number_of_none,
)
from sidelight.errors import SidelightError
from sidelight.vllm.columns import Stage
from sidelight.vllm.kernel import FusedProduct
from sidelight.vllm.products import ENVIRONMENT
from vllm_served import expected, llm_of, mixed_prompts, reported, require_equal, run, tiny_model

# Of the smallest GPUs with tensor cores for TF32 (compute capability 8.6), and of Hopper's.
SHARED_KIB = {80: 99, 90: 227, 120: 99}


def interpreted_sum(hidden, residual):
    """As the kernel's on a GPU, except that the interpreter casts to bf16 by cutting off."""
    if hidden.dtype != torch.bfloat16:
        return hidden + residual
    exact = hidden.float() + residual.float()
    return (exact.view(torch.int32) & -0x10000).view(torch.float32).bfloat16()


@given(
    tokens=st.integers(1, 300),
    columns=st.integers(1, 130),
    width=st.integers(1, 333),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    has_flags=st.booleans(),
    has_residual=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40, deadline=None)
def test_the_kernel_has_the_error_of_float32(
    tokens, columns, width, dtype, has_flags, has_residual, seed
):
    torch.manual_seed(seed)
    flags = mixed_flags(columns) if has_flags else None
    projection = random_projection(width, columns, flags=flags)
    hidden, residual = random_states(tokens, width, dtype)
    require_float32s_error(
        FusedProduct(projection),
        projection,
        hidden,
        residual if has_residual else None,
        stream=interpreted_sum(hidden, residual) if has_residual else hidden,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_state_that_is_no_number_gives_no_column(dtype):
    torch.manual_seed(0)
    hidden, _ = random_states(9, 70, dtype)
    product = FusedProduct(random_projection(70, 6, flags=mixed_flags(6)))
    require_no_number_of_none(product, hidden, columns=6)


@pytest.mark.parametrize("has_flags", [True, False])
def test_other_weights_are_copied_in_place(has_flags):
    torch.manual_seed(0)
    flags = [mixed_flags(6), ~mixed_flags(6)] if has_flags else [None, None]
    first, second = (random_projection(70, 6, flags=own) for own in flags)
    states = random_states(9, 70, torch.bfloat16)
    require_copied_in_place(FusedProduct(first), second, states, interpreted_sum(*states))


def test_with_slots_each_token_goes_to_its_own_and_padding_nowhere():
    torch.manual_seed(0)
    product = FusedProduct(random_projection(70, 6, flags=mixed_flags(6)))
    hidden, residual = random_states(40, 70, torch.float32)
    rows = torch.empty(40, 6)
    product(LAYER, hidden, residual, out=rows)
    slots = torch.randperm(64)[:40]
    slots[37:] = -1
    # The columns of a slot: two other layers beside this one.
    pages = torch.full((64, 3, 6), torch.nan)
    product(LAYER, hidden, residual, out=pages[:, LAYER], slots=slots)
    assert torch.equal(pages[slots[:37], LAYER], rows[:37])
    written = torch.zeros(64, 3, dtype=torch.bool)
    written[slots[:37], LAYER] = True
    assert pages[~written].isnan().all()


def test_the_environment_chooses_the_kernel_which_needs_a_gpu(monkeypatch):
    projection = random_projection(64, 6)
    monkeypatch.setenv(ENVIRONMENT, "triton")
    assert isinstance(Stage.empty(projection, tokens=9).product, FusedProduct)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(SidelightError, match="needs a GPU"):
        Stage.empty(projection, tokens=9)


def test_the_kernel_compiles_for_gpus_and_fits_their_shared_memory(tmp_path):
    tests = Path(__file__).parents[1]
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(tests), *filter(None, sys.path)]),
    }
    done = subprocess.run(
        [sys.executable, tests / "compiled_kernel.py"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for kernel in json.loads(done.stdout):
        assert kernel["shared_kib"] <= SHARED_KIB[kernel["gpu"]], kernel
        assert kernel["uses_tensor_cores"], kernel


def test_verdicts_inside_vllm_are_those_of_transformers(tmp_path, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, "triton")
    model = tiny_model(tmp_path)
    prompts = mixed_prompts(model.backbone, 12, longest=200)
    with llm_of(model) as llm:
        outputs = run(llm, prompts)
    require_equal([reported(output) for output in outputs], expected(model, prompts))
