"""Models on disk, probes whose answers spread, and vLLM engines that serve both."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import LlamaConfig

from commands import saved
from sidelight.artifact import save_probe
from sidelight.backbone import TransformersBackbone
from sidelight.bank import Bank
from sidelight.mechanisms.base import mechanism_names
from sidelight.prompts import EncodedPrompt, Part, Reads
from sidelight.standardisation import Standardisation
from sidelight.vllm.requests import request_params
from sidelight.vllm.settings import DESCRIBED, KEY
from tiny import INTENT, TOPICS, TOXICITY, score, tiny_backbone, untrained_probe
from tiny import SIZES as TINY_SIZES

# Two engines add float32 products in other orders, over all layers and up to 1,000 tokens.
ROUNDING = 1e-4
LONGEST = 1000
SIZES = {
    **TINY_SIZES,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "max_position_embeddings": 2048,
    "initializer_range": 0.1,
}
_WAYS = (Reads(), Reads("both"), Reads(template=False), Reads("response"))
_TASKS = (TOXICITY, INTENT, TOPICS)


@dataclass(frozen=True)
class Model:
    """A backbone, the folder that vLLM loads it from, and the probes on it."""

    backbone: TransformersBackbone
    path: str
    probes: Sequence
    folders: list[str]


def tiny_model(folder) -> Model:
    """``tiny_llama`` on disk, with probes of every kind."""
    backbone = tiny_llama()
    return with_probes(backbone, saved(backbone, folder / "model"), folder)


def tiny_llama() -> TransformersBackbone:
    """A random Llama with four key-value heads and a context of 2,048: vLLM can run it."""
    backbone = tiny_backbone(LlamaConfig(**SIZES))
    backbone.tokenizer.model_max_length = backbone.encoder.max_tokens = 2048
    return backbone


def with_probes(backbone, path, folder) -> Model:
    """Every mechanism, some of them twice, with all kinds of task and ways of reading."""
    scaling = measured(backbone)
    probes = [
        replace(
            untrained_probe(
                backbone, name, mechanism=name, task=_TASKS[i % 3], reads=_WAYS[i % len(_WAYS)]
            ),
            standardisation=replace(scaling, is_normalised=i % 2 == 1),
            prompt_format="both" if i % 3 else "chat",
        )
        for i, name in enumerate(mechanism_names())
    ]
    probes.append(replace(untrained_probe(backbone, "plain"), standardisation=scaling))
    return Model(backbone, path, probes, _on_disk(backbone, probes, folder))


def judging_any_text(backbone, names_and_reads, folder) -> tuple[list, list[str]]:
    """Probes of chats and plain text, and their folders."""
    scaling = replace(measured(backbone), is_normalised=False)
    plain = [
        untrained_probe(backbone, name, reads=reads) for name, reads in names_and_reads.items()
    ]
    probes = [replace(p, standardisation=scaling, prompt_format="both") for p in plain]
    return probes, _on_disk(backbone, probes, folder)


def _on_disk(backbone, probes, folder) -> list[str]:
    for probe in probes:
        _temper(backbone, probe)
    return [str(save_probe(probe, folder / probe.name)) for probe in probes]


def measured(backbone) -> Standardisation:
    """The backbone's own mean and scale of each layer."""
    states: list[torch.Tensor] = []
    with backbone.tapped(lambda layer, hidden: states.append(hidden[0].clone())):
        backbone.run([random_prompt(backbone, 200, seed=99)])
    return Standardisation.measured(torch.stack(states))


def _temper(backbone, probe) -> None:
    """Scales the weights until the logits are of size one: saturated probabilities agree always."""
    prompts = [random_prompt(backbone, 20 + i, seed=i) for i in range(4)]
    for _ in range(8):
        size = float(np.abs(score(backbone, Bank([probe]), prompts)[0]).max())
        if 0.3 < size < 3:
            return
        for parameter in probe.mechanism.parameters():
            parameter.mul_(0.7 if size >= 3 else 1.4)


