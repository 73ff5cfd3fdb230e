"""Targets as an attacker sees them: a probe, or a route of a live server."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import nan
from typing import Any

import httpx

from sidelight.data.examples import Example
from sidelight.engines.transformers.backbone import read_model
from sidelight.errors import SidelightError
from sidelight.models.conversation import Message
from sidelight.policy.rules import BoundRule, Rule, require_rule_applies
from sidelight.probes.probe import Probe
from sidelight.progress import quiet
from sidelight.scoring import classify
from sidelight.states.reader import Backbone, Model
from sidelight_lab.redteam.attacks import Messages

_AT_ONCE = 8
_TIMEOUT_S = 600.0
# Error codes of requests that were blocked without any model output.
_REFUSALS = frozenset({"content_filter", "system_turn_refused", "verdict_failed", "not_classified"})
_BLOCKED, _PASSED = 0.0, -1.0


def flagging_thresholds(
    probe: Probe, *, labels: Sequence[str] = (), threshold: float | None = None
) -> Mapping[str, float]:
    """Return the probability threshold at which each label flags a text, as in a policy rule.

    Raises:
        SidelightError: The probe reads responses, or nothing would be flagged.
    """
    if probe.reads.includes_response:
        raise SidelightError(
            f"Probe '{probe.name}' reads responses, which the model writes, but the attacks "
            "rewrite client messages. Name a probe that reads prompts."
        )
    if probe.task.kind == "multiclass" and not (labels and threshold is not None):
        raise SidelightError(
            f"Probe '{probe.name}' is multi-class, so it flags no label by default. Define what "
            "it flags with --flag LABEL --threshold PROBABILITY, as in a policy."
        )
    bound = BoundRule(probe, Rule("flag", threshold=threshold, labels=tuple(labels)))
    require_rule_applies(bound, [probe])
    return bound.thresholds


@dataclass(frozen=True)
class Target(ABC):
    """The target of an attack.

    Attributes:
        backbone: Provides the tokenizer and the chat template.
        thresholds: Thresholds by label, as returned by ``flagging_thresholds``.
    """

    backbone: Backbone | Model
    thresholds: Mapping[str, float]

    def reads(self, conversation: Sequence[Message]) -> bool:
        """Whether the conversation can be rendered and fits the backbone's context."""
        try:
            return len(self.backbone.encoder.encode(conversation)) > 0
        except SidelightError:
            return False

    @abstractmethod
    def margins(self, conversations: Sequence[Messages]) -> list[float]:
        """Return how far each score exceeds its threshold.

        A conversation is flagged from 0 on; NaN means that it cannot be sent.
        """


@dataclass(frozen=True)
class ProbeTarget(Target):
    """A probe that classifies conversations."""

    probe: Probe
    backbone: Backbone

    def margins(self, conversations: Sequence[Messages]) -> list[float]:
        with quiet():
            outputs = classify(
                self.backbone, self.probe, [Example(messages) for messages in conversations]
            )
        probabilities = [self.probe.verdict(output.logits).probabilities for output in outputs]
        return [
            max(p[label] - least for label, least in self.thresholds.items()) for p in probabilities
        ]


