"""The rows of the latency table, and the prompts and untrained probes that they run on."""

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import BertConfig, BertForSequenceClassification

from sidelight.backbone import TransformersBackbone
from sidelight.bank import Panel
from sidelight.calibration import Calibration
from sidelight.data.examples import Example
from sidelight.engines.decoder import Decoder
from sidelight.errors import ContextLengthError
from sidelight.fingerprint import Fingerprint
from sidelight.mechanisms import DEFAULT_MECHANISM
from sidelight.mechanisms.base import (
    Geometry,
    build_mechanism,
    mechanism_names,
    mechanism_spec,
)
from sidelight.probe import Probe
from sidelight.prompts import EncodedPrompt, Part, PromptFormat, Reads
from sidelight.standardisation import Standardisation
from sidelight.types import Judgement, MechanismSpec, Task, Verdict

# How verdicts are made: in the LLM's own pass, from its kept hidden states, or by a second model.
Kind = Literal["one pass", "naive", "cascade"]
Batch = Sequence[EncodedPrompt]

BANK_SIZE = 10
# Pairs of tokens in a batch, B T^2. Dense attention holds a score of each pair, layer and head:
# this many take a few gigabytes. 16 texts of 512 tokens, or 1 of 2,048, are just within.
_MOST_DENSE_PAIRS = 2**22
# The sizes of MiniLM-L6 (Wang et al. 2020), which the usual small text classifiers share.
_MINILM = BertConfig(
    vocab_size=30522,
    hidden_size=384,
    num_hidden_layers=6,
    num_attention_heads=12,
    intermediate_size=1536,
    max_position_embeddings=512,
)
_TASK = Task("binary", ("no", "yes"))


def untrained_probe(
    who: Fingerprint,
    name: str,
    *,
    prompt_format: PromptFormat = "chat",
    spec: MechanismSpec | None = None,
    reads: Reads | None = None,
    seed: int = 0,
) -> Probe:
    """A binary probe with random weights, which costs as much as a trained one."""
    geometry = Geometry(layers=who.layers, width=who.width, outputs=_TASK.outputs)
    spec = spec or mechanism_spec(DEFAULT_MECHANISM)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        mechanism = build_mechanism(spec, geometry).eval().requires_grad_(False)
        for parameter in mechanism.parameters():
            # Parameters that start at zero would hide a wrong verdict.
            parameter.normal_(std=who.width**-0.5)
    return Probe(
        name=name,
        task=_TASK,
        reads=reads or Reads(),
        prompt_format=prompt_format,
        spec=spec,
        mechanism=mechanism,
        standardisation=Standardisation.identity(geometry),
        calibration=Calibration("none", _TASK.kind, (1.0,), (0.0,)),
        thresholds=(0.5,),
        fingerprint=who,
    )


@dataclass(frozen=True)
class Load:
    """Prompts, run batch by batch; the last batch may be smaller."""

    title: str
    batch_size: int
    batches: tuple[tuple[EncodedPrompt, ...], ...]

    @property
    def texts(self) -> int:
        return sum(map(len, self.batches))

    @property
    def mean_tokens(self) -> float:
        return sum(len(prompt) for batch in self.batches for prompt in batch) / self.texts


def random_loads(
    backbone: TransformersBackbone, lengths: Sequence[int], *, batch_sizes: Sequence[int]
) -> list[Load]:
    """One batch of random token ids for each size and length, all prompts of the same length.

    Raises:
        ContextLengthError: The backbone cannot read prompts of a length.
    """
    limit = backbone.encoder.max_tokens
    if lengths and max(lengths) > limit:
        raise ContextLengthError(
            f"Got prompts of {max(lengths)} tokens, but {backbone.name} reads up to {limit}. "
            "Choose shorter ones ('tokens' in the recipe's [latency])."
        )
    vocabulary = backbone.model.config.get_text_config().vocab_size
    loads: list[Load] = []
    for size, length in product(batch_sizes, lengths):
        ids = np.random.default_rng(0).integers(vocabulary, size=(size, length)).tolist()
        batch = tuple(EncodedPrompt(tuple(row), (Part.PROMPT,) * length) for row in ids)
        loads.append(Load(f"{length} tokens", size, (batch,)))
    return loads


def text_loads(
    backbone: TransformersBackbone,
    examples: Sequence[Example],
    *,
    batch_sizes: Sequence[int],
    max_tokens: int,
    title: str,
) -> list[Load]:
    """The texts in their order, not sorted by length, as a server meets them."""
    limit = min(max_tokens, backbone.encoder.max_tokens)
    prompts = [
        backbone.encoder.encode_any_length(item.messages, item.response).shortened(limit)
        for item in examples
    ]
    loads: list[Load] = []
    for size in batch_sizes:
        batches = [tuple(prompts[at : at + size]) for at in range(0, len(prompts), size)]
        loads.append(Load(f"{len(prompts)} {title}", size, tuple(batches)))
    return loads


class Answer(NamedTuple):
    """The LLM's next token for each prompt, and the probes' verdicts on it.

    Both are on the host, so the work is done when the run returns.
    """

    tokens: tuple[int, ...]
    verdicts: tuple[tuple[Verdict, ...], ...]


@dataclass(frozen=True)
class Subject:
    """A row of the table: a program that reads a batch and writes one token for each prompt.

    ``weights_bytes`` counts all weights that must be resident. Batches of more than ``most_pairs``
    pairs of tokens, B T^2, do not fit a usual machine and get no row.
    """

    name: str
    kind: Kind
    weights_bytes: int
    run: Callable[[Batch], Answer]
    most_pairs: int | float = math.inf

    def accepts(self, load: Load) -> bool:
        return all(
            len(batch) * max(map(len, batch)) ** 2 <= self.most_pairs for batch in load.batches
        )


