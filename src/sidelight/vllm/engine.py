"""Conversations to requests of vLLM, with their places and order.

Starts vLLM with the plugin in it.
"""

import asyncio
import os
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Collection, Coroutine, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict
from typing import Any

from sidelight.backbone import Fingerprint, load_backbone
from sidelight.engines.base import (
    Admission,
    Engine,
    EngineUnavailableError,
    Event,
    GenerationError,
    Load,
    PromptJudged,
    Sampling,
    Tokens,
    admit_all,
    can_judge,
    require_same_model,
    require_watchable,
    unjudged_admission,
    without_verdicts,
)
from sidelight.engines.judging import Judgement
from sidelight.engines.logprobs import Trail
from sidelight.engines.queue import Limits
from sidelight.engines.text import WARM_UP, Speller, TextReader, has_response
from sidelight.errors import SidelightError, did_you_mean
from sidelight.probe import Probe, common_format
from sidelight.prompts import Conversation, EncodedPrompt, Message, PromptEncoder
from sidelight.vllm.exchange import Exchange, ProbeFolder
from sidelight.vllm.requests import (
    Capacity,
    Likelihoods,
    Names,
    OutputListener,
    Place,
    RequestsOutput,
    Said,
    WrittenText,
    judgement,
    require_drawable,
    sampling_params,
)
from sidelight.vllm.settings import KEY

# pyright: reportMissingImports=false


