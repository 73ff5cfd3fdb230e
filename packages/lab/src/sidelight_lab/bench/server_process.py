"""``sidelight serve`` as a child process that ends with its parent's block."""

import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import httpx

from sidelight.errors import SidelightError

_START_S = 600.0
_STOP_S = 30.0


class ServerProcess:
    """A server with its probes on a free port of loopback.

    Args:
        probes: Folders of the probes.
        options: More words of the command line, such as those that name a model.
    """

    def __init__(self, probes: Sequence[Path], *, options: Sequence[str] = ()):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        named = [word for probe in probes for word in ("--probe", str(probe))]
        command = [sys.executable, "-P", "-m", "sidelight", "serve", "--port", str(port)]
        self._command = [*command, "--log-level", "warning", *named, *options]

    def __enter__(self) -> "ServerProcess":
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def wait_until_ready(self) -> None:
        """Return when the server answers.

        Raises:
            SidelightError: It ended, or did not answer within ten minutes.
        """
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise SidelightError(
                    "The server exited while starting; its error message is above."
                )
            try:
                if httpx.get(f"{self.url}/ready").is_success:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        raise SidelightError(
            f"The server at {self.url} was not ready after {_START_S:.0f} s. Check its log."
        )

    @property
    def pid(self) -> int:
        return self._process.pid
