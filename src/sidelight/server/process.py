"""``sidelight serve`` as a child process that ends with its parent's block."""

import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

from sidelight.errors import SidelightError

_START_S = 600.0
_STOP_S = 30.0


class ServerProcess:
    """A server with its probes on loopback.

    Args:
        probes: Folders of the probes.
        port: To listen on; 0 takes a free one.
        options: More words of the command line, such as those that name a model.
    """

    def __init__(self, probes: Sequence[Path], *, port: int = 0, options: Sequence[str] = ()):
        self._port = port or _free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self._probes = probes
        self._options = options

    def __enter__(self) -> "ServerProcess":
        named = [word for probe in self._probes for word in ("--probe", str(probe))]
        command = [sys.executable, "-m", "sidelight", "serve", "--port", str(self._port)]
        self._process = subprocess.Popen(
            [*command, "--log-level", "warning", *named, *self._options], stdout=subprocess.DEVNULL
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.terminate()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def wait_until_ready(self) -> None:
        """Returns when the server answers.

        Raises:
            SidelightError: It ended, or did not answer in ten minutes.
        """
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise SidelightError("The server ended while starting; its message is above.")
            try:
                with urlopen(f"{self.url}/ready", timeout=5):
                    return
            except (HTTPError, URLError, ConnectionError, TimeoutError):
                time.sleep(0.2)
        raise SidelightError(f"The server at {self.url} was not ready after {_START_S:.0f} s.")

    @property
    def pid(self) -> int:
        """Of the process, once it has begun."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def wait(self) -> None:
        """Returns when the server ends."""
        self._process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
