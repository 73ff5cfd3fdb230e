"""A model that answers everything by one text, and a probe that labels certain tokens of it.

Each token of the text stands there once, and the model writes the one that follows it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from commands import saved
from sidelight.artifact import save_probe
from sidelight.backbone import TransformersBackbone
from sidelight.calibration import Calibration
from sidelight.mechanisms.base import Geometry, build_mechanism, mechanism_spec
from sidelight.mechanisms.spans import Spans
from sidelight.probe import Probe
from sidelight.prompts import Reads, Side
from sidelight.spans import SpanRule
from sidelight.types import Task
from tiny import byte_level, identified, tiny_tokenizer, untrained_probe
from vllm_served import SIZES

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
        _model(len(tokenizer), [tokenizer.convert_tokens_to_ids("<|assistant|>"), *answer, 1]),
        tokenizer,
        name="tiny/reciting",
    )
    path = saved(backbone, folder / "model")
    sides: Mapping[str, Side] = {"pii": "response", "asked": "prompt"}
    probes = [_probe(backbone, name, side) for name, side in sides.items()]
    folders = [str(save_probe(probe, folder / probe.name)) for probe in probes]
    return Reciting(backbone, path, probes, folders, answer)


def _model(vocabulary: int, text: Sequence[int]) -> torch.nn.Module:
    """After each token of the text comes the next one."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**SIZES, "vocab_size": vocabulary})
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


def _probe(backbone: TransformersBackbone, name: str, side: Side) -> Probe:
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
    return replace(
        plain, prompt_format="both", spec=spec, mechanism=built, calibration=calibration, spans=rule
    )
