# pyright: reportMissingImports=false
"""Verdicts in the chat answers of vLLM's own server (``vllm.endpoint_plugins``).

vLLM loads it where ``VLLM_PLUGINS`` names ``sidelight``. Requests are described on their way in,
and verdicts are put into the answers on their way out (``rewriting``). No route is added.
"""

import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from transformers import AutoTokenizer

from sidelight.artifact import load_probe
from sidelight.probe import common_format
from sidelight.prompts import PromptEncoder
from sidelight.vllm_plugin.hearing import Hearing
from sidelight.vllm_plugin.params import KEY
from sidelight.vllm_plugin.rewriting import Described, ProbeMiddleware, Report, current_report
from sidelight.vllm_plugin.surface import served_by


class ProbeEndpoint:
    """What vLLM asks of an endpoint plugin."""

    name = KEY
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._described = Described()

    def attach_router(self, app: Any) -> None:
        """Stands inside vLLM's own authentication."""
        app.add_middleware(ProbeMiddleware, described=self._described)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Learns the model's chat template, and listens to what the engine says of each request."""
        if engine_client is None:
            return
        served = served_by(engine_client.vllm_config)
        if served is None:
            return
        model = engine_client.model_config
        self._described.encoder = PromptEncoder(
            AutoTokenizer.from_pretrained(model.tokenizer),
            prompt_format=common_format(map(load_probe, served.folders)) or "chat",
            max_tokens=model.max_model_len,
        )
        hearing = Hearing(engine_client.output_processor)
        engine_client.generate = _listened(engine_client.generate, hearing)


def _listened(
    generate: Callable[..., AsyncGenerator[Any, None]], hearing: Hearing
) -> Callable[..., AsyncGenerator[Any, None]]:
    """The engine's outputs, what it says noted for the HTTP request that they belong to."""

    async def outputs(
        prompt: Any, params: Any, request_id: str, **options: Any
    ) -> AsyncGenerator[Any, None]:
        report = current_report() or Report()
        report.texts = params.n
        # Clients may name their requests, and two may choose the same name.
        own_id = f"{request_id}-{uuid.uuid4().hex}"
        with hearing.of(own_id, report.take):
            async with aclosing(generate(prompt, params, own_id, **options)) as written:
                async for output in written:
                    yield output

    return outputs
