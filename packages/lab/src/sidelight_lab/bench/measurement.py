"""What benches share: untrained probes, vLLM, conditions, and records as JSON and as Markdown."""

# pyright: reportMissingImports=false

import asyncio
import json
import os
import platform
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sidelight.data.spans import SpanRule
from sidelight.engines.base import Engine, Finished, Sampling
from sidelight.engines.transformers.backbone import TransformersBackbone
from sidelight.models.conversation import EncodedPrompt, Message, PromptFormat, Reads
from sidelight.models.fingerprint import Fingerprint
from sidelight.probes.bank import Bank
from sidelight.probes.card import ProbeCard
from sidelight.probes.mechanisms.base import Geometry, build_mechanism, mechanism_spec
from sidelight.probes.probe import Probe
from sidelight.probes.standardisation import Standardisation
from sidelight.states.extraction import text_logits
from sidelight.states.reader import Backbone
from sidelight.statistics.calibration import Calibration
from sidelight.storage import write_text
from sidelight.types import MechanismSpec, Task
from sidelight_lab.environment import package_versions
from sidelight_lab.tables.writing import markdown_table


@dataclass(frozen=True)
class Range:
    """Median, smallest and largest of some values."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> "Range":
        return Range(median(values), min(values), max(values))

    def text(self, digits: int = 3) -> str:
        """For example ``1.02 (0.99 to 1.20)``."""
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


def table(title: str, headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table under its title."""
    return markdown_table(title, headings, rows).strip()


def conditions(backbone: Backbone, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the figures depend on: the model, the settings, the machine, and package versions."""
    device = backbone.device
    is_gpu = device.type == "cuda"
    versions = package_versions()
    return {
        "model": backbone.name,
        "fingerprint": backbone.fingerprint.digest,
        "dtype": backbone.fingerprint.dtype,
        **settings,
        "device": torch.cuda.get_device_name(device) if is_gpu else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load before": round(os.getloadavg()[0], 2),
        **{name: versions.get(name) for name in ("torch", "transformers", "sidelight")},
    }


def untrained_probe(
    who: Fingerprint,
    name: str,
    *,
    prompt_format: PromptFormat = "chat",
    spec: MechanismSpec | None = None,
    reads: Reads | None = None,
    labels_spans: bool = False,
    seed: int = 0,
) -> Probe:
    """A binary probe with random weights, which costs as much as a trained one."""
    task = Task("binary", ("no", "yes"))
    geometry = Geometry(layers=who.layers, width=who.width, outputs=task.outputs)
    spec = spec or mechanism_spec("spans" if labels_spans else "readout")
    calibration = Calibration("none", task.kind, (1.0,), (0.0,))
    with torch.random.fork_rng(()):
        torch.manual_seed(seed)
        mechanism = build_mechanism(spec, geometry).eval().requires_grad_(False)
        for parameter in mechanism.parameters():
            # Parameters that start at zero would hide a wrong verdict.
            parameter.normal_(std=who.width**-0.5)
    card = ProbeCard(
        name=name,
        mechanism=spec,
        task=task,
        reads=reads or Reads(),
        prompt_format=prompt_format,
        calibration=calibration,
        thresholds=(0.5,),
        backbone=who,
        spans=SpanRule(calibration, (0.95,), (None,)) if labels_spans else None,
    )
    return Probe(card, mechanism, Standardisation.identity(geometry))


def untrained_guards(who: Fingerprint, *, prompt_format: PromptFormat = "chat") -> list[Probe]:
    """Five probes as `sidelight guard` makes them, with random weights.

    Three read prompts, one labels spans of prompts, and one reads responses.
    """
    probe = partial(untrained_probe, who, prompt_format=prompt_format)
    return [
        *(probe(name, seed=seed) for seed, name in enumerate(("injection", "harmful", "toxicity"))),
        probe("pii", labels_spans=True, reads=Reads(template=False)),
        probe("refusal", reads=Reads("response")),
    ]


def spread_probe(
    backbone: TransformersBackbone,
    prompts: Sequence[EncodedPrompt],
    name: str,
    *,
    is_normalised: bool = False,
    **options: Any,
) -> Probe:
    """An untrained probe whose probabilities of the prompts spread: saturated ones always agree.

    Args:
        backbone: Reads the prompts.
        prompts: Two or more.
        name: Of the probe.
        is_normalised: Whether it reads states that are divided by their root mean square.
        options: Of ``untrained_probe``.
    """
    states: list[Tensor] = []
    with backbone.tapped(lambda _layer, hidden: states.append(hidden[0].clone())):
        backbone.run([prompts[-1]])
    scaling = Standardisation.measured(torch.stack(states))
    probe = untrained_probe(backbone.fingerprint, name, **options)
    probe = replace(probe, standardisation=replace(scaling, is_normalised=is_normalised))
    (texts,) = text_logits(backbone, Bank([probe]), prompts)
    logits = np.stack([text.logits for text in texts])
    scale = 1.5 / max(1e-6, float(logits.std()))
    shift = -scale * float(logits.mean())
    calibration = Calibration("platt", "binary", (scale,), (shift,))
    rule = probe.spans and replace(probe.spans, calibration=calibration)
    return probe.changed(calibration=calibration, spans=rule)


async def write_answers(engine: Engine, texts: int, tokens: int) -> int:
    """How many tokens an engine writes of as many answers at once, of at most so many each."""
    sampling = Sampling(max_tokens=tokens, temperature=0)

    async def answer(number: int) -> int:
        question = [Message("user", f"Tell me a very long story about {number + 2} friends.")]
        events = engine.generate(question, sampling)
        return sum([e.completion_tokens async for e in events if isinstance(e, Finished)])

    return sum(await asyncio.gather(*map(answer, range(texts))))


@contextmanager
def offline_engine(
    path: str, config: Mapping[str, Any] | None, options: Mapping[str, Any], **defaults: Any
) -> Generator[Any]:
    """vLLM's ``LLM``, with the plugin in it if it is given a configuration.

    Raises:
        SidelightError: vLLM is not installed, or does not know one of the options.
    """
    from sidelight_vllm import KEY
    from sidelight_vllm.settings import require_options, require_vllm

    require_vllm()
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs

    require_options(options, EngineArgs)
    named = {} if config is None else {"additional_config": {KEY: dict(config)}}
    llm = LLM(path, **{**defaults, **options, **named})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


@dataclass(frozen=True)
class Record:
    """The outcome of a benchmark, written to ``NAME.json`` and ``NAME.md``.

    ``results`` are the other keys of the JSON; ``sections`` follow the conditions in the Markdown.
    """

    name: str
    conditions: Mapping[str, Any]
    results: Mapping[str, Any]
    sections: Sequence[str]

    def to_json(self) -> str:
        content = {"conditions": dict(self.conditions), **self.results}
        return json.dumps(content, indent=2, allow_nan=False) + "\n"

    def to_markdown(self) -> str:
        line = ", ".join(f"{name} {value}" for name, value in self.conditions.items())
        return "\n\n".join([line, *self.sections]) + "\n"

    def save(self, folder: Path) -> None:
        write_text(folder / f"{self.name}.json", self.to_json())
        write_text(folder / f"{self.name}.md", self.to_markdown())
