"""Each form of the columns' product has float32's error, and the choice is explicit.

``tests/vllm/test_kernel.py`` has the form that needs Triton.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

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
from sidelight.standardisation import Projection
from sidelight.vllm.columns import Stage
from sidelight.vllm.products import ENVIRONMENT, PRODUCTS, Addmm, SplitBfloat16

FORMS = {
    "addmm": (Addmm, (torch.float32, torch.bfloat16, torch.float16)),
    "bf16x3": (SplitBfloat16, (torch.bfloat16,)),
}


@pytest.mark.parametrize("has_residual", [True, False])
@pytest.mark.parametrize("has_flags", [True, False])
@pytest.mark.parametrize(("tokens", "columns"), [(1, 5), (33, 1), (130, 130)])
@pytest.mark.parametrize("form", FORMS)
def test_a_product_has_the_error_of_float32(form, tokens, columns, has_flags, has_residual):
    torch.manual_seed(0)
    make, dtypes = FORMS[form]
    flags = mixed_flags(columns) if has_flags else None
    projection = random_projection(577, columns, flags=flags)
    for dtype in dtypes:
        hidden, residual = random_states(tokens, 577, dtype)
        require_float32s_error(
            make(projection),
            projection,
            hidden,
            residual if has_residual else None,
            stream=hidden + residual if has_residual else hidden,
        )


@pytest.mark.parametrize("form", FORMS)
def test_a_state_that_is_no_number_gives_no_column(form):
    torch.manual_seed(0)
    make, dtypes = FORMS[form]
    product = make(random_projection(64, 6, flags=mixed_flags(6)))
    for dtype in dtypes:
        hidden, _ = random_states(9, 64, dtype)
        require_no_number_of_none(product, hidden, columns=6)


@pytest.mark.parametrize("has_flags", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_a_product_reads_no_value(form, has_flags):
    """As a captured CUDA graph asks. Fake tensors have no values: asking for one would raise."""
    make, dtypes = FORMS[form]
    projection = random_projection(64, 6, flags=mixed_flags(6) if has_flags else None)
    hidden, residual = random_states(9, 64, dtypes[-1])
    with FakeTensorMode() as mode:
        fake = mode.from_tensor
        product = make(
            Projection(
                fake(projection.weight),
                fake(projection.shift),
                fake(projection.is_normalised) if has_flags else None,
            )
        )
        product(LAYER, fake(hidden), fake(residual), out=fake(torch.empty(9, 6)))


@pytest.mark.parametrize("has_flags", [True, False])
@pytest.mark.parametrize("columns", [1, 6])
@pytest.mark.parametrize("form", FORMS)
def test_other_weights_are_copied_in_place(form, columns, has_flags):
    """A captured graph holds the addresses of the first ones."""
    torch.manual_seed(0)
    make, dtypes = FORMS[form]
    flags = [mixed_flags(columns), ~mixed_flags(columns)] if has_flags else [None, None]
    first, second = (random_projection(64, columns, flags=own) for own in flags)
    kept = first.weight.clone(), first.shift.clone()
    states = random_states(9, 64, dtypes[-1])
    require_copied_in_place(make(first), second, states, sum(states))
    # They belong to a probe.
    assert all(map(torch.equal, kept, (first.weight, first.shift)))


def test_bf16_parts_are_for_bf16_states():
    product = SplitBfloat16(random_projection(64, 6))
    with pytest.raises(SidelightError, match="this one is in float16"):
        product(LAYER, torch.zeros(9, 64, dtype=torch.float16), None, out=torch.empty(9, 6))


def test_the_environment_chooses_the_product_and_addmm_is_the_default(monkeypatch):
    projection = random_projection(64, 6)
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    assert isinstance(Stage.empty(projection, tokens=9).product, Addmm)
    monkeypatch.setenv(ENVIRONMENT, "bf16x3")
    assert isinstance(Stage.empty(projection, tokens=9).product, SplitBfloat16)
    monkeypatch.setenv(ENVIRONMENT, "sgemm")
    with pytest.raises(SidelightError, match=", ".join(PRODUCTS)):
        Stage.empty(projection, tokens=9)
