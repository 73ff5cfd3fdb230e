"""Our own server without a socket, and faults in the passes of its model.

Requests go straight into the application.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from typing import Any

from starlette.testclient import TestClient

from live import app_of
from sidelight.backbone import TransformersBackbone
from sidelight.engines.base import Engine


@contextmanager
def in_process(engine: Engine, **options: Any) -> Iterator[TestClient]:
    """A client of a server of ``engine``; the options are those of ``app_of``.

    An answer arrives as a whole, a stream too.
    """
    app = app_of(engine, **options)
    with TestClient(app, "http://localhost", raise_server_exceptions=False) as client:
        yield client


@contextmanager
def faults(
    backbone: TransformersBackbone, by_pass: Mapping[int, Callable[[], None]]
) -> Iterator[None]:
    """What happens at the start of the forward passes of these numbers; the first is 1."""
    numbers = count(1)

    def note(*_: object) -> None:
        by_pass.get(next(numbers), lambda: None)()

    hook = backbone.model.register_forward_pre_hook(note)
    try:
        yield
    finally:
        hook.remove()
