"""Time to one new token: the LLM alone, with probes, and with the systems that they replace."""

import asyncio
import math
from collections.abc import Callable, Generator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from time import perf_counter, process_time
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import BertConfig, BertForSequenceClassification

from sidelight.engines.base import Engine
from sidelight.engines.transformers.backbone import TransformersBackbone
from sidelight.engines.transformers.engine import TransformersDecoder, TransformersEngine
from sidelight.errors import ContextLengthError
from sidelight.models.conversation import EncodedPrompt, Reads, TokenRole
from sidelight.probes.bank import ProbeBanks
from sidelight.probes.mechanisms.base import mechanism_names, mechanism_spec
from sidelight.probes.probe import Probe
from sidelight.progress import progress
from sidelight.types import Verdict, Verdicts
from sidelight_lab.bench.measurement import (
    Range,
    Record,
    conditions,
    table,
    untrained_guards,
    untrained_probe,
    write_answers,
)

T = TypeVar("T")
Batch = Sequence[EncodedPrompt]

BANK_SIZE = 10
# Minimum duration of a timing in seconds, filled with several runs, so that one interrupt does not
# dominate.
SHORTEST_S = 0.2
# Maximum pairs of tokens in a batch, B T^2. Dense attention stores a score for each pair, layer and
# head, and this many take a few gigabytes; 16 texts of 512 tokens, or one of 2,048, are just within
# the limit.
_MOST_DENSE_PAIRS = 2**22
# Number of concurrent responses, and their tokens.
_TEXTS, _WRITTEN = 4, 32
# Sizes of MiniLM-L6 (Wang et al. 2020), which common small text classifiers share.
_MINILM = BertConfig(
    vocab_size=30522,
    hidden_size=384,
    num_hidden_layers=6,
    num_attention_heads=12,
    intermediate_size=1536,
    max_position_embeddings=512,
)


class Answer(NamedTuple):
    """The LLM's next token for each prompt, and the probes' verdicts on it.

    Both are on the host, so the work is done when the run returns.
    """

    tokens: tuple[int, ...]
    verdicts: tuple[tuple[Verdict, ...], ...]


@dataclass(frozen=True)
class Subject:
    """A row of the table: a program that reads a batch and generates one token per prompt.

    Batches of more than ``most_pairs`` pairs of tokens, B T^2, do not fit on a typical machine and
    get no row.
    """

    name: str
    run: Callable[[Batch], Answer]
    most_pairs: float = math.inf

    def accepts(self, batch: Batch) -> bool:
        return len(batch) * max(map(len, batch)) ** 2 <= self.most_pairs

    def seconds(self, batch: Batch) -> float:
        start, runs = perf_counter(), 0
        while not runs or perf_counter() - start < SHORTEST_S:
            self.run(batch)
            runs += 1
        return (perf_counter() - start) / runs


@dataclass(frozen=True)
class Row:
    """One subject on one batch; ``ratio`` is over the first subject's time in the same round."""

    subject: str
    batch_size: int
    tokens: int
    ms: Range
    ratio: Range


def measure_latency(
    backbone: TransformersBackbone,
    *,
    tokens: Sequence[int],
    batch_sizes: Sequence[int],
    rounds: int,
) -> Record:
    """Measure, by batch size and length, the time per prompt and its ratio to the LLM alone."""
    batches = random_batches(backbone, tokens, batch_sizes=batch_sizes)
    rows = compare_latency(all_subjects(backbone), batches, rounds=rounds)
    written = measure_writing(backbone, rounds=rounds)
    headings = ["median (range)", "ms of a prompt", f"time over that of {rows[0].subject}"]
    sections = [
        table(
            f"{size} x {length} tokens",
            headings,
            [
                [row.subject, row.ms.text(1), row.ratio.text(2)]
                for row in rows
                if (row.batch_size, row.tokens) == (size, length)
            ],
        )
        for size, length in product(batch_sizes, tokens)
    ]
    sections.append(
        table(
            f"{_TEXTS} answers of {_WRITTEN} tokens",
            ["median (range)", "CPU ms of a token", f"over that of {rows[0].subject}"],
            [[name, ms.text(2), ratio.text(3)] for name, (ms, ratio) in written.items()],
        )
    )
    results = {
        "rows": [asdict(row) for row in rows],
        "written": {
            name: {"ms": asdict(ms), "ratio": asdict(ratio)}
            for name, (ms, ratio) in written.items()
        },
    }
    where = conditions(backbone, {"rounds": rounds})
    return Record("latency", where, results, sections)


