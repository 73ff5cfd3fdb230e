"""Verdicts on texts through vLLM, and how its probes are replaced."""

# pyright: reportMissingImports=false

import asyncio
import uuid
from collections.abc import Collection, Coroutine, Generator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from functools import partial
from itertools import starmap
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

from sidelight.engines.annotation import annotate_spans, labels_spans
from sidelight.engines.base import (
    Engine,
    EngineBusyError,
    EngineUnavailableError,
    GenerationError,
    Load,
    NotExplainedError,
    PromptClassified,
    require_same_model,
    require_verdicts,
)
from sidelight.engines.text import TextCodec
from sidelight.engines.transformers.backbone import read_model
from sidelight.errors import SidelightError
from sidelight.models.conversation import Conversation, EncodedPrompt, Message, has_response
from sidelight.models.encode import PromptEncoder
from sidelight.models.fingerprint import Fingerprint
from sidelight.probes.artifact import save_probe
from sidelight.probes.card import read_card
from sidelight.probes.probe import Probe, common_format
from sidelight.types import Verdicts
from sidelight_vllm import KEY
from sidelight_vllm.internals import guesses_responses
from sidelight_vllm.lock import INCONSISTENT, ProbeLock
from sidelight_vllm.outputs import OutputListener, prompt_probe_names
from sidelight_vllm.settings import (
    ANNOTATED,
    ProbeSet,
    Served,
    log,
    require_options,
    require_vllm,
    revision_of,
)

# At most so many texts wait for their verdicts; of one list, so many are in vLLM at a time.
_WAITING, _RUNNING = 128, 16


@contextmanager
def saved(probes: Sequence[Probe]) -> Generator[tuple[list[str], ProbeSet]]:
    """Save probes for as long as they take to load; give their folders too."""
    with TemporaryDirectory(prefix="sidelight-probes-") as home:
        folders = [str(save_probe(probe, Path(home) / str(i))) for i, probe in enumerate(probes)]
        revision = revision_of(read_card(folder).version for folder in folders)
        yield folders, ProbeSet(tuple(probes), revision)


