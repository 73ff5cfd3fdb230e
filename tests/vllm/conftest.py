"""Tests inside a real vLLM; they run in an environment of their own (``make vllm``).

They run on either of its model runners. V2 needs ``VLLM_USE_V2_MODEL_RUNNER=1``, and Triton's
interpreter in place of a GPU: ``TRITON_INTERPRET=1`` and ``tests/triton_cpu`` in ``PYTHONPATH``.
"""

import importlib.util
import os

import pytest

# Must be set before vLLM is imported: little memory for keys and values, and no pinned cores.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items):
    missing = importlib.util.find_spec("vllm") is None
    for item in items:
        if "tests/vllm/" in item.path.as_posix():
            # vLLM's imports warn of much that is not ours.
            item.add_marker(pytest.mark.filterwarnings("ignore"))
            item.add_marker(pytest.mark.timeout(600))
            if missing:
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed here"))


@pytest.fixture(scope="module")
def subjects(tmp_path_factory):
    """What the servers of a test file serve."""
    from stock_requests import Subjects

    return Subjects(tmp_path_factory.mktemp("subjects"))
