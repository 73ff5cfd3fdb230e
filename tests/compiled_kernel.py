"""Compiles the fused kernel for GPUs, without one; prints what each needs and uses, as JSON."""

import itertools
import json

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sidelight.vllm.kernel import _COLUMNS_AT_ONCE, _FEW, _MANY, _project

# Compute capabilities, and the dtype of the states; float32 needs the most memory.
CASES = ((80, "fp32"), (90, "bf16"), (90, "fp32"), (120, "bf16"))


def compiled(gpu: int, dtype: str, tokens_at_once: int, width_at_once: int):
    types = {
        "hidden": f"*{dtype}", "residual": f"*{dtype}", "weight": "*fp32", "shift": "*fp32",
        "flags": "*i8", "slots": "*i64", "out": "*fp32", "tokens": "i32", "out_stride": "i32",
    }  # fmt: skip
    values = {
        "width": 4096, "columns": 50, "epsilon": 1e-6, "tokens_at_once": tokens_at_once,
        "width_at_once": width_at_once, "columns_at_once": _COLUMNS_AT_ONCE[1],
    }  # fmt: skip
    signature = {**types, **dict.fromkeys(values, "constexpr")}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, kind in enumerate(signature.values())
        if kind.startswith("*")
    }
    source = ASTSource(_project, signature=signature, constexprs=values, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", gpu, 32))


if __name__ == "__main__":
    lines = []
    for (gpu, dtype), sizes in itertools.product(CASES, (_FEW, _MANY)):
        kernel = compiled(gpu, dtype, *sizes)
        lines.append(
            {
                "gpu": gpu,
                "shared_kib": kernel.metadata.shared / 1024,
                "uses_tensor_cores": "f32.tf32.tf32" in kernel.asm["ptx"],
            }
        )
    print(json.dumps(lines))
