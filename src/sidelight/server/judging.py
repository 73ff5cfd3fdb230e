"""The judges of a server's policies, and the questions of one request."""

import asyncio
import logging
from collections.abc import Coroutine, Iterable
from typing import Any

from sidelight.judges.client import JudgeClient, require_another_server
from sidelight.judges.question import JudgeAnswer, Question
from sidelight.judges.settings import JudgeSettings
from sidelight.policy.rules import Policy, Rule
from sidelight.server.config import ServerConfig

_log = logging.getLogger(__name__)


class Judges:
    """The judge clients of a server.

    A judge that a new policy does not change keeps its client, with its budget and its cached
    answers.

    Args:
        config: Configuration with the server's own address.
    """

    def __init__(self, config: ServerConfig):
        self._host, self._port = config.host, config.port
        self._clients: dict[str, JudgeClient] = {}
        self._later: set[asyncio.Task[None]] = set()

    def prepare(self, policy: Policy) -> None:
        """Create the clients of a policy; the first call takes seconds.

        Raises:
            SidelightError: A judge has no key, or is this server itself.
        """
        for name, settings in deferred_to(policy).items():
            require_another_server(settings, name, host=self._host, port=self._port)
            if _name_of(settings) not in self._clients:
                self._clients[_name_of(settings)] = JudgeClient(settings, name=name)

    def of(self, policy: Policy, key_id: str | None) -> "RequestJudges | None":
        """The judges for a request under this policy; None if no rule defers."""
        clients = {
            name: self._clients[_name_of(settings)]
            for name, settings in deferred_to(policy).items()
        }
        return RequestJudges(clients, key_id, self._later) if clients else None

    async def close(self) -> None:
        """End pending work, and close all connections."""
        for task in self._later:
            task.cancel()
        await asyncio.gather(*self._later, return_exceptions=True)
        for client in self._clients.values():
            await client.close()


class RequestJudges:
    """The ``policy.second_stage.AsksJudges`` of one request."""

    def __init__(
        self,
        clients: dict[str, JudgeClient],
        key_id: str | None,
        later: set[asyncio.Task[None]],
    ):
        self._clients, self._key_id, self._later = clients, key_id, later

    async def ask(self, judge: str, question: Question) -> JudgeAnswer:
        return await self._clients[judge].ask(question, key_id=self._key_id)

    def later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(_logged(work))
        self._later.add(task)
        task.add_done_callback(self._later.discard)


async def _logged(work: Coroutine[Any, Any, None]) -> None:
    try:
        await work
    # The client has already been answered. The error's message might quote a text.
    except Exception as error:  # noqa: BLE001
        _log.error("A verdict of a shadow could not be recorded (%s).", type(error).__name__)


def deferred_to(policy: Policy) -> dict[str, JudgeSettings]:
    """The judges that rules defer to, by name."""
    rules: Iterable[Rule] = (*policy.input.values(), *policy.output.values())
    names = dict.fromkeys(rule.defer.judge for rule in rules if rule.defer)
    return {name: policy.judges[name] for name in names}


def _name_of(settings: JudgeSettings) -> str:
    return settings.model_dump_json()