def served(name: str, backbone: TransformersBackbone, probes: Sequence[Probe] = ()) -> Subject:
    """The engine's prefill of a batch of requests with probes in the same pass, and a greedy token.

    Without probes, this is the row that all others are compared with.
    """
    decoder = Decoder(backbone)
    panel = Panel(probes, device=backbone.device)

    def run(batch: Batch) -> Answer:
        tap = panel.prompt_tap()
        ((logits, cached),) = decoder.read_prompts(batch, tap)
        judgements = [Judgement()] * len(batch)
        if tap:
            parts = [bytes(prompt.parts) for prompt in batch]
            is_plain = [prompt.is_plain for prompt in batch]
            judgements = panel.judge_prompts(tap.projected()[cached.mask], parts, is_plain)
        tokens = tuple(logits.argmax(1).tolist())
        return Answer(tokens, tuple(judgement.verdicts for judgement in judgements))

    size = _bytes(backbone.model)
    for probe in probes:
        projection = probe.projection()  # the bank's copy
        size += _bytes(probe.mechanism) + projection.weight.nbytes + projection.shift.nbytes
    return Subject(name, "one pass", size, run)


def naive(name: str, backbone: TransformersBackbone, probe: Probe) -> Subject:
    """The LLM with ``output_hidden_states=True``, then the mechanism's dense form.

    Every hidden state is kept, stacked and read again, as when probes are thought to be expensive.
    The mechanism runs in the LLM's dtype, the faster choice; serving uses float32. The
    probe's standardisation must be the identity.
    """
    mechanism = deepcopy(probe.mechanism).to(backbone.device, backbone.model.dtype)

    @torch.inference_mode()
    def run(batch: Batch) -> Answer:
        token_ids, mask = backbone.pad(batch, side="left")
        output = backbone.model(
            input_ids=token_ids,
            attention_mask=mask.long(),
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            output_hidden_states=True,
            use_cache=True,
            logits_to_keep=backbone.last_position,
        )
        reads = [prompt.mask(probe.reads) for prompt in batch]
        is_read = pad_sequence(reads, batch_first=True, padding_side="left").to(backbone.device)
        hidden = torch.stack(output.hidden_states, 1)  # (B, L, T, D)
        logits = mechanism(hidden, is_read)
        verdicts = tuple((probe.verdict(row),) for row in logits.double().cpu().numpy())
        return Answer(tuple(output.logits[:, -1].argmax(1).tolist()), verdicts)

    size = _bytes(backbone.model) + _bytes(mechanism)
    return Subject(name, "naive", size, run, most_pairs=_MOST_DENSE_PAIRS)


def encoder_first(name: str, llm: Subject, *, device: torch.device, dtype: torch.dtype) -> Subject:
    """An encoder of MiniLM's size classifies the prompts, then the LLM answers them.

    Random weights do not change the encoder's speed. It reads the LLM's token ids modulo its own
    vocabulary, so both read the same number of tokens. A text longer than its 512 positions is read
    in windows.
    """
    with torch.random.fork_rng():
        encoder = BertForSequenceClassification(_MINILM).eval().requires_grad_(False)
    encoder.to(dtype).to(device)  # pyright: ignore[reportArgumentType]

    @torch.inference_mode()
    def run(batch: Batch) -> Answer:
        ids = [torch.tensor(prompt.token_ids) % _MINILM.vocab_size for prompt in batch]
        windows = [part for own in ids for part in own.split(_MINILM.max_position_embeddings)]
        mask = pad_sequence([torch.ones_like(window) for window in windows], batch_first=True)
        output = encoder(
            input_ids=pad_sequence(windows, batch_first=True).to(device),
            attention_mask=mask.to(device),
        )
        # Its classes are read back before the LLM begins.
        output.logits.argmax(1).tolist()
        return llm.run(batch)

    return Subject(name, "cascade", _bytes(encoder) + llm.weights_bytes, run)


def guard_first(name: str, guard: Subject, llm: Subject) -> Subject:
    """A generative guard writes its one-token verdict, then the LLM answers.

    If one model stands for both, its weights count twice.
    """

    def run(batch: Batch) -> Answer:
        guard.run(batch)
        return llm.run(batch)

    return Subject(name, "cascade", guard.weights_bytes + llm.weights_bytes, run)


def default_subjects(backbone: TransformersBackbone) -> list[Subject]:
    """The LLM alone, with each mechanism, with ten probes, and what probes replace."""
    probe_of = partial(
        untrained_probe, backbone.fingerprint, prompt_format=backbone.encoder.prompt_format
    )
    probes = [probe_of(name, spec=mechanism_spec(name)) for name in mechanism_names()]
    bank = [probe_of(f"probe {i}", seed=i) for i in range(BANK_SIZE)]
    llm, device, dtype = served("LLM", backbone), backbone.device, backbone.model.dtype
    return [
        llm,
        *(served(f"+ {probe.name}", backbone, [probe]) for probe in probes),
        served(f"+ {BANK_SIZE} probes", backbone, bank),
        *(naive(f"+ {probe.name}, naive", backbone, probe) for probe in probes),
        encoder_first("MiniLM, then LLM", llm, device=device, dtype=dtype),
        guard_first("guard of its size, then LLM", llm, llm),
    ]


def _bytes(module: nn.Module) -> int:
    """Size of the parameters and buffers; tied ones count once."""
    return sum(part.nbytes for part in (*module.parameters(), *module.buffers()))
