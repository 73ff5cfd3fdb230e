"""Models on disk that vLLM serves, probes whose answers spread, and vLLM's offline engine.

They are dense ones, tiny ones of each architecture, and one that answers everything by one text.
Tests inside vLLM run in an environment of their own, with the fixtures of ``tests/conftest.py``.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    LlamaConfig,
)

from sidelight.data.spans import SpanRule
from sidelight.engines.transformers.backbone import TransformersBackbone
from sidelight.models.conversation import EncodedPrompt, Reads, Side, TokenRole
from sidelight.probes.artifact import save_probe
from sidelight.probes.bank import Bank
from sidelight.probes.mechanisms.base import (
    Geometry,
    build_mechanism,
    mechanism_names,
    mechanism_spec,
)
from sidelight.probes.mechanisms.spans import Spans
from sidelight.probes.probe import Probe
from sidelight.probes.standardisation import Standardisation
from sidelight.statistics.calibration import Calibration
from sidelight.types import Task
from sidelight_llama.backbone import LlamaBackbone
from sidelight_vllm import KEY
from sidelight_vllm.requests import read_report, request_params
from sidelight_vllm.settings import ANNOTATED
from worlds.models import (
    INTENT,
    SIZES,
    TOPICS,
    TOXICITY,
    byte_level,
    identified,
    saved,
    score,
    tiny_backbone,
    tiny_tokenizer,
    untrained_probe,
)

# Whether kernels run in Triton's interpreter, where a step takes many times as long.
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# It has nothing to warm up, and does not take all kernels of vLLM's warm-up.
WARM_UP = {"kernel_config": {"enable_jit_warmup": False}} if IS_INTERPRETED else {}

# Importing vLLM takes longer than most tests. So its worker shares the process of its engine, as on
# one GPU, and an offline engine that of the test. By default its CPU backend separates all three.
TOGETHER = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

# Two engines add float32 products in other orders, over all layers and up to 1,000 tokens.
ROUNDING = 1e-4
LONGEST = 1000
VLLM_SIZES = {
    **SIZES,
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
    backbone = tiny_backbone(LlamaConfig(**VLLM_SIZES))
    backbone.tokenizer.model_max_length = backbone.encoder.max_tokens = 2048
    return backbone


def with_probes(backbone, path, folder) -> Model:
    """Every mechanism, some of them twice, with all kinds of task and ways of reading."""
    scaling = measured(backbone)
    probes = [
        replace(
            untrained_probe(
                backbone, name, mechanism=name, task=_TASKS[i % 3], reads=_WAYS[i % len(_WAYS)]
            ).changed(prompt_format="both" if i % 3 else "chat"),
            standardisation=replace(scaling, is_normalised=i % 2 == 1),
        )
        for i, name in enumerate(mechanism_names())
    ]
    probes.append(replace(untrained_probe(backbone, "plain"), standardisation=scaling))
    return Model(backbone, path, probes, _on_disk(backbone, probes, folder))


def probes_of_any_text(backbone, names_and_reads, folder) -> tuple[list, list[str]]:
    """Probes of chats and plain text, and their folders."""
    scaling = replace(measured(backbone), is_normalised=False)
    plain = [
        untrained_probe(backbone, name, reads=reads) for name, reads in names_and_reads.items()
    ]
    probes = [replace(p.changed(prompt_format="both"), standardisation=scaling) for p in plain]
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


def end_pass(worker, slots, *, device="cpu") -> None:
    """Ends a forward pass as vLLM does, whose tokens have these KV slots."""
    found = torch.tensor([*slots], device=device)
    with patch("sidelight_vllm.worker.pass_slots", return_value=found):
        worker.end_pass(len(found))


def random_prompt(backbone, length, *, seed, prefix=()) -> EncodedPrompt:
    """Random tokens, each of a random part; the last two are read by every probe."""
    random = np.random.default_rng(seed)
    model = backbone.model
    is_gguf = isinstance(backbone, LlamaBackbone)
    vocabulary = model.vocabulary_size if is_gguf else model.config.get_text_config().vocab_size
    fresh = max(0, length - len(prefix))
    token_ids = (*prefix, *(int(t) for t in random.integers(5, vocabulary, fresh)))
    token_roles = [TokenRole(int(role)) for role in random.integers(0, 4, length)]
    token_roles[-2:] = [TokenRole.PROMPT, TokenRole.RESPONSE][-min(2, length) :]
    return EncodedPrompt(token_ids[:length], tuple(token_roles))


def followed(prompt: EncodedPrompt, token_ids: Sequence[int]) -> EncodedPrompt:
    """The prompt and what was read of the response."""
    token_roles = prompt.token_roles + (TokenRole.RESPONSE,) * len(token_ids)
    return replace(prompt, token_ids=(*prompt.token_ids, *token_ids), token_roles=token_roles)


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
    report = read_report(output.kv_transfer_params)
    report.require_verdicts()
    values = {v.probe: np.array(list(v.probabilities.values())) for v in report.verdicts}
    return values | dict.fromkeys(report.failed, np.nan)


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
def together() -> Iterator[None]:
    """Engines that start meanwhile share processes."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in TOGETHER.items():
            patch.setenv(name, value)
        yield


