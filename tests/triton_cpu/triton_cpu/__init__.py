"""A Triton backend that compiles nothing, so that vLLM's model runner V2 runs without a GPU.

Kernels run in Triton's interpreter (``TRITON_INTERPRET=1``). The tests put this folder on the path.
"""
