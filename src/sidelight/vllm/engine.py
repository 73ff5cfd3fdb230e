"""Verdicts on conversations through vLLM, and how vLLM is started."""

# pyright: reportMissingImports=false

import asyncio
import os
import uuid
from collections.abc import Collection, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict
from functools import partial
from typing import Any, NoReturn

from sidelight.backbone import read_backbone
from sidelight.engines.base import (
    Engine,
    EngineBusyError,
    EngineUnavailableError,
    GenerationError,
    Load,
    NotExplainedError,
    PromptJudged,
    require_same_model,
)
from sidelight.engines.text import Marker, TextCodec, with_response
from sidelight.errors import SidelightError, did_you_mean
from sidelight.fingerprint import Fingerprint
from sidelight.probe import Probe, common_format
from sidelight.prompts import Conversation, EncodedPrompt, Message, PromptEncoder, has_response
from sidelight.types import Judgement
from sidelight.vllm.exchange import Exchange, saved
from sidelight.vllm.internals import QUANTISING, quantisation
from sidelight.vllm.outputs import OutputListener, early_names
from sidelight.vllm.requests import judgement_of
from sidelight.vllm.settings import DESCRIBED, KEY, Served, of_the_original

# At most so many texts wait for their verdicts; of one list, so many are in vLLM at a time.
_WAITING, _RUNNING = 128, 16


