"""The prompts of a cell of the table, in batches.

What is measured: anything that answers a batch of prompts with one new token each.

The same probe without a tap: every hidden state is kept, stacked, and read afterwards.

This is what ``output_hidden_states=True`` invites, and why a probe is thought to be expensive: the
whole tensor of layers, tokens and width is written to memory and read again.

The LLM as it is served: prefill and first token, its probes in the same pass.

Two models one after the other: what a probe replaces.

The rows of the table on one backbone.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import BertConfig, BertForSequenceClassification

from sidelight.backbone import TransformersBackbone
from sidelight.bank import Panel
from sidelight.engines.batch import Stopwatch
from sidelight.engines.decoder import Decoder
from sidelight.errors import ContextLengthError
from sidelight.mechanisms.base import mechanism_names, mechanism_spec
from sidelight.probe import Probe
from sidelight.prompts import EncodedPrompt, Part
from sidelight.types import Judgement, Verdict
from sidelight_lab.bench.timing import untrained_probe

Prompts = tuple[EncodedPrompt, ...]


@dataclass(frozen=True)
class Load:
    """Prompts that are run batch by batch.

    Attributes:
        title: What they are, for example ``512 tokens``.
        batch_size: Prompts of a batch; the last one may be smaller.
        batches: The prompts.
    """

    title: str
    batch_size: int
    batches: tuple[Prompts, ...]

    @property
    def texts(self) -> int:
        """Prompts in all."""
        return sum(map(len, self.batches))

    @property
    def mean_tokens(self) -> float:
        """Of a prompt."""
        return sum(len(prompt) for batch in self.batches for prompt in batch) / self.texts


def synthetic_load(
    backbone: TransformersBackbone, *, batch_size: int, tokens: int, seed: int = 0
) -> Load:
    """One batch of random token ids, all prompts of the same length.

    Args:
        backbone: Gives the vocabulary and the longest prompt.
        batch_size: Prompts.
        tokens: Of each prompt.
        seed: Of the ids.

    Raises:
        ContextLengthError: Longer than the backbone reads.
    """
    limit = backbone.encoder.max_tokens
    if tokens > limit:
        raise ContextLengthError(
            f"A prompt of {tokens} tokens is longer than {backbone.name} reads ({limit}). "
            f"Ask for up to {limit} (--lengths, or 'tokens' in a recipe's [latency])."
        )
    vocabulary = backbone.model.config.get_text_config().vocab_size
    ids = np.random.default_rng(seed).integers(vocabulary, size=(batch_size, tokens))
    parts = (Part.PROMPT,) * tokens
    batch = tuple(EncodedPrompt(tuple(row), parts) for row in ids.tolist())
    return Load(f"{tokens} tokens", batch_size, (batch,))


def prompt_load(prompts: Sequence[EncodedPrompt], *, batch_size: int, title: str) -> Load:
    """Prompts in the given order, as a server meets them: a batch is padded to its longest.

    Args:
        prompts: One or more.
        batch_size: Prompts of a batch.
        title: What they are.
    """
    starts = range(0, len(prompts), batch_size)
    batches = tuple(tuple(prompts[start : start + batch_size]) for start in starts)
    return Load(title, batch_size, batches)


Kind = Literal["one pass", "naive", "cascade"]


@dataclass(frozen=True)
class Answer:
    """What a run gave. All of it is on the host, so the work was done when the run returned.

    Attributes:
        tokens: The LLM's next token for each prompt.
        verdicts: For each prompt, what the probes say.
    """

    tokens: tuple[int, ...]
    verdicts: tuple[tuple[Verdict, ...], ...]


@runtime_checkable
class Subject(Protocol):
    """One row of the table."""

    @property
    def name(self) -> str:
        """What the table calls it."""
        ...

    @property
    def kind(self) -> Kind:
        """How it classifies: in the LLM's pass, from states kept by it, or by a second model."""
        ...

    @property
    def weights_bytes(self) -> int:
        """All weights that must be resident to run it."""
        ...

    def accepts(self, batch: Sequence[EncodedPrompt]) -> bool:
        """Whether it can run this batch on a usual machine; if not, the row is left out."""
        ...

    def run(self, batch: Sequence[EncodedPrompt]) -> Answer:
        """Reads the prompts and writes one token for each."""
        ...


