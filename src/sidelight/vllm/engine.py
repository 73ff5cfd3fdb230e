"""Verdicts on conversations through vLLM, and how its probes are replaced."""

# pyright: reportMissingImports=false

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator, Collection, Coroutine, Generator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any, NoReturn

from sidelight.artifact import save_probe
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
    require_verdicts,
)
from sidelight.engines.marks import labels_spans, mark_text
from sidelight.engines.text import TextCodec
from sidelight.errors import SidelightError
from sidelight.fingerprint import Fingerprint
from sidelight.manifest import read_manifest
from sidelight.probe import Probe, common_format
from sidelight.prompts import Conversation, EncodedPrompt, Message, PromptEncoder, has_response
from sidelight.types import Judgement
from sidelight.vllm.internals import guesses_responses
from sidelight.vllm.outputs import OutputListener, early_names
from sidelight.vllm.settings import (
    DESCRIBED,
    KEY,
    Served,
    identity_of,
    require_options,
    require_vllm,
)

# vLLM shows what is logged under its own name.
_log = logging.getLogger("vllm.sidelight")

# At most so many texts wait for their verdicts; of one list, so many are in vLLM at a time.
_WAITING, _RUNNING = 128, 16
_LOOKS_EVERY_S = 0.02
# Once nothing has run in vLLM for so long, requests still inside wait for slow clients.
_SLOW_AFTER_S = 5.0
_PATIENCE_S = 300.0
_NOT_WHOLE = (
    "Replacing the probes failed on some workers, so they may differ now. Restart the server."
)


@contextmanager
def saved(probes: Sequence[Probe]) -> Generator[tuple[list[str], str]]:
    """Saves probes for as long as they take to load; gives their folders and identity."""
    with TemporaryDirectory(prefix="sidelight-probes-") as home:
        folders = [str(save_probe(probe, Path(home) / str(i))) for i, probe in enumerate(probes)]
        yield folders, identity_of(read_manifest(folder).version for folder in folders)