class VllmEngine(Engine):
    """Judges by one model with its probes, and writes nothing.

    Args:
        llm: vLLM's engine client, with the plugin loaded in it.
        probes: Those that it was started with.
        name: The name that requests use.
        encoder: Turns messages into the model's token ids.
        tokenizer: The model's tokenizer.
        fingerprint: Of the model; every probe must have been trained on it.
        identity: That of the probes, as its workers loaded them.

    Attributes:
        listener: Hears every report of vLLM's.
    """

    def __init__(
        self,
        llm: Any,
        probes: Sequence[Probe],
        *,
        name: str,
        encoder: PromptEncoder,
        tokenizer: Any,
        fingerprint: Fingerprint,
        identity: str,
    ):
        self._llm = llm
        self.listener = OutputListener(llm)
        self._exchange = Exchange(llm, probes, identity)
        self._name = name
        self._fingerprint = fingerprint
        # vLLM always writes a token, also when a text is only judged, so one position is kept free.
        room = min(encoder.max_tokens, llm.vllm_config.model_config.max_model_len - 1)
        self._codec = TextCodec(encoder, tokenizer, max_tokens=room)
        self._waiting = 0
        self._is_open = False

    @property
    def model(self) -> str:
        return self._name

    @property
    def probes(self) -> tuple[Probe, ...]:
        return self._exchange.probes

    @property
    def max_tokens(self) -> int:
        return self._codec.max_tokens

    @property
    def load(self) -> Load:
        """Those that wait for their verdicts; vLLM itself counts those that it writes."""
        return Load(running=0, waiting=self._waiting)

    @property
    def is_ready(self) -> bool:
        return self._is_open and self._exchange.is_whole and not self._llm.errored

    async def start(self) -> None:
        self._is_open = True

    async def close(self) -> None:
        """Ends vLLM's processes."""
        self._is_open = False
        await asyncio.to_thread(self._llm.shutdown)

    async def replace_probes(self, probes: Sequence[Probe]) -> None:
        """As for every engine, once the requests in it are done; new ones wait (``settled``).

        Raises:
            SidelightError: One cannot be served, there is no room for its columns, or several API
                servers share the engine: the old probes stay. Or replacing failed on some workers:
                then the engine is not ready any more.
        """
        require_same_model(probes, self._fingerprint)
        if not self.is_ready:
            raise EngineUnavailableError()
        await self._exchange.replace(probes)

    async def settled(self) -> None:
        await self._exchange.settled()

    def passing(self, probes: tuple[Probe, ...]) -> AbstractAsyncContextManager[str]:
        """As ``Exchange.passing``, for requests that come another way."""
        return self._exchange.passing(probes)

    async def tokenize(self, text: Conversation) -> tuple[int, ...]:
        return (await self._codec.in_thread([text], partial(self._codec.encode, text))).token_ids

    def generate(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: vLLM's own server writes texts, and a guard in it has them judged.

        Raises:
            SidelightError: Always.
        """
        raise SidelightError(
            "This engine only judges. Texts are written by vLLM's own server: start it with "
            "'sidelight serve --engine vllm'."
        )

    def judge(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        explain: Collection[str] | None = None,
    ) -> Coroutine[Any, Any, list[PromptJudged]]:
        if explain is not None:
            raise NotExplainedError()
        return self._judge(conversations, self._exchange.probes)

    async def _judge(
        self, conversations: Sequence[Sequence[Message]], probes: tuple[Probe, ...]
    ) -> list[PromptJudged]:
        async with self._exchange.passing(probes) as identity:
            codec = self._codec

            def encode(turns: Sequence[Message]) -> tuple[EncodedPrompt, Marker | None]:
                prompt = codec.encode(turns)
                return prompt, codec.marker(*with_response(turns), prompt, probes)

            encoded = await codec.in_thread(conversations, lambda: [*map(encode, conversations)])
            judged = await self._check_all([prompt for prompt, _ in encoded], identity)
        early = early_names(probes)
        events: list[PromptJudged] = []
        for turns, (prompt, mark), judgement in zip(conversations, encoded, judged, strict=True):
            said = judgement if has_response(turns) else judgement.of(early)
            said = mark(said) if mark else said
            events.append(PromptJudged(said, is_plain=prompt.is_plain, tokens=len(prompt)))
        return events

    async def _check_all(self, prompts: Sequence[EncodedPrompt], identity: str) -> list[Judgement]:
        """In order. Of a long list only some are in vLLM at once, so that others get in.

        Raises:
            EngineBusyError: Too many wait. A list longer than the limit can only enter if nobody
                waits.
        """
        if self._waiting and self._waiting + len(prompts) > _WAITING:
            raise EngineBusyError(waiting=self._waiting, limit=_WAITING)
        together = asyncio.Semaphore(_RUNNING)

        async def check(prompt: EncodedPrompt) -> Judgement:
            async with together:
                return await self.check(prompt, identity)

        def leave(_: asyncio.Task[Judgement]) -> None:
            self._waiting -= 1

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(check(prompt)) for prompt in prompts]
                self._waiting += len(tasks)
                for task in tasks:
                    task.add_done_callback(leave)
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def check(self, prompt: EncodedPrompt, identity: str) -> Judgement:
        """What the probes of this identity say of these tokens.

        Raises:
            EngineUnavailableError: vLLM has stopped.
            GenerationError: vLLM gave up this request, or gave no verdict.
        """
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        self._codec.require_within_context(prompt)
        if not self.is_ready:
            raise EngineUnavailableError()
        try:
            report = await self.listener.read_whole(prompt, uuid.uuid4().hex, identity=identity)
        except EngineDeadError as error:
            raise EngineUnavailableError(
                "vLLM has stopped; its log says why. Start the server again."
            ) from error
        except EngineGenerateError as error:
            raise GenerationError("vLLM gave up this request; its log says why.") from error
        return judgement_of(report and report.params)[0]


# vLLM's options that Sidelight sets itself, and what to do instead, in any command.
SET_HERE = {
    "model": "Give --model instead.",
    "dtype": "Give --dtype instead.",
    "additional_config": "Leave it out; it carries the plugin's settings.",
    "disable_log_stats": "Leave it out; a server has its figures at /metrics.",
}


def load_vllm_engine(
    model: str,
    probes: Sequence[Probe],
    *,
    dtype: str = "auto",
    options: Mapping[str, Any] | None = None,
) -> VllmEngine:
    """Starts vLLM without a server, and returns the engine over it.

    Args:
        model: ``smollm2``, a folder, or a hub id.
        probes: Probes trained on it, or accepted on this quantised copy (``SIDELIGHT_QUANTISED``).
        dtype: As vLLM takes it.
        options: Fields of vLLM's ``AsyncEngineArgs``.

    Raises:
        SidelightError: vLLM is not installed, an option is unknown, a probe belongs to another
            model or reads another format than the others, or the plugin does not support a feature
            that is in use.
    """
    require_vllm()
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    backbone = read_backbone(model, prompt_format=common_format(probes))
    fields = {"max_model_len": backbone.encoder.max_tokens, **(options or {})}
    require_options(fields, AsyncEngineArgs)
    arguments = AsyncEngineArgs(model=backbone.path, dtype=dtype, disable_log_stats=True, **fields)
    with saved(probes) as on_disk:
        files = asdict(backbone.fingerprint)
        named = {"probes": on_disk.folders, "fingerprint": files, DESCRIBED: True}
        arguments.additional_config = {KEY: named}
        try:
            llm = AsyncLLM.from_engine_args(arguments)
        except TypeError as error:
            # vLLM compares numbers with whatever it is fields.
            raise SidelightError(
                f"vLLM cannot work with these options ({error}): {fields}. Check their types."
            ) from error
    served = Served.of(llm.vllm_config)
    assert served is not None
    return VllmEngine(
        llm,
        probes,
        name=model,
        encoder=backbone.encoder,
        tokenizer=backbone.tokenizer,
        fingerprint=served.fingerprint,
        identity=on_disk.identity,
    )


def copy_of(model: str, probes: Sequence[Probe], options: Mapping[str, Any]) -> Fingerprint:
    """The fingerprint of a quantised copy of the model that probes were trained on.

    Args:
        model: Folder or hub id of the copy; or of the original, which the options quantise.
        probes: Probes of the original.
        options: Fields of vLLM's ``EngineArgs``.

    Raises:
        FingerprintMismatchError: It is no copy: more than the weights differ.
        SidelightError: It is the model that a probe was trained on.
    """
    require_vllm()
    from vllm.engine.arg_utils import EngineArgs

    backbone = read_backbone(model, prompt_format=common_format(probes))
    fields = {name: value for name, value in options.items() if name in QUANTISING}
    how = quantisation(EngineArgs(model=backbone.path, **fields))
    copy = backbone.fingerprint.quantised(how) if how else backbone.fingerprint
    if len(of_the_original(probes, copy)) < len(probes):
        raise SidelightError(
            f"A probe was trained on {model}, so it serves there as it is. Name a quantised copy, "
            "or say how vLLM is to quantise it, such as --engine-option quantization=fp8."
        )
    return copy


def require_options(options: Mapping[str, Any], args_type: Any) -> None:
    """Checks that these are fields of vLLM's arguments that Sidelight does not set.

    Raises:
        SidelightError: One is not.
    """
    known = args_type.__dataclass_fields__
    for name in options:
        if name in SET_HERE:
            raise SidelightError(f"vLLM's option '{name}' is set by Sidelight. {SET_HERE[name]}")
        if name not in known:
            raise SidelightError(f"vLLM has no option '{name}'.{did_you_mean(name, known)}")


def require_vllm() -> None:
    """Checks that vLLM can be imported.

    Raises:
        SidelightError: It is not installed.
    """
    # Standard output belongs to what a command prints.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    try:
        import vllm.engine.arg_utils  # noqa: F401 # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise SidelightError(
            "vLLM is not installed in this environment. docs/vllm.md says how; or use "
            "--engine transformers."
        ) from error