def random_prompt(backbone, length, *, seed, prefix=()) -> EncodedPrompt:
    """Random tokens, each of a random part; the last two are read by every probe."""
    random = np.random.default_rng(seed)
    vocabulary = backbone.model.config.get_text_config().vocab_size
    fresh = max(0, length - len(prefix))
    token_ids = (*prefix, *(int(t) for t in random.integers(5, vocabulary, fresh)))
    parts = [Part(int(part)) for part in random.integers(0, 4, length)]
    parts[-2:] = [Part.PROMPT, Part.RESPONSE][-min(2, length) :]
    return EncodedPrompt(token_ids[:length], tuple(parts))


def followed(prompt: EncodedPrompt, token_ids: Sequence[int]) -> EncodedPrompt:
    """The prompt and what was read of the response."""
    parts = prompt.parts + (Part.RESPONSE,) * len(token_ids)
    return replace(prompt, token_ids=(*prompt.token_ids, *token_ids), parts=parts)


def mixed_prompts(backbone, count, *, longest=LONGEST) -> list[EncodedPrompt]:
    """Lengths from 1 to ``longest``; a third of the prompts begin with the same tokens."""
    random = np.random.default_rng(7)
    lengths = np.unique(np.geomspace(1, longest, count).astype(int))
    lengths = [*lengths, *random.integers(1, longest // 2, count - len(lengths))]
    shared = random_prompt(backbone, 150, seed=1234).token_ids
    return [
        random_prompt(backbone, int(n), seed=i, prefix=shared if i % 3 == 0 else ())
        for i, n in enumerate(random.permutation(lengths))
    ]


def expected(model: Model, prompts) -> list[dict[str, np.ndarray]]:
    """For each prompt the probabilities of every probe, by ``transformers``; NaN for no verdict."""
    by_probe = score(model.backbone, Bank(model.probes), prompts)
    return [
        {
            probe.name: _probabilities(probe, logits[row])
            for probe, logits in zip(model.probes, by_probe, strict=True)
        }
        for row in range(len(prompts))
    ]


def _probabilities(probe, logits) -> np.ndarray:
    if not np.isfinite(logits).all():
        return np.full(len(probe.task.labels), np.nan)
    return np.array(list(probe.verdict(logits).probabilities.values()))


def reported(output) -> dict[str, np.ndarray]:
    """The same from an output of vLLM."""
    verdicts = output.kv_transfer_params[KEY]["verdicts"]
    return {
        name: np.array(list(fields["probabilities"].values())) if "error" not in fields else np.nan
        for name, fields in verdicts.items()
    }


def verdicts(outputs) -> list[dict[str, np.ndarray]]:
    """The same from each of vLLM's outputs."""
    return [reported(output) for output in outputs]


def require_equal(actual, wanted, *, rounding=ROUNDING) -> None:
    """Every probe's probabilities agree, and so do their failures."""
    for row, (mine, theirs) in enumerate(zip(actual, wanted, strict=True)):
        assert mine.keys() == theirs.keys()
        for name, values in theirs.items():
            np.testing.assert_allclose(
                np.broadcast_to(mine[name], values.shape),
                values,
                rtol=0,
                atol=rounding,
                err_msg=f"{name}, prompt {row}",
            )


@contextmanager
def llm_of(model: Model, **options) -> Iterator:
    """vLLM's offline engine with the plugin in it."""
    from vllm import LLM

    given = {
        "dtype": "float32",
        "block_size": 32,
        "enforce_eager": True,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "max_model_len": 2048,
        "disable_log_stats": False,
    }
    llm = LLM(
        model=model.path,
        additional_config={KEY: {"probes": model.folders, DESCRIBED: True}},
        **{**given, **options},
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def sampling_of(prompt: EncodedPrompt, **sampling):
    """Greedy, one token unless ``sampling`` says otherwise, with what the tokens belong to."""
    from vllm import SamplingParams

    given = {"max_tokens": 1, "temperature": 0, **sampling}
    return SamplingParams(**given, extra_args={"kv_transfer_params": request_params(prompt)})


def run(llm, prompts, **sampling) -> list:
    """vLLM's outputs for these prompts."""
    params = [sampling_of(prompt, **sampling) for prompt in prompts]
    texts = [{"prompt_token_ids": list(prompt.token_ids)} for prompt in prompts]
    return llm.generate(texts, params, use_tqdm=False)