class VllmEngine(Engine):
    """Serves one model with its probes; made by ``load_vllm_engine``.

    Args:
        llm: vLLM's engine, the plugin loaded in it.
        probes: What it was started with.
        name: Of the model, in requests.
        encoder: Of the model.
        tokenizer: Of the model.
        fingerprint: Of the model.
        shelf: Where its workers find probes.
        limits: ``waiting`` requests that vLLM has not begun, and of a longer list of texts to judge
            ``running`` at once.
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
        shelf: ProbeFolder,
        limits: Limits | None = None,
    ):
        self._llm = llm
        self._hearing = OutputListener(llm.output_processor)
        self._exchange = Exchange(llm, shelf, probes)
        self._name = name
        self._encoder = encoder
        self._tokenizer = tokenizer
        self._speller = Speller(tokenizer)
        self._fingerprint = fingerprint
        self._shelf = shelf
        self._limits = limits or Limits()
        # vLLM always writes, also where a text is only judged: one position is kept for that token.
        room = min(encoder.max_tokens, llm.vllm_config.model_config.max_model_len - 1)
        self._reader = TextReader(encoder, tokenizer, max_tokens=room)
        self._places = Capacity(self._limits.waiting)
        self._is_open = False

    @property
    def model(self) -> str:
        """The name that requests give as ``model``."""
        return self._name

    @property
    def probes(self) -> Sequence[Probe]:
        """Every loaded probe."""
        return self._exchange.probes

    @property
    def max_tokens(self) -> int:
        """The longest input that the model reads."""
        return self._reader.max_tokens

    @property
    def load(self) -> Load:
        """The requests in it now; one waits until its prompt has been read."""
        return self._places.load

    @property
    def is_ready(self) -> bool:
        """Whether requests are accepted."""
        return self._is_open and self._exchange.is_whole and not self._llm.errored

    async def start(self) -> None:
        """Begins to accept requests."""
        self._is_open = True

    async def close(self) -> None:
        """Ends vLLM's processes."""
        self._is_open = False
        await asyncio.to_thread(self._llm.shutdown)
        self._shelf.close()

    async def replace_probes(self, probes: Sequence[Probe]) -> None:
        """Serves these probes from now on, once each has given a verdict on a short text.

        Waits until the requests in the engine are done; new ones wait meanwhile (``settled``).

        Raises:
            SidelightError: One cannot be served, or the engine has several pipeline stages or
                data-parallel ranks or is on a GPU; the old probes stay.
        """
        require_same_model(probes, self._fingerprint)
        await self._exchange.replace(probes, try_out=lambda: self.check(self._reader.read(WARM_UP)))

    async def settled(self) -> None:
        """Waits while probes are being replaced."""
        await self._exchange.settled()

    async def memory_share(self) -> float:
        """Memory of the probes' columns over that of keys and values, in the first worker."""
        columns, cache = (await self._llm.collective_rpc("sidelight_bytes"))[0]
        return columns / cache

    async def tokenize(self, text: Conversation) -> Tokens:
        """The tokens that ``generate``, or for a text with a response ``judge``, would read."""
        return await asyncio.to_thread(self._reader.tokens, text)

    def generate(
        self,
        messages: Conversation,
        sampling: Sampling,
        *,
        watch: Collection[str] = (),
        admits: Admission = admit_all,
    ) -> AsyncGenerator[Event, None]:
        """``PromptJudged``, any number of ``TextDelta``, ``Finished``; closing it cancels.

        vLLM draws the first token in the step that gives the verdicts; where ``admits`` says no,
        nobody sees it.
        """
        probes = self._exchange.probes
        require_watchable(watch, probes)
        is_judged = can_judge(probes, messages)
        admission = admits if is_judged else unjudged_admission(admits)
        names, likelihoods = Names.of(probes), self._likelihoods(sampling.logprobs)
        request = WrittenText(self, names, frozenset(watch), admission, likelihoods)
        events = self._written(messages, sampling, request, probes)
        return events if is_judged else without_verdicts(events)

    def _likelihoods(self, count: int | None) -> Likelihoods | None:
        return (
            None if count is None else Likelihoods(Trail(self._speller), self._decode, count=count)
        )

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    async def _written(
        self,
        messages: Conversation,
        sampling: Sampling,
        request: WrittenText,
        probes: tuple[Probe, ...],
    ) -> AsyncGenerator[Event, None]:
        require_drawable(sampling)
        prompt = await asyncio.to_thread(self._encoder.encode, messages)
        params = sampling_params(sampling, self._reader.room(prompt, sampling.max_tokens), prompt)
        with self._places.taken(1) as (place,):
            async with self._exchange.passing(probes):
                outputs = self._places.followed(place, self.outputs(prompt, params))
                async with aclosing(request.events(prompt, outputs)) as events:
                    async for event in events:
                        yield event

    def judge(
        self, conversations: Sequence[Sequence[Message]]
    ) -> Coroutine[Any, Any, list[PromptJudged]]:
        """The verdicts on each conversation, from one pass each."""
        return self._judge(conversations, self._exchange.probes)

    async def _judge(
        self, conversations: Sequence[Sequence[Message]], probes: tuple[Probe, ...]
    ) -> list[PromptJudged]:
        prompts = await asyncio.to_thread(lambda: [self._reader.read(c) for c in conversations])
        with self._places.taken(len(prompts)) as places:
            async with self._exchange.passing(probes):
                judged = await self._check_all(prompts, places)
        names = Names.of(probes)
        return [
            _judged(prompt, own.of(names.all if has_response(turns) else names.early))
            for turns, prompt, own in zip(conversations, prompts, judged, strict=True)
        ]

    async def _check_all(
        self, prompts: Sequence[EncodedPrompt], places: Sequence[Place]
    ) -> list[Judgement]:
        """In their order; only some of a long list are in vLLM at once, for others to get in."""
        together = asyncio.Semaphore(self._limits.running)

        async def check(prompt: EncodedPrompt, place: Place) -> Judgement:
            async with together:
                return await _last(self._places.followed(place, self._checked(prompt)))

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(check(*each)) for each in zip(prompts, places, strict=True)
                ]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def check(self, prompt: EncodedPrompt) -> Judgement:
        """What all probes say of these tokens, as a part of a request that has its place."""
        return await _last(self._checked(prompt))

    def _checked(self, prompt: EncodedPrompt) -> AsyncGenerator[RequestsOutput, None]:
        """The one token that vLLM must write of a text that is only judged."""
        self._reader.require_fitting(prompt)
        return self.outputs(prompt, sampling_params(Sampling(temperature=0.0), 1, prompt))

    async def outputs(
        self, prompt: EncodedPrompt, params: Any
    ) -> AsyncGenerator[RequestsOutput, None]:
        """VLLM's outputs of one request.

        Raises:
            EngineUnavailableError: vLLM has stopped.
            GenerationError: It gave up this request.
        """
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        if not self.is_ready:
            raise EngineUnavailableError("The engine is not running. Try again when /ready is 200.")
        tokens = {"prompt_token_ids": list(prompt.token_ids)}
        request_id, said = uuid.uuid4().hex, deque[Said]()
        try:
            with self._hearing.of(request_id, said.append):
                async with aclosing(self._llm.generate(tokens, params, request_id)) as outputs:
                    async for output in outputs:
                        (text,) = output.outputs
                        yield RequestsOutput(text, _steps(said, len(text.token_ids)))
        except EngineDeadError as error:
            raise EngineUnavailableError(
                "vLLM has stopped; its log says why. Start the server again."
            ) from error
        except EngineGenerateError as error:
            raise GenerationError("vLLM gave up this request; its log says why.") from error