class VllmEngine(Engine):
    """Judges by one model with its probes, and writes nothing.

    All workers check new probes while the old ones serve. Then vLLM pauses, as for other weights,
    and loads them. It would refuse requests meanwhile, or queue them behind the change, so they
    wait here, before they have any probes. A running request keeps the probes that it started with;
    verdicts of other versions are ignored.

    Args:
        llm: vLLM's engine client, with the plugin loaded in it.
        served: The probes that it was started with, as its workers loaded them.
        name: The name that requests use.
        encoder: Turns messages into the model's token ids.
        fingerprint: Of the model; every probe must have been trained on it.

    Attributes:
        listener: Hears every report of vLLM's.
        encoder: The given one, within the context that vLLM has.
    """

    def __init__(
        self,
        llm: Any,
        served: ProbeSet,
        *,
        name: str,
        encoder: PromptEncoder,
        fingerprint: Fingerprint,
    ):
        self._llm = llm
        self.listener = OutputListener(llm)
        self._lock = ProbeLock(served)
        # A worker keeps those that were checked last, so there is one change at a time.
        self._change = asyncio.Lock()
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

    @property
    def probes(self) -> tuple[Probe, ...]:
        return self._lock.served.probes

    @property
    def load(self) -> Load:
        """The texts that wait for verdicts; vLLM itself counts those that it writes."""
        return Load(running=0, waiting=self._waiting)

    @property
    def is_ready(self) -> bool:
        return self._is_open and self._lock.is_consistent and not self._llm.errored

    async def start(self) -> None:
        self._is_open = True

    async def close(self) -> None:
        """End vLLM's processes."""
        self._is_open = False
        await asyncio.to_thread(self._llm.shutdown)
        await asyncio.to_thread(self._codec.close)

    async def replace_probes(self, probes: Sequence[Probe]) -> None:
        """As for every engine, once the requests in it are done; new ones wait (``serving``).

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
                "without speculative decoding, or load probes that read prompts."
            )
        servers = config.parallel_config._api_process_count
        if servers > 1:
            raise SidelightError(
                f"Probes cannot be replaced while {servers} API servers share an engine, because "
                "the policies of the other servers would keep the old probes. Start vLLM with "
                "--api-server-count 1."
            )
        await asyncio.to_thread(require_verdicts, probes)
        async with self._change:
            with saved(probes) as (folders, new):
                try:
                    await self._llm.collective_rpc("sidelight_check", args=(folders,))
                # Whatever a worker raises, vLLM gives it as this.
                except Exception as error:
                    raise SidelightError(f"vLLM cannot serve these probes. {error}") from error
                is_busy = self._llm.output_processor.has_unfinished_requests
                async with self._lock.writing(is_busy=is_busy):
                    loading = asyncio.create_task(self._load(new))
                    try:
                        await asyncio.shield(loading)
                    except asyncio.CancelledError:
                        await loading

    async def _load(self, new: ProbeSet) -> None:
        """Have every worker take the probes that it has checked."""
        try:
            # Cached blocks hold what the old probes read.
            await self._llm.pause_generation(mode="wait", clear_cache=True)
            try:
                await self._llm.collective_rpc("sidelight_load", args=(new.revision,))
            finally:
                await self._llm.resume_generation()
            self._lock.served = new
        # Whatever went wrong or stopped it, the workers' probes are unknown.
        except BaseException as error:
            self._lock.is_consistent = False
            log.critical("%s", INCONSISTENT)
            raise EngineUnavailableError(INCONSISTENT) from error

    def serving(self, begun: ProbeSet | None = None) -> AbstractAsyncContextManager[ProbeSet]:
        """The probes that are served: see ``ProbeLock.shared``."""
        return self._lock.shared(begun)

    async def tokenize(self, text: Conversation) -> tuple[int, ...]:
        return (await self._codec.in_thread([text], partial(self._codec.encode, text))).token_ids

    def generate(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: vLLM's own server writes texts, and a guard in it has them judged.

        Raises:
            SidelightError: Always.
        """
        raise SidelightError(
            "This engine only classifies. To generate text, start vLLM's own server with "
            "'sidelight serve --engine vllm'."
        )

    def classify(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        explain: Collection[str] | None = None,
    ) -> Coroutine[Any, Any, list[PromptClassified]]:
        if explain is not None:
            raise NotExplainedError()
        return self._classify(conversations, self._lock.served)

    async def _classify(
        self, conversations: Sequence[Sequence[Message]], begun: ProbeSet
    ) -> list[PromptClassified]:
        probes = begun.probes
        async with self.serving(begun):
            encode = partial(self._codec.encode, with_places=labels_spans(probes))
            prompts = await self._codec.in_thread(
                conversations, lambda: [*map(encode, conversations)]
            )
            checked = await self.check_all(prompts, begun.revision)
        prompt_names, every = prompt_probe_names(probes), {probe.name for probe in probes}

        def event(
            turns: Sequence[Message], prompt: EncodedPrompt, verdicts: Verdicts
        ) -> PromptClassified:
            readable = verdicts.of(every if has_response(turns) else prompt_names)
            readable = annotate_spans(readable, probes, prompt)
            return PromptClassified(readable, is_plain=prompt.is_plain, tokens=len(prompt))

        # Spans of thousands of messages take seconds.
        each = zip(conversations, prompts, checked, strict=True)
        return await asyncio.to_thread(lambda: [*starmap(event, each)])

    async def check_all(self, prompts: Sequence[EncodedPrompt], revision: str) -> list[Verdicts]:
        """Their verdicts, in order, by the probes of this revision.

        Args:
            prompts: Token ids of texts.
            revision: That of the probes.

        Raises:
            EngineBusyError: Too many wait. A list longer than the limit can only enter if none
                waits.
            EngineUnavailableError: vLLM has stopped.
            GenerationError: vLLM gave up a request, or gave no verdict.
        """
        if self._waiting and self._waiting + len(prompts) > _WAITING:
            raise EngineBusyError(waiting=self._waiting, limit=_WAITING)
        together = asyncio.Semaphore(_RUNNING)

        async def read(prompt: EncodedPrompt) -> Verdicts:
            async with together:
                return await self._read(prompt, revision)

        def leave(_: asyncio.Task[Verdicts]) -> None:
            self._waiting -= 1

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(read(prompt)) for prompt in prompts]
                self._waiting += len(tasks)
                for task in tasks:
                    task.add_done_callback(leave)
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _read(self, prompt: EncodedPrompt, revision: str) -> Verdicts:
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        self.encoder.require_within_context(prompt)
        if not self.is_ready:
            raise EngineUnavailableError()
        try:
            report = await self.listener.read_text(prompt, uuid.uuid4().hex, revision=revision)
        except EngineDeadError as error:
            raise EngineUnavailableError(
                "vLLM has stopped. Check its log for the reason, and restart the server."
            ) from error
        except EngineGenerateError as error:
            raise GenerationError(
                "vLLM aborted this request. Check its log for the reason."
            ) from error
        report.require_verdicts()
        return report


def load_vllm_engine(
    model: str,
    probes: Sequence[Probe],
    *,
    dtype: str = "auto",
    options: Mapping[str, Any] | None = None,
) -> VllmEngine:
    """Start vLLM without a server, and return the engine over it.

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

    backbone = read_model(model, prompt_format=common_format(probes))
    fields = {"max_model_len": backbone.encoder.max_tokens, **(options or {})}
    require_options(fields, AsyncEngineArgs)
    arguments = AsyncEngineArgs(model=backbone.path, dtype=dtype, disable_log_stats=True, **fields)
    with saved(probes) as (folders, loaded):
        arguments.additional_config = {KEY: {"probes": folders, ANNOTATED: True}}
        try:
            llm = AsyncLLM.from_engine_args(arguments)
        except TypeError as error:
            # vLLM compares numbers with whatever it is fields.
            raise SidelightError(
                f"vLLM cannot use these options ({error}): {fields}. Check their types."
            ) from error
    served = Served.of(llm.vllm_config)
    assert served is not None
    return VllmEngine(
        llm, loaded, name=model, encoder=backbone.encoder, fingerprint=served.fingerprint
    )
