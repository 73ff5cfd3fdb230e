"""Starts a process as vLLM starts its engine, and says its id: run by ``test_vllm_capture.py``."""

import multiprocessing
import time

from sidelight.vllm.worker import end_with_parent


def wait() -> None:
    end_with_parent()
    time.sleep(600)


if __name__ == "__main__":
    child = multiprocessing.get_context("spawn").Process(target=wait)
    child.start()
    print(child.pid, flush=True)
    child.join()