def measure_writing(
    backbone: TransformersBackbone, *, rounds: int
) -> dict[str, tuple[Range, Range]]:
    """Measure CPU milliseconds per generated token, and the ratio to the LLM alone by round.

    The rows are without probes, with a readout, and with five guards, one of which reads the
    response.
    """
    probe_of = partial(
        untrained_probe, backbone.fingerprint, prompt_format=backbone.encoder.prompt_format
    )
    guards = untrained_guards(backbone.fingerprint, prompt_format=backbone.encoder.prompt_format)
    sets: dict[str, list[Probe]] = {
        "LLM": [],
        "+ readout": [probe_of("readout")],
        "+ readout of responses": [probe_of("readout", reads=Reads("response"))],
        "+ 5 guards": guards,
    }
    values: dict[str, list[float]] = {name: [] for name in sets}

    async def write(probes: Sequence[Probe]) -> float:
        engine = TransformersEngine(backbone, probes)
        await engine.start()
        try:
            # The first token of each has the time of its prompt.
            runs = [await _write(engine, tokens) for tokens in (1, 1, _WRITTEN + 1)]
        finally:
            await engine.close()
        (_, first), (written, full) = runs[1:]
        return (full - first) / (written - _TEXTS)

    with progress("Timing answers", rounds * len(sets), unit="sets of probes") as advance:
        for number in range(rounds):
            names = [*sets]
            first = number % len(names)
            for name in names[first:] + names[:first]:
                values[name].append(asyncio.run(write(sets[name])))
                advance(1)
    base = np.array(values["LLM"])
    return {
        name: (Range.of(durations), Range.of((np.array(durations) / base).tolist()))
        for name, durations in values.items()
    }


async def _write(engine: Engine, tokens: int) -> tuple[int, float]:
    """How many tokens are written, and the CPU milliseconds of this process until then."""
    start = process_time()
    written = await write_answers(engine, _TEXTS, tokens)
    return written, 1000 * (process_time() - start)


def random_batches(
    backbone: TransformersBackbone, lengths: Sequence[int], *, batch_sizes: Sequence[int]
) -> list[Batch]:
    """One batch of random token ids for each size and length, all prompts of the same length.

    Raises:
        ContextLengthError: The backbone cannot read prompts of a length.
    """
    limit = backbone.encoder.max_tokens
    if max(lengths) > limit:
        raise ContextLengthError(
            f"Got prompts of {max(lengths)} tokens, but {backbone.name} reads up to {limit}. "
            "Choose shorter prompts with --tokens."
        )
    vocabulary = backbone.model.config.get_text_config().vocab_size
    batches: list[Batch] = []
    for size, length in product(batch_sizes, lengths):
        ids = np.random.default_rng(0).integers(vocabulary, size=(size, length)).tolist()
        batches.append([EncodedPrompt(tuple(row), (TokenRole.PROMPT,) * length) for row in ids])
    return batches


def compare_latency(
    subjects: Sequence[Subject], batches: Sequence[Batch], *, rounds: int
) -> list[Row]:
    """A row for every subject on every batch that it accepts; the first accepts every batch.

    Each round begins with a different subject, so that neither drift nor order favours any.
    """
    rows: list[Row] = []
    with progress("Timing", len(batches) * rounds, unit="rounds") as advance:
        for batch in batches:
            able = [subject for subject in subjects if subject.accepts(batch)]
            for subject in able:
                subject.run(batch)
            seconds: dict[str, list[float]] = {subject.name: [] for subject in able}
            for number in range(rounds):
                first = number % len(able)
                for subject in able[first:] + able[:first]:
                    seconds[subject.name].append(subject.seconds(batch))
                advance(1)
            base, size = np.array(seconds[able[0].name]), len(batch)
            rows += [
                Row(
                    name,
                    batch_size=size,
                    tokens=len(batch[0]),
                    ms=Range.of([1000 * durations / size for durations in times]),
                    ratio=Range.of((np.array(times) / base).tolist()),
                )
                for name, times in seconds.items()
            ]
    return rows


