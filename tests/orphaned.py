"""Starts a process as vLLM starts its engine, and prints its id; for ``test_vllm_engine.py``."""

import multiprocessing
import time


def wait() -> None:
    # Here, so that only the child pays for the import.
    from sidelight.vllm.internals import end_with_parent

    end_with_parent()
    time.sleep(600)


if __name__ == "__main__":
    child = multiprocessing.get_context("spawn").Process(target=wait)
    child.start()
    print(child.pid, flush=True)
    child.join()