def _steps(said: deque[Said], tokens: int) -> tuple[Said, ...]:
    """Takes the steps that wrote these tokens: one at least, which may have written none."""
    steps = [said.popleft()]
    while sum(step.tokens for step in steps) < tokens:
        steps.append(said.popleft())
    return tuple(steps)


async def _last(outputs: AsyncGenerator[RequestsOutput, None]) -> Judgement:
    judged = Judgement()
    async with aclosing(outputs):
        async for output in outputs:
            judged = judgement(output.steps[-1].params)
    return judged


def _judged(prompt: EncodedPrompt, judged: Judgement) -> PromptJudged:
    return PromptJudged(judged.verdicts, judged.failed, tokens=len(prompt))


# pyright: reportMissingImports=false


# Options of vLLM's that are no user's, with what to do instead; any command may meet them.
_SET_HERE = {
    "model": "Give --model instead.",
    "dtype": "Give --dtype instead.",
    "additional_config": "Leave it out; it carries what the plugin is told.",
    "disable_log_stats": "Leave it out; a server has its figures at /metrics.",
}


def load_vllm_engine(
    model: str,
    probes: Sequence[Probe],
    *,
    dtype: str = "auto",
    limits: Limits | None = None,
    options: Mapping[str, Any] | None = None,
) -> VllmEngine:
    """A running engine.

    Args:
        model: ``smollm2``, a folder, or a hub id.
        probes: Probes trained on it.
        dtype: As vLLM takes it.
        limits: As for ``VllmEngine``.
        options: Fields of vLLM's ``AsyncEngineArgs``.

    Raises:
        SidelightError: vLLM is not installed, an option is unknown, a probe belongs to another
            model or reads another format than the others, or a feature is in use that the plugin
            does not support.
    """
    args_type, engine_type = _vllm()
    # Loaded for who it is and how it reads text; the weights that serve are vLLM's own.
    backbone = load_backbone(model, device="cpu", prompt_format=common_format(probes))
    path = backbone.model.config._name_or_path  # pyright: ignore[reportPrivateUsage]
    encoder, tokenizer, fingerprint = backbone.encoder, backbone.tokenizer, backbone.fingerprint
    del backbone
    require_same_model(probes, fingerprint)
    shelf = ProbeFolder()
    named = {"probes": shelf.put(probes), "fingerprint": asdict(fingerprint)}
    given = {"max_model_len": encoder.max_tokens, **(options or {})}
    require_options(given, args_type)
    arguments = args_type(
        model=path,
        dtype=dtype,
        disable_log_stats=True,
        additional_config={KEY: named},
        **given,
    )
    try:
        llm = engine_type.from_engine_args(arguments)
    except TypeError as error:
        # vLLM compares numbers with whatever it was given.
        raise SidelightError(
            f"vLLM cannot work with these options ({error}): {given}. See to their types."
        ) from error
    return VllmEngine(
        llm,
        probes,
        name=model,
        encoder=encoder,
        tokenizer=tokenizer,
        fingerprint=fingerprint,
        shelf=shelf,
        limits=limits,
    )


def require_options(given: Mapping[str, Any], args_type: Any) -> None:
    """Checks that these are fields of vLLM's arguments, and none that Sidelight sets.

    Raises:
        SidelightError: One is not; names or Sidelight's own option are proposed.
    """
    known = args_type.__dataclass_fields__
    for name in given:
        if name in _SET_HERE:
            raise SidelightError(f"vLLM's option '{name}' is set by Sidelight. {_SET_HERE[name]}")
        if name not in known:
            raise SidelightError(f"vLLM has no option '{name}'.{did_you_mean(name, known)}")


def require_vllm() -> None:
    """Checks that vLLM can be imported.

    Raises:
        SidelightError: It is not installed.
    """
    # What a command prints is for its user.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    try:
        import vllm.engine.arg_utils  # noqa: F401 # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise SidelightError(
            "vLLM is not installed in this environment. docs/vllm.md says how; or use "
            "--engine transformers."
        ) from error


def _vllm() -> tuple[Any, Any]:
    require_vllm()
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    return AsyncEngineArgs, AsyncLLM
