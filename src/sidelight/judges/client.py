"""The client that asks judges, over OpenAI's own library.

A question is asked once, however many texts wait for its answer, and recent answers are kept in
memory: a client cannot send a text again until the judge errs.
"""

import asyncio
import json
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from sidelight.errors import SidelightError
from sidelight.judges.budget import Budget
from sidelight.judges.profiles import PROFILES
from sidelight.judges.question import JudgeAnswer, JudgeError, Question
from sidelight.judges.settings import JUDGE_HEADER, JudgeSettings, is_loopback, port_of
from sidelight.judges.slots import FairSlots

_MOST_BYTES = 2**20
_CACHED_ANSWERS = 4096
# Listening there is listening on loopback, too.
_ANY = ("0.0.0.0", "::", "")


class JudgeClient:
    """One judge.

    It belongs to the event loop in which it is first asked.

    Args:
        settings: Which judge.
        name: Its name in messages.

    Raises:
        SidelightError: Its key is not set, or the library that asks is not installed.
    """

    def __init__(self, settings: JudgeSettings, *, name: str = "judge"):
        try:
            from openai import AsyncOpenAI, DefaultAsyncHttpxClient
        except ImportError as error:
            raise SidelightError(
                "Judges are asked through the package 'openai', which is not installed. Run "
                "pip install -e '.[serve]' in a clone."
            ) from error
        self.settings, self.name = settings, name
        host = urlsplit(settings.url).hostname or ""
        self._client = AsyncOpenAI(
            base_url=settings.url,
            # Otherwise the library would send this machine's OPENAI_API_KEY and its like.
            api_key=settings.key() or "none",
            organization="",
            project="",
            max_retries=settings.retries,
            timeout=settings.timeout_s,
            # A small compressed answer could fill the memory.
            default_headers={JUDGE_HEADER: "1", "accept-encoding": "identity"},
            http_client=DefaultAsyncHttpxClient(
                follow_redirects=False,
                trust_env=not is_loopback(host),
                event_hooks={"response": [self._limit]},
            ),
        )
        self._slots = FairSlots(settings.concurrency)
        self._budget = Budget(settings.budget_per_minute, settings.budget_per_key)
        self._asking: dict[str, tuple[asyncio.Task[JudgeAnswer], set[object]]] = {}
        self._answers: OrderedDict[str, float] = OrderedDict()

    async def ask(self, question: Question, *, key_id: str | None = None) -> JudgeAnswer:
        """The answer to a question.

        Args:
            question: About which text.
            key_id: Id of the API key for which it is asked; None: without one.

        Raises:
            JudgeError: There is no verdict.
        """
        settings, digest = self.settings, question.digest
        if digest in self._answers:
            self._answers.move_to_end(digest)
            return JudgeAnswer(self._answers[digest])
        if digest not in self._asking:
            if question.characters > settings.max_characters:
                raise JudgeError(
                    "too_long",
                    f"The text has {question.characters:,} characters, and judge '{self.name}' "
                    f"gets at most {settings.max_characters:,} (max_characters).",
                )
            if not self._budget.take(key_id):
                raise JudgeError("budget", f"The budget of judge '{self.name}' is used up.")
            is_sent = asyncio.Event()
            asking = asyncio.ensure_future(self._timed(question, key_id, is_sent))
            # Also where it is cancelled before it begins: a batch of which one text fails would
            # otherwise use up the budget for questions that no judge has seen.
            asking.add_done_callback(lambda _: is_sent.is_set() or self._budget.give_back(key_id))
            self._asking[digest] = asking, set()
        asking, waiting = self._asking[digest]
        me = object()
        waiting.add(me)
        try:
            # One client that leaves must not end the question of another.
            return await asyncio.shield(asking)
        finally:
            waiting.discard(me)
            if asking.done() or not waiting:
                asking.cancel()
                if self._asking.get(digest, (None,))[0] is asking:
                    del self._asking[digest]

    async def close(self) -> None:
        """Closes its connections."""
        await self._client.close()

    async def _timed(
        self, question: Question, key_id: str | None, is_sent: asyncio.Event
    ) -> JudgeAnswer:
        started, name = time.perf_counter(), self.name
        # The library's own limits are for each read, and this one for all of them.
        try:
            async with asyncio.timeout(self.settings.timeout_s), self._slots.slot(key_id):
                is_sent.set()
                answer = await self._sent(question)
        except TimeoutError as error:
            raise JudgeError(
                "timeout", f"Judge '{name}' gave no answer in {self.settings.timeout_s:g} s."
            ) from error
        probability = self._read(answer)
        self._answers[question.digest] = probability
        if len(self._answers) > _CACHED_ANSWERS:
            self._answers.popitem(last=False)
        return JudgeAnswer(probability, time.perf_counter() - started)

    async def _limit(self, response: Any) -> None:
        """Lets no answer grow without end, and drops what a judge says of an error."""
        name, stream, is_error = self.name, response.stream, response.is_error
        # Of httpx or httpx2, by the version of openai.
        base: Any = next(t for t in type(stream).__mro__ if t.__name__ == "AsyncByteStream")
        # Bytes that were compressed all the same are read as they are, and are no JSON.
        response.headers.pop("content-encoding", None)

        class Limited(base):
            async def __aiter__(self) -> AsyncIterator[bytes]:
                # It may quote the text, and the library would read it whole.
                if is_error:
                    return
                received = 0
                async for chunk in stream:
                    received += len(chunk)
                    if received > _MOST_BYTES:
                        raise JudgeError(
                            "unreadable", f"Judge '{name}' answers more than {_MOST_BYTES} B."
                        )
                    yield chunk

            async def aclose(self) -> None:
                await stream.aclose()

        response.stream = Limited()

    async def _sent(self, question: Question) -> Mapping[str, Any]:
        """The body of an answer."""
        from openai import APIStatusError, APITimeoutError

        client, body = self._client, self._body(question)
        route = {
            "chat": client.chat.completions,
            "decisions": client.decisions,
            "moderations": client.moderations,
        }[self.settings.kind]
        received = bytearray()
        try:
            async with route.with_streaming_response.create(**body) as response:
                async for chunk in response.iter_bytes():
                    received += chunk
        except JudgeError:
            raise
        except APITimeoutError as error:
            raise TimeoutError from error
        except APIStatusError as error:
            status = f"Judge '{self.name}' answers with status {error.status_code}."
            if 300 <= error.status_code < 400:
                status += " Redirects are not followed: write the address it leads to."
            raise JudgeError("status", status) from error
        # While a body arrives, the library passes on whatever its transport raises.
        except Exception as error:
            raise JudgeError(
                "unreachable", f"Judge '{self.name}' cannot be reached ({type(error).__name__})."
            ) from error
        try:
            answer = json.loads(received)
        except (ValueError, RecursionError) as error:
            raise JudgeError(
                "unreadable", f"Judge '{self.name}' answers no JSON, or compresses it."
            ) from error
        if not isinstance(answer, dict):
            raise JudgeError("unreadable", f"Judge '{self.name}' answers no JSON object.")
        return answer

    def _body(self, question: Question) -> dict[str, Any]:
        settings = self.settings
        if settings.kind == "chat":
            fields = PROFILES[settings.profile].request(question, settings.criterion or "")
            extra = {k: fields.pop(k) for k in ("chat_template_kwargs",) if k in fields}
            return {"model": settings.model, **fields, "extra_body": {**extra, **settings.extra}}
        body: dict[str, Any] = {"model": settings.model, "extra_body": settings.extra}
        if settings.kind == "moderations":
            text = question.response
            return {**body, "input": question.prompt if text is None else text}
        turns = [{"role": "user", "content": question.prompt}]
        if question.response is not None:
            turns.append({"role": "assistant", "content": question.response})
        asked = {"type": "predicate", "name": settings.category}
        if settings.criterion is not None:
            asked["instructions"] = settings.criterion
        return {**body, "input": turns, "questions": [asked]}

    def _read(self, answer: Mapping[str, Any]) -> float:
        try:
            probability = self._probability(answer)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise JudgeError(
                "unreadable",
                f"The answer of judge '{self.name}' has another form ({type(error).__name__}).",
            ) from error
        return self._require_probability(probability)

    def _require_probability(self, probability: Any) -> float:
        if isinstance(probability, bool) or not isinstance(probability, int | float):
            raise JudgeError("unreadable", f"Judge '{self.name}' gives no number.")
        if not 0 <= probability <= 1:
            raise JudgeError("unreadable", f"Judge '{self.name}' gives no probability.")
        return float(probability)

    def _probability(self, answer: Mapping[str, Any]) -> Any:
        settings = self.settings
        if settings.kind == "chat":
            return PROFILES[settings.profile].read(answer)
        if settings.kind == "moderations":
            (only,) = answer["results"]
            scores = only["category_scores"]
            if settings.category is not None:
                return scores[settings.category]
            # The highest of scores of which one is NaN is any of them.
            return max(map(self._require_probability, scores.values()))
        (only,) = answer["answers"]
        if only["type"] != "predicate":
            raise JudgeError(
                "unreadable", f"Judge '{self.name}' does not answer '{settings.category}'."
            )
        return only["probability"]


def require_another_server(settings: JudgeSettings, name: str, *, host: str, port: int) -> None:
    """Refuses a judge that is this very server.

    Raises:
        SidelightError: Its address is the one that this server listens on.
    """
    judge = urlsplit(settings.url).hostname or ""
    is_here = judge == host or (is_loopback(judge) and (is_loopback(host) or host in _ANY))
    if is_here and port and port_of(settings.url) == port:
        raise SidelightError(
            f"Judge '{name}' is at {settings.url}, where this server listens itself. Name another "
            "server."
        )
