"""Ends vLLM's engine when the process that started it is killed.

Left to itself it would wait for requests for ever, with the model in memory.
"""

import os
from multiprocessing import parent_process
from threading import Thread


def end_with_parent() -> None:
    """Watches the process that started this one; without one, as in a test, nothing happens."""
    parent = parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        # Its workers end with it: vLLM sees to that.
        os._exit(1)

    Thread(target=watch, daemon=True, name="sidelight-end-with-parent").start()