class VllmEngine(Engine):
    """Judges by one model with its probes, and writes nothing.

    All workers check new probes while the old ones serve. Then vLLM pauses, as for other weights,
    and loads them. It would refuse requests meanwhile, or queue them behind the change, so they
    wait here, before they have any probes. A running request keeps the probes that it started with;
    verdicts of other versions are ignored.

    Args:
        llm: vLLM's engine client, with the plugin loaded in it.
        probes: Those that it was started with.
        name: The name that requests use.
        encoder: Turns messages into the model's token ids.
        fingerprint: Of the model; every probe must have been trained on it.
        identity: That of the probes, as its workers loaded them.

    Attributes:
        listener: Hears every report of vLLM's.
        encoder: The given one, within the context that vLLM has.
    """

    def __init__(
        self,
        llm: Any,
        probes: Sequence[Probe],
        *,
        name: str,
        encoder: PromptEncoder,
        fingerprint: Fingerprint,
        identity: str,
    ):
        self._llm = llm
        self.listener = OutputListener(llm)
        self._probes = tuple(probes)
        self._identity = identity
        self.model = name
        self._fingerprint = fingerprint
        # vLLM always writes a token, also when a text is only judged, so one position is kept free.
        room = llm.vllm_config.model_config.max_model_len - 1
        self.encoder = PromptEncoder(
            encoder.tokenizer,
            prompt_format=encoder.prompt_format,
            max_tokens=min(encoder.max_tokens, room),
        )
        self.max_tokens = self.encoder.max_tokens
        self._codec = TextCodec(self.encoder)
        self._waiting = 0
        self._is_open = False
        # Of a change of probes: requests inside, whether others may come in, whether workers load,
        # whether all of them have the same.
        self._inside = 0
        self._admission = asyncio.Event()
        self._admission.set()
        self._is_changing = False
        self._is_whole = True
        self._turn = asyncio.Lock()

    @property
    def probes(self) -> tuple[Probe, ...]:
        return self._probes

    @property
    def load(self) -> Load:
        """The texts that wait for verdicts; vLLM itself counts those that it writes."""
        return Load(running=0, waiting=self._waiting)

    @property
    def is_ready(self) -> bool:
        return self._is_open and self._is_whole and not self._llm.errored

    async def start(self) -> None:
        self._is_open = True

    async def close(self) -> None:
        """Ends vLLM's processes."""
        self._is_open = False
        await asyncio.to_thread(self._llm.shutdown)

    async def replace_probes(self, probes: Sequence[Probe]) -> None:
        """As for every engine, once the requests in it are done; new ones wait (``settled``).

        A caller that gives up before vLLM pauses changes nothing; after that, the change ends.

        Raises:
            SidelightError: One cannot be served, there is no room for its columns, or several API
                servers share the engine: the old probes stay. Or replacing failed on some workers:
                then the engine is not ready any more.
        """
        require_same_model(probes, self._fingerprint)
        if not self.is_ready:
            raise EngineUnavailableError()
        config = self._llm.vllm_config
        if guesses_responses(config, probes):
            raise SidelightError(
                "Probes of the response are not supported under speculative decoding. Start vLLM "
                "without it, or load probes of the prompt."
            )
        servers = config.parallel_config._api_process_count
        if servers > 1:
            raise SidelightError(
                f"Probes cannot be replaced while {servers} API servers share an engine, since the "
                "others would keep their policies' old ones. Start vLLM with --api-server-count 1."
            )
        await asyncio.to_thread(require_verdicts, probes)
        async with self._turn:
            with saved(probes) as (folders, identity):
                try:
                    await self._llm.collective_rpc("sidelight_check", args=(folders,))
                # Whatever a worker raises, vLLM gives it as this.
                except Exception as error:
                    raise SidelightError(f"vLLM cannot serve these probes. {error}") from error
                self._admission.clear()
                try:
                    await self._drained()
                    loading = asyncio.create_task(self._load(tuple(probes), identity))
                    try:
                        await asyncio.shield(loading)
                    except asyncio.CancelledError:
                        await loading
                finally:
                    self._admission.set()

    async def _drained(self) -> None:
        """Waits until nobody is inside but those whose clients read slowly.

        Raises:
            EngineUnavailableError: Some texts take too long.
        """
        start = busy = monotonic()
        # Lets requests register that have passed the gate.
        await asyncio.sleep(_LOOKS_EVERY_S)
        while self._inside and monotonic() - busy < _SLOW_AFTER_S:
            if self._llm.output_processor.has_unfinished_requests():
                busy = monotonic()
            if busy - start > _PATIENCE_S:
                raise EngineUnavailableError(
                    f"Answers are still being written after {_PATIENCE_S:.0f} s, so the old probes "
                    "stay. Retry when fewer or shorter ones are."
                )
            await asyncio.sleep(_LOOKS_EVERY_S)

    async def _load(self, probes: tuple[Probe, ...], identity: str) -> None:
        """Has every worker take the probes that it has checked."""
        self._is_changing = True
        try:
            # Cached blocks hold what the old probes read.
            await self._llm.pause_generation(mode="wait", clear_cache=True)
            try:
                await self._llm.collective_rpc("sidelight_load", args=(identity,))
            finally:
                await self._llm.resume_generation()
            self._probes, self._identity = probes, identity
        # Whatever went wrong, the workers' probes are unknown.
        except Exception as error:
            self._is_whole = False
            _log.critical("%s", _NOT_WHOLE)
            raise EngineUnavailableError(_NOT_WHOLE) from error
        finally:
            self._is_changing = False

    async def settled(self) -> None:
        while not self._admission.is_set():
            await self._admission.wait()

    @asynccontextmanager
    async def passing(self, probes: tuple[Probe, ...]) -> AsyncGenerator[str]:
        """These probes stay while somebody is inside; yields their identity.

        It does not wait: the request may have another text inside that goes on after this one does.

        Raises:
            EngineUnavailableError: They are being replaced, or have been, since the request began.
        """
        if not self._is_whole:
            raise EngineUnavailableError(_NOT_WHOLE)
        if self._is_changing or probes is not self._probes:
            raise EngineUnavailableError("The probes have just been replaced. Retry.")
        self._inside += 1
        try:
            yield self._identity
        finally:
            self._inside -= 1

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
        return self._judge(conversations, self._probes)

    async def _judge(
        self, conversations: Sequence[Sequence[Message]], probes: tuple[Probe, ...]
    ) -> list[PromptJudged]:
        async with self.passing(probes) as identity:
            encode = partial(self._codec.encode, with_places=labels_spans(probes))
            prompts = await self._codec.in_thread(
                conversations, lambda: [*map(encode, conversations)]
            )
            judged = await self._check_all(prompts, identity)
        early, every = early_names(probes), {probe.name for probe in probes}
        events: list[PromptJudged] = []
        for turns, prompt, judgement in zip(conversations, prompts, judged, strict=True):
            said = judgement.of(every if has_response(turns) else early)
            said = mark_text(said, probes, prompt)
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
        """The judgement of these tokens by the probes of this identity.

        Raises:
            EngineUnavailableError: vLLM has stopped.
            GenerationError: vLLM gave up this request, or gave no verdict.
        """
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        self.encoder.require_within_context(prompt)
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
        report.require_judged()
        return report


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
    with saved(probes) as (folders, identity):
        arguments.additional_config = {KEY: {"probes": folders, DESCRIBED: True}}
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
        fingerprint=served.fingerprint,
        identity=identity,
    )