def module_bytes(module: nn.Module) -> int:
    """Size of its parameters and buffers; what is tied counts once."""
    parts = [*module.parameters(), *module.buffers()]
    return sum(part.nbytes for part in parts)


# Pairs of tokens in a batch, B T^2. The dense attention holds a score of each, layer and head, so
# this many take a few gigabytes; 16 texts of 512 tokens and 1 of 2,048 are just within.
_MOST_PAIRS = 2**22


class Naive:
    """The LLM with ``output_hidden_states=True``, then the mechanism's dense form.

    The mechanism runs in the LLM's dtype, which is the faster choice; serving uses float32.

    Args:
        name: Of the row.
        backbone: The LLM.
        probe: What judges the prompts; its standardisation is the identity.
    """

    kind: Kind = "naive"

    def __init__(self, name: str, backbone: TransformersBackbone, probe: Probe):
        self.name = name
        self._backbone = backbone
        self._probe = probe
        self._mechanism = deepcopy(probe.mechanism).to(backbone.device, backbone.model.dtype)
        self.weights_bytes = module_bytes(backbone.model) + module_bytes(self._mechanism)

    def accepts(self, batch: Sequence[EncodedPrompt]) -> bool:
        """Up to the size at which the dense forms take a few gigabytes."""
        return len(batch) * max(map(len, batch)) ** 2 <= _MOST_PAIRS

    @torch.inference_mode()
    def run(self, batch: Sequence[EncodedPrompt]) -> Answer:
        """One forward pass, then the dense form on all that it kept."""
        mask = self._padded([torch.ones(len(prompt), dtype=torch.bool) for prompt in batch])
        output = self._backbone.model(
            input_ids=self._padded([torch.tensor(prompt.token_ids) for prompt in batch]),
            attention_mask=mask.long(),
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            output_hidden_states=True,
            use_cache=True,
            logits_to_keep=self._backbone.last_position,
        )
        hidden = torch.stack(output.hidden_states, 1)  # (B, L, T, D)
        read = self._padded([prompt.mask(self._probe.reads) for prompt in batch])
        tokens = tuple(output.logits[:, -1].argmax(1).tolist())
        return Answer(tokens, self._judge(hidden, read))

    def _judge(
        self, hidden: Float[Tensor, "batch layer token width"], read: Bool[Tensor, "batch token"]
    ) -> tuple[tuple[Verdict, ...], ...]:
        logits = self._mechanism(hidden, read).double().cpu().numpy()
        return tuple((self._probe.verdict(row),) for row in logits)

    def _padded(self, rows: list[Tensor]) -> Tensor:
        """On the left, as served."""
        return pad_sequence(rows, batch_first=True, padding_side="left").to(self._backbone.device)


class Served:
    """What the engine's prefill does with a batch of requests, and the greedy next token.

    Args:
        name: Of the row.
        backbone: The LLM.
        probes: What judges the prompts; none makes this the base that others are compared with.
    """

    kind: Kind = "one pass"

    def __init__(self, name: str, backbone: TransformersBackbone, probes: Sequence[Probe] = ()):
        self.name = name
        self.weights_bytes = module_bytes(backbone.model) + sum(map(_probe_bytes, probes))
        self._decoder = Decoder(backbone)
        self._panel = Panel(probes, device=backbone.device)

    def accepts(self, batch: Sequence[EncodedPrompt]) -> bool:
        """Always."""
        return True

    def run(self, batch: Sequence[EncodedPrompt]) -> Answer:
        """One forward pass."""
        tap = self._panel.prompt_tap()
        logits, cached = self._decoder.read_prompts(batch, Stopwatch().around(tap))
        judgements = [Judgement()] * len(batch)
        if tap:
            parts = [bytes(prompt.parts) for prompt in batch]
            judgements = self._panel.judge_prompts(tap.projected()[cached.mask], parts)
        tokens = tuple(logits.argmax(1).tolist())
        return Answer(tokens, tuple(judgement.verdicts for judgement in judgements))


def _probe_bytes(probe: Probe) -> int:
    """The mechanism, and its projection in the bank."""
    projection = probe.projection()
    served = projection.weight.nbytes + projection.shift.nbytes
    return module_bytes(probe.mechanism) + served


# The sizes of MiniLM-L6 (Wang et al. 2020), which the usual small text classifiers share.
_MINILM = BertConfig(
    vocab_size=30522,
    hidden_size=384,
    num_hidden_layers=6,
    num_attention_heads=12,
    intermediate_size=1536,
    max_position_embeddings=512,
)