def _turns(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def _chat(messages: Messages, _tokenizer: Any) -> dict[str, Any]:
    return {"messages": _turns(messages), "max_tokens": 1}


def _text(messages: Messages, tokenizer: Any) -> dict[str, Any]:
    turns = _turns(messages)
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return {"prompt": text, "add_special_tokens": False, "max_tokens": 1}


def _ids(messages: Messages, tokenizer: Any) -> dict[str, Any]:
    text = _text(messages, tokenizer)["prompt"]
    return {"prompt": tokenizer(text, add_special_tokens=False)["input_ids"], "max_tokens": 1}


def _responses(messages: Messages, _tokenizer: Any) -> dict[str, Any]:
    return {"input": _turns(messages), "max_output_tokens": 1}


def _anthropic(messages: Messages, _tokenizer: Any) -> dict[str, Any]:
    system = "\n".join(message.content for message in messages if message.role == "system")
    turns = [message for message in messages if message.role != "system"]
    return {**({"system": system} if system else {}), "messages": _turns(turns), "max_tokens": 1}


# The path of each way to generate text, and a function that builds a request for one token. For
# "text" and "ids", the client renders the template itself, so that the name of a control token in
# a message becomes that token.
ROUTES: Mapping[str, tuple[str, Callable[[Messages, Any], dict[str, Any]]]] = {
    "chat": ("/v1/chat/completions", _chat),
    "text": ("/v1/completions", _text),
    "ids": ("/v1/completions", _ids),
    "responses": ("/v1/responses", _responses),
    "messages": ("/v1/messages", _anthropic),
}


@dataclass(frozen=True)
class RouteTarget(Target):
    """One of a server's ``ROUTES``; its attacker sees only whether a request passes."""

    client: httpx.Client
    model: str
    route: str

    def margins(self, conversations: Sequence[Messages]) -> list[float]:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(self._margin, conversations))

    def _margin(self, conversation: Messages) -> float:
        path, ask = ROUTES[self.route]
        body = {
            "model": self.model,
            "temperature": 0,
            **ask(conversation, self.backbone.encoder.tokenizer),
        }
        answer = _send(self.client, "POST", path, body)
        if answer.status_code == 200:
            return _PASSED
        if answer.status_code == 429 or answer.status_code >= 500:
            raise SidelightError(
                f"{path} returned status {answer.status_code}: {answer.text[:300]} Check the "
                "server's log."
            )
        is_json = answer.headers.get("content-type", "").startswith("application/json")
        error = answer.json().get("error") if is_json else None
        is_refusal = isinstance(error, dict) and error.get("code") in _REFUSALS
        # For other errors, the route does not accept empty turns, token ids or the like.
        return _BLOCKED if is_refusal else nan


def connect(url: str) -> httpx.Client:
    """Return a client of a server; it sends ``SIDELIGHT_API_KEY`` as its key, if that is set."""
    key = os.environ.get("SIDELIGHT_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.Client(base_url=url, headers=headers, timeout=_TIMEOUT_S)


def server_targets(
    client: httpx.Client, probe: Probe, thresholds: Mapping[str, float], model: str | None
) -> dict[str, RouteTarget]:
    """Return a target for each of ``ROUTES`` that a live server has.

    Args:
        client: Client from ``connect``.
        probe: Probe of the server's policy.
        thresholds: Thresholds by label, which also define the positive texts.
        model: Name or folder of the backbone; None uses the one that the probe was trained on.

    Raises:
        SidelightError: The server does not respond, requires another key or serves another model.
    """
    backbone = read_model(model or probe.card.backbone.name, prompt_format=probe.card.prompt_format)
    probe.card.backbone.require(backbone.fingerprint, probe=probe.name)
    (served, *_) = _send(client, "GET", "/v1/models").json()["data"]
    limit = served.get("max_model_len")
    if limit is not None:
        backbone.encoder.max_tokens = min(backbone.encoder.max_tokens, limit - 1)
    return {
        route: RouteTarget(backbone, thresholds, client, served["id"], route)
        for route, (path, _) in ROUTES.items()
        if _send(client, "POST", path, {}).status_code not in (404, 405)
    }


def _send(client: httpx.Client, method: str, path: str, body: Any = None) -> httpx.Response:
    try:
        answer = client.request(method, path, json=body)
    except httpx.HTTPError as error:
        raise SidelightError(
            f"{client.base_url} does not respond ({error}). Name a running server with --url."
        ) from error
    if answer.status_code == 401:
        raise SidelightError(
            f"{client.base_url} requires an API key. Set SIDELIGHT_API_KEY to one of the "
            "server's keys."
        )
    return answer