def all_subjects(backbone: TransformersBackbone) -> list[Subject]:
    """The LLM alone, with each mechanism, ten probes, five guards, and what probes replace."""
    probe_of = partial(
        untrained_probe, backbone.fingerprint, prompt_format=backbone.encoder.prompt_format
    )
    probes = [probe_of(name, spec=mechanism_spec(name)) for name in mechanism_names()]
    bank = [probe_of(f"probe {i}", seed=i) for i in range(BANK_SIZE)]
    guards = untrained_guards(backbone.fingerprint, prompt_format=backbone.encoder.prompt_format)
    llm = _served(backbone, [])

    def guarded(batch: Batch) -> Answer:
        """A generative guard of the LLM's size writes its one-token verdict first."""
        llm(batch)
        return llm(batch)

    return [
        Subject("LLM", llm),
        *(Subject(f"+ {probe.name}", _served(backbone, [probe])) for probe in probes),
        Subject(f"+ {BANK_SIZE} probes", _served(backbone, bank)),
        Subject("+ 5 guards", _served(backbone, guards)),
        *(
            Subject(f"+ {probe.name}, naive", _naive(backbone, probe), _MOST_DENSE_PAIRS)
            for probe in probes
        ),
        Subject("MiniLM, then LLM", _encoder_first(backbone, llm)),
        Subject("guard of its size, then LLM", guarded),
    ]


def _served(backbone: TransformersBackbone, probes: Sequence[Probe]) -> Callable[[Batch], Answer]:
    """The engine's prefill of a batch with probes in the same pass, and a greedy token."""
    decoder = TransformersDecoder(backbone)
    banks = ProbeBanks(probes, device=backbone.device)

    def run(batch: Batch) -> Answer:
        tap = banks.prompt_tap()
        logits, is_token, _ = _returned(decoder.read_prompts(batch, tap))
        text_verdicts = [Verdicts()] * len(batch)
        if tap:
            text_verdicts = banks.classify_prompts(tap.projected()[is_token], batch)
        tokens = tuple(logits.argmax(1).tolist())
        return Answer(tokens, tuple(verdicts.verdicts for verdicts in text_verdicts))

    return run


def _returned(passes: Generator[None, None, T]) -> T:
    """What is returned after passes without a wait between them."""
    while True:
        try:
            next(passes)
        except StopIteration as end:
            return end.value


def _naive(backbone: TransformersBackbone, probe: Probe) -> Callable[[Batch], Answer]:
    """The LLM with ``output_hidden_states=True``, then the mechanism's dense form.

    Every hidden state is stored, stacked and read again, as in naive implementations of probes. The
    mechanism runs in the LLM's dtype, which is faster; serving uses float32. The probe's
    standardisation must be the identity.
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

    return run


def _encoder_first(
    backbone: TransformersBackbone, llm: Callable[[Batch], Answer]
) -> Callable[[Batch], Answer]:
    """Classify the prompts with an encoder of MiniLM's size, then answer them with the LLM.

    Random weights do not change the encoder's speed. It reads the LLM's token ids modulo its own
    vocabulary, so both read the same number of tokens. A text longer than its 512 positions is read
    in windows.
    """
    device = backbone.device
    with torch.random.fork_rng():
        encoder: Any = BertForSequenceClassification(_MINILM).eval().requires_grad_(False)
    encoder.to(device, backbone.model.dtype)

    @torch.inference_mode()
    def run(batch: Batch) -> Answer:
        ids = [torch.tensor(prompt.token_ids) % _MINILM.vocab_size for prompt in batch]
        windows = [
            window
            for token_ids in ids
            for window in token_ids.split(_MINILM.max_position_embeddings)
        ]
        mask = pad_sequence([torch.ones_like(window) for window in windows], batch_first=True)
        output = encoder(
            input_ids=pad_sequence(windows, batch_first=True).to(device),
            attention_mask=mask.to(device),
        )
        # Its classes are read back before the LLM begins.
        output.logits.argmax(1).tolist()
        return llm(batch)

    return run