@contextmanager
def in_this_process() -> Iterator[None]:
    """One offline engine at a time runs in this process."""
    from vllm.distributed import cleanup_dist_env_and_memory

    with together():
        try:
            yield
        finally:
            cleanup_dist_env_and_memory()


@contextmanager
def llm_of(model: Model, *, is_apart: bool = True, **options) -> Iterator:
    """vLLM's offline engine with the plugin in it, in this process or in others."""
    from vllm import LLM

    defaults = {
        "dtype": "float32",
        "block_size": 32,
        "enforce_eager": True,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "max_model_len": 2048,
        "disable_log_stats": False,
    }
    with nullcontext() if is_apart else in_this_process():
        llm = LLM(
            model=model.path,
            additional_config={KEY: {"probes": model.folders, ANNOTATED: True}},
            **{**defaults, **options},
        )
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()


def sampling_of(prompt: EncodedPrompt, **sampling):
    """Greedy, one token unless ``sampling`` says otherwise, with what the tokens belong to."""
    from vllm import SamplingParams

    defaults = {"max_tokens": 1, "temperature": 0, **sampling}
    return SamplingParams(**defaults, extra_args={"kv_transfer_params": request_params(prompt)})


def run_llm(llm, prompts, **sampling) -> list:
    """vLLM's outputs for these prompts."""
    params = [sampling_of(prompt, **sampling) for prompt in prompts]
    texts = [{"prompt_token_ids": list(prompt.token_ids)} for prompt in prompts]
    return llm.generate(texts, params, use_tqdm=False)


_SIZES = {**VLLM_SIZES, "num_key_value_heads": 2}
_HEADS = {**_SIZES, "head_dim": 32}
_EXPERTS = {**_HEADS, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_WINDOW = {"sliding_window": 64}
_HYBRID = {**_WINDOW, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]}
_GEMMA3 = {**_HEADS, **_HYBRID, "query_pre_attn_scalar": 32}
_VISION = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 56, "patch_size": 14,
}  # fmt: skip
_TEXT_ONLY = {"limit_mm_per_prompt": {"image": 0}}


@dataclass(frozen=True)
class Architecture:
    """How a tiny model of it is made.

    Attributes:
        kind: What ``transformers`` calls it.
        fields: Those of the configuration.
        attention: What ``transformers`` computes attention with; sdpa ignores Gemma 2's softcap.
        options: What vLLM is started with.
        is_apart: Whether vLLM needs a process of its own, since it changes the class of the model
            that ``transformers`` also runs.
    """

    kind: str
    fields: dict[str, Any]
    attention: str = "sdpa"
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    is_apart: bool = False


# By vLLM's names.
TESTED = {
    "LlamaForCausalLM": Architecture("llama", _SIZES),
    "Llama4ForCausalLM": Architecture("llama4_text", {
        **_HEADS, "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 192,
        "attention_chunk_size": 64, "interleave_moe_layer_step": 2, "no_rope_layers": [1, 1, 1, 0],
    }),
    "Qwen2ForCausalLM": Architecture("qwen2", _SIZES),
    "Qwen3ForCausalLM": Architecture("qwen3", _HEADS),
    "Qwen3MoeForCausalLM": Architecture(
        "qwen3_moe", {**_EXPERTS, "num_experts": 4, "norm_topk_prob": True}
    ),
    "MistralForCausalLM": Architecture("mistral", {**_HEADS, "sliding_window": None}),
    "Mistral3ForConditionalGeneration": Architecture("mistral3", {
        "text_config": {**_HEADS, "model_type": "mistral", "sliding_window": None},
        "vision_config": {**_VISION, "head_dim": 16, "model_type": "pixtral"},
        "image_token_index": 299,
    }, options=_TEXT_ONLY),
    "Gemma2ForCausalLM": Architecture(
        "gemma2", {**_HEADS, **_WINDOW, "query_pre_attn_scalar": 32}, attention="eager"
    ),
    "Gemma3ForCausalLM": Architecture("gemma3_text", _GEMMA3),
    "Gemma3ForConditionalGeneration": Architecture("gemma3", {
        "text_config": _GEMMA3, "vision_config": _VISION, "mm_tokens_per_image": 4,
        "boi_token_index": 297, "eoi_token_index": 298, "image_token_index": 299,
    }, options=_TEXT_ONLY),
    "GptOssForCausalLM": Architecture("gpt_oss", {
        **_HEADS, **_WINDOW, "intermediate_size": 128, "num_local_experts": 4,
        "num_experts_per_tok": 2,
    }, attention="eager"),
    "Phi3ForCausalLM": Architecture("phi3", _SIZES),
    "Glm4ForCausalLM": Architecture("glm4", _HEADS),
    "Glm4MoeForCausalLM": Architecture("glm4_moe", {
        **_EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 1, "n_shared_experts": 1,
    }),
    "GraniteForCausalLM": Architecture("granite", {
        **_SIZES, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0,
        "attention_multiplier": 0.2,
    }),
    "Olmo2ForCausalLM": Architecture("olmo2", _SIZES, is_apart=True),
    "Olmo3ForCausalLM": Architecture("olmo3", {**_SIZES, **_HYBRID}, is_apart=True),
}  # fmt: skip


