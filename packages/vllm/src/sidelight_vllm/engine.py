"""Classification of texts through vLLM, and replacement of its probes."""

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

# Maximum number of texts that wait for verdicts, and of texts per list that are in vLLM at a time.
_WAITING, _RUNNING = 128, 16


@contextmanager
def saved(probes: Sequence[Probe]) -> Generator[tuple[list[str], ProbeSet]]:
    """Save probes while they are being loaded; yield their folders and the loaded set."""
    with TemporaryDirectory(prefix="sidelight-probes-") as home:
        folders = [str(save_probe(probe, Path(home) / str(i))) for i, probe in enumerate(probes)]
        revision = revision_of(read_card(folder).version for folder in folders)
        yield folders, ProbeSet(tuple(probes), revision)


class VllmEngine(Engine):
    """Classifies texts with one model and its probes, without generating text.

    All workers check new probes while the old ones serve. Then vLLM pauses, as for a weight update,
    and loads them. It would refuse requests in the meantime, or queue them behind the change, so
    they wait here before they are assigned probes. A running request keeps the probes that it
    started with; verdicts of other versions are ignored.

    Args:
        llm: vLLM's engine client, with the plugin loaded in it.
        served: Probes that it was started with.
        name: Model name in requests.
        encoder: Encoder of messages.
        fingerprint: Fingerprint of the model, which every probe must match.

    Attributes:
        listener: Receives every report from vLLM.
        encoder: The given encoder, limited to vLLM's context length.
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
        # A worker stores only the latest checked probes, so changes are serialised.
        self._change = asyncio.Lock()
        self.model = name
        self._fingerprint = fingerprint
        # vLLM always generates a token, even if a text is only classified, so one position is kept
        # free.
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
        """The texts that wait for verdicts; vLLM itself counts generated texts."""
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
        """Replace the probes once running requests are done; new ones wait (``serving``).

        If the caller is cancelled before vLLM pauses, nothing changes; afterwards, the change
        completes.

        Raises:
            SidelightError: A probe cannot be served, there is no room for its projections, or
                several API servers share the engine; the old probes stay. If replacing failed on
                some workers, the engine is no longer ready.
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
                # vLLM converts every error of a worker to this.
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
        """Have every worker load the probes that it has checked."""
        try:
            # Cached blocks have projections of the old probes.
            await self._llm.pause_generation(mode="wait", clear_cache=True)
            try:
                await self._llm.collective_rpc("sidelight_load", args=(new.revision,))
            finally:
                await self._llm.resume_generation()
            self._lock.served = new
        # After any error or cancellation, the workers' probes are unknown.
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
        """Not supported: vLLM's own server generates text, and its guard classifies it.

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
            return PromptClassified(readable, prompt)

        # Spans of thousands of messages take seconds.
        each = zip(conversations, prompts, checked, strict=True)
        return await asyncio.to_thread(lambda: [*starmap(event, each)])

    async def check_all(self, prompts: Sequence[EncodedPrompt], revision: str) -> list[Verdicts]:
        """Classify prompts, in order, with the probes of this revision.

        Args:
            prompts: Encoded texts.
            revision: Revision of the probes.

        Raises:
            EngineBusyError: Too many texts are waiting. A list longer than the limit can only enter
                if none is waiting.
            EngineUnavailableError: vLLM has stopped.
            GenerationError: vLLM aborted a request, or returned no verdict.
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
        dtype: Dtype, as in vLLM.
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
            # vLLM compares numbers with fields of any type.
            raise SidelightError(
                f"vLLM cannot use these options ({error}): {fields}. Check their types."
            ) from error
    served = Served.of(llm.vllm_config)
    assert served is not None
    return VllmEngine(
        llm, loaded, name=model, encoder=backbone.encoder, fingerprint=served.fingerprint
    )
