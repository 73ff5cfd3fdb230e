"""A live server as a target: what its policy lets pass, on each route that writes text.

Texts are sent as vLLM's server takes them. As ids and as rendered text, a client writes the
template itself, so that the name of a control token in a message becomes that token.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import nan
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from sidelight.backbone import read_backbone
from sidelight.errors import SidelightError
from sidelight.probe import Probe
from sidelight.progress import Progress
from sidelight.prompts import Message
from sidelight_lab.redteam.attacks import Messages
from sidelight_lab.redteam.subjects import Target

_AT_ONCE = 8
_TIMEOUT_S = 600.0
# Codes of a refusal: nothing of the model reaches the client.
_REFUSALS = frozenset({"content_filter", "system_turn_refused", "verdict_failed", "not_judged"})
_BLOCKED, _PASSED = 0.0, -1.0

Ask = Callable[[Messages, Any], dict[str, Any]]
"""The body of a request for one token after these messages, for a model of this tokenizer."""


def _turns(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def _rendered(messages: Messages, tokenizer: Any) -> str:
    return tokenizer.apply_chat_template(
        _turns(messages), tokenize=False, add_generation_prompt=True
    )


def _anthropic(messages: Messages, _tokenizer: Any) -> dict[str, Any]:
    system = "\n".join(message.content for message in messages if message.role == "system")
    others = [message for message in messages if message.role != "system"]
    first = {"system": system} if system else {}
    return {**first, "messages": _turns(others), "max_tokens": 1}


ROUTES: Mapping[str, tuple[str, Ask]] = {
    "chat": (
        "/v1/chat/completions",
        lambda messages, _: {"messages": _turns(messages), "max_tokens": 1},
    ),
    "text": (
        "/v1/completions",
        lambda messages, tokenizer: {
            "prompt": _rendered(messages, tokenizer),
            "add_special_tokens": False,
            "max_tokens": 1,
        },
    ),
    "ids": (
        "/v1/completions",
        lambda messages, tokenizer: {
            "prompt": tokenizer(_rendered(messages, tokenizer), add_special_tokens=False)[
                "input_ids"
            ],
            "max_tokens": 1,
        },
    ),
    "responses": (
        "/v1/responses",
        lambda messages, _: {"input": _turns(messages), "max_output_tokens": 1},
    ),
    "messages": ("/v1/messages", _anthropic),
}
"""Ways to have a text written, by name."""


@dataclass(frozen=True)
class Server:
    """A server that answers at this address; ``SIDELIGHT_API_KEY`` is its key, if it needs one."""

    url: str

    def post(self, path: str, body: Mapping[str, Any] | None) -> tuple[int, Any]:
        """The status and the JSON of an answer; without a body, of a get.

        Raises:
            SidelightError: It does not answer, or wants another key.
        """
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("SIDELIGHT_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = Request(self.url.rstrip("/") + path, data=data, headers=headers)
        try:
            with urlopen(request, timeout=_TIMEOUT_S) as answer:
                return answer.status, json.load(answer)
        except HTTPError as error:
            if error.code == 401:
                raise SidelightError(
                    f"{self.url} wants a key. Set SIDELIGHT_API_KEY to one of the server's."
                ) from error
            return error.code, _json(error.read())
        except (URLError, OSError) as error:
            raise SidelightError(
                f"{self.url} does not answer ({error}). Name a running server with --url."
            ) from error

    def targets(
        self, probe: Probe, thresholds: Mapping[str, float], model: str | None
    ) -> "dict[str, RouteTarget]":
        """A target for each of ``ROUTES`` that the server has.

        Args:
            probe: That of the server's policy.
            thresholds: Say which texts are positive.
            model: The backbone, if it is not where the probe was trained.

        Raises:
            SidelightError: As ``post``, or the probe belongs to another model.
        """
        name = model or probe.fingerprint.name
        backbone = read_backbone(name, prompt_format=probe.prompt_format)
        probe.fingerprint.require(backbone.fingerprint, probe=probe.name)
        _, models = self.post("/v1/models", None)
        (served, *_) = models["data"]
        limit = served.get("max_model_len")
        if limit is not None:
            backbone.encoder.max_tokens = min(backbone.encoder.max_tokens, limit - 1)
        found = {route: self.post(path, {})[0] for route, (path, _) in ROUTES.items()}
        return {
            route: RouteTarget(backbone, thresholds, self, served["id"], route)
            for route, status in found.items()
            if status not in (404, 405)
        }


@dataclass(frozen=True)
class RouteTarget(Target):
    """One route of a server, whose attacker sees what passes and nothing else."""

    server: Server
    model: str
    route: str

    def margins(self, conversations: Sequence[Messages], shown: Progress) -> list[float]:
        def margin(conversation: Messages) -> float:
            found = self._margin(conversation)
            shown.advance(self.tokens(conversation))
            return found

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(margin, conversations))

    def _margin(self, conversation: Messages) -> float:
        path, ask = ROUTES[self.route]
        body = {"model": self.model, "temperature": 0, **ask(conversation, self.backbone.tokenizer)}
        status, answer = self.server.post(path, body)
        if status == 200:
            return _PASSED
        error = answer.get("error") if isinstance(answer, dict) else None
        if isinstance(error, dict) and error.get("code") in _REFUSALS:
            return _BLOCKED
        if status == 429 or status >= 500:
            raise SidelightError(
                f"{path} answered {status}: {json.dumps(error)[:300]} Look at the server's log."
            )
        # It takes no empty turns, no ids, or the like.
        return nan


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return None