def architecture_model(architecture: Architecture, folder, **fields: Any) -> Model:
    """A model of random weights on disk, with probes of every kind."""
    torch.manual_seed(0)
    path = str(folder / "model")
    config = CONFIG_MAPPING[architecture.kind](**{**architecture.fields, **fields})
    is_text = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    kind = AutoModelForCausalLM if is_text else AutoModelForImageTextToText
    attention = architecture.attention
    model = kind.from_config(config, dtype=torch.float32, attn_implementation=attention)
    model.save_pretrained(path)
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 2048
    tokenizer.save_pretrained(path)
    # Its class depends on the model's.
    tokenizer = AutoTokenizer.from_pretrained(path)
    return with_probes(identified(model, tokenizer, name=path), path, folder)


# "Zyxwvut" is one token for each letter, since the tokenizer has learned no text with it.
LEARNED = "Certainly: our customer Quentin lives at number 4711, which nobody else may know"
ANSWER = LEARNED.replace("Quentin", "Quentin Zyxwvut")
# Some letter of a word labels all of it; of the name, the last but one.
LABELLED = {"NAME": [" Quentin", "u"], "CODE": [" 4711"]}
REDACTED = "Certainly: our customer [NAME] lives at number [CODE], which nobody else may know"
SECRETS = ("Quentin", "Zyxwvut", "4711")


@dataclass(frozen=True)
class Reciting:
    """The model in a folder, and probes of it.

    Attributes:
        answer: The token ids of what it says.
    """

    backbone: TransformersBackbone
    path: str
    probes: Sequence[Probe]
    folders: Sequence[str]
    answer: Sequence[int]

    def token(self, text: str) -> int:
        (token,) = self.backbone.tokenizer(text, add_special_tokens=False)["input_ids"]
        return token


def reciting_model(folder: Path) -> Reciting:
    """The model, with ``pii``, a probe of spans of its answers, and ``asked``, one of prompts."""
    tokenizer = tiny_tokenizer(byte_level([LEARNED] * 50, vocab_size=500))
    tokenizer.model_max_length = 2048
    answer = tokenizer(ANSWER, add_special_tokens=False)["input_ids"]
    assert len(answer) == len(set(answer))
    backbone = identified(
        _reciting_llama(
            len(tokenizer), [tokenizer.convert_tokens_to_ids("<|assistant|>"), *answer, 1]
        ),
        tokenizer,
        name="tiny/reciting",
    )
    path = saved(backbone, folder / "model")
    sides: Mapping[str, Side] = {"pii": "response", "asked": "prompt"}
    probes = [_labelling_probe(backbone, name, side) for name, side in sides.items()]
    folders = [str(save_probe(probe, folder / probe.name)) for probe in probes]
    return Reciting(backbone, path, probes, folders, answer)


def _reciting_llama(vocabulary: int, text: Sequence[int]) -> torch.nn.Module:
    """After each token of the text comes the next one."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**VLLM_SIZES, "vocab_size": vocabulary})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            # A state is the embedding of its token, whatever stands before it.
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        states = model.model.embed_tokens.weight
        # That of padding is 0.
        states /= states.norm(dim=1, keepdim=True).clamp(min=1e-6)
        model.lm_head.weight.normal_(std=0.01)
        for token, following in pairwise(text):
            model.lm_head.weight[following] += states[token]
    return model


def _labelling_probe(backbone: TransformersBackbone, name: str, side: Side) -> Probe:
    """Of each label, logits of 10 for its tokens and far below 0 for all others."""
    who, task = backbone.fingerprint, Task("multilabel", tuple(LABELLED))
    geometry = Geometry(layers=who.layers, width=who.width, outputs=task.outputs)
    spec = mechanism_spec("spans", {"lookahead": 1, "rank": task.outputs})
    built = build_mechanism(spec, geometry).eval().requires_grad_(False)
    assert isinstance(built, Spans)
    for parameter in built.parameters():
        parameter.zero_()
    states = backbone.model.model.embed_tokens.weight
    for label, words in enumerate(LABELLED.values()):
        for word in words:
            (token,) = backbone.tokenizer(word, add_special_tokens=False)["input_ids"]
            built.features[0, :, label] += 20 * math.sqrt(geometry.layers) * states[token]
        built.mixing[label, label] = built.value[label, label] = 1
        built.bias[label] = -10
    # What stands beside a token matters, but does not decide.
    torch.manual_seed(1)
    built.mixing[task.outputs :].normal_(std=0.02)
    calibration = Calibration("platt", task.kind, (0.2,) * task.outputs, (0.1,) * task.outputs)
    rule = SpanRule(
        replace(calibration, scale=(0.3,) * task.outputs), (0.5,) * task.outputs, (None,) * 2
    )
    plain = untrained_probe(backbone, name, task=task, reads=Reads(side, template=False))
    changed = plain.changed(
        prompt_format="both", mechanism=spec, calibration=calibration, spans=rule
    )
    return replace(changed, mechanism=built)