class EncoderFirst:
    """An encoder of MiniLM's size classifies the prompts, then the LLM answers them.

    The encoder's weights are random, which does not change its speed. It reads the LLM's token ids
    folded into its vocabulary, so both models read the same number of tokens; a text longer than
    its 512 positions is read in windows.

    Args:
        name: Of the row.
        llm: What answers.
        device: Of the encoder.
        dtype: Of the encoder.
    """

    kind: Kind = "cascade"

    def __init__(self, name: str, llm: Subject, *, device: torch.device, dtype: torch.dtype):
        self.name = name
        self._llm = llm
        self._device = device
        with torch.random.fork_rng():
            encoder = BertForSequenceClassification(_MINILM).eval().requires_grad_(False)
        encoder.to(dtype).to(device)  # pyright: ignore[reportArgumentType]
        self._encoder = encoder
        self.weights_bytes = module_bytes(encoder) + llm.weights_bytes

    def accepts(self, batch: Sequence[EncodedPrompt]) -> bool:
        """Whatever the LLM does."""
        return self._llm.accepts(batch)

    def run(self, batch: Sequence[EncodedPrompt]) -> Answer:
        """The class of each prompt, read back before the LLM begins."""
        self._classify(batch)
        return self._llm.run(batch)

    @torch.inference_mode()
    def _classify(self, batch: Sequence[EncodedPrompt]) -> list[int]:
        windows = [window for prompt in batch for window in _windows(prompt)]
        mask = pad_sequence([torch.ones_like(window) for window in windows], batch_first=True)
        token_ids = pad_sequence(windows, batch_first=True)
        output = self._encoder(
            input_ids=token_ids.to(self._device), attention_mask=mask.to(self._device)
        )
        return output.logits.argmax(1).tolist()


def _windows(prompt: EncodedPrompt) -> tuple[Int[Tensor, " token"], ...]:
    token_ids = torch.tensor(prompt.token_ids) % _MINILM.vocab_size
    return token_ids.split(_MINILM.max_position_embeddings)


class GuardFirst:
    """A generative guard says its one-token verdict, then the LLM answers.

    Args:
        name: Of the row.
        guard: What judges; where one model stands for both, its weights count twice.
        llm: What answers.
    """

    kind: Kind = "cascade"

    def __init__(self, name: str, guard: Subject, llm: Subject):
        self.name = name
        self._guard = guard
        self._llm = llm
        self.weights_bytes = guard.weights_bytes + llm.weights_bytes

    def accepts(self, batch: Sequence[EncodedPrompt]) -> bool:
        """Whatever both do."""
        return self._guard.accepts(batch) and self._llm.accepts(batch)

    def run(self, batch: Sequence[EncodedPrompt]) -> Answer:
        """One token of each model, the guard's read back before the LLM begins."""
        self._guard.run(batch)
        return self._llm.run(batch)


BANK_SIZE = 10


def default_subjects(
    backbone: TransformersBackbone,
    *,
    mechanisms: Sequence[str] | None = None,
    cascades: bool = True,
) -> tuple[Subject, ...]:
    """The LLM alone, with each mechanism, with ten probes, and what probes replace.

    Args:
        backbone: The LLM.
        mechanisms: Names; None: all that are registered.
        cascades: Whether to include the two-model cascades.

    Raises:
        SidelightError: An unknown mechanism.
    """
    names = mechanism_names() if mechanisms is None else mechanisms
    probes = [untrained_probe(backbone, name, spec=mechanism_spec(name)) for name in names]
    bank = tuple(untrained_probe(backbone, f"probe {i}", seed=i) for i in range(BANK_SIZE))
    llm = Served("LLM", backbone)
    return (
        llm,
        *(Served(f"+ {probe.name}", backbone, (probe,)) for probe in probes),
        Served(f"+ {BANK_SIZE} probes", backbone, bank),
        *(Naive(f"+ {probe.name}, naive", backbone, probe) for probe in probes),
        *(_cascades(llm, backbone) if cascades else ()),
    )


def _cascades(llm: Subject, backbone: TransformersBackbone) -> tuple[Subject, ...]:
    dtype = backbone.model.dtype
    return (
        EncoderFirst("MiniLM, then LLM", llm, device=backbone.device, dtype=dtype),
        GuardFirst("guard of its size, then LLM", llm, llm),
    )
