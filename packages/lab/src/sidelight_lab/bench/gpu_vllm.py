"""What the check of a GPU asks of probes inside vLLM, as ``gpu_engine.py`` of our own engine."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sidelight.engines.transformers.backbone import load_backbone
from sidelight.models.conversation import EncodedPrompt, Reads, TokenRole
from sidelight.models.fingerprint import Fingerprint
from sidelight.probes.artifact import load_probe, save_probe
from sidelight.probes.bank import Bank
from sidelight.probes.mechanisms.base import mechanism_names, mechanism_spec
from sidelight.probes.standardisation import Projection
from sidelight.states.extraction import text_logits
from sidelight.storage import write_json
from sidelight_lab.bench.gpu_engine import Result, Setting, model_config, save_tokenizer
from sidelight_lab.bench.measurement import offline_engine, spread_probe, untrained_probe
from sidelight_vllm.requests import read_report, request_params
from sidelight_vllm.settings import ANNOTATED
from sidelight_vllm.slots import GatherPlan, SlotStore, StagingBuffer, set_receiver, slots_of

# Of a probability in float32.
PARITY_ERROR = 1e-4
FORCED = 8
_WAYS = (Reads(), Reads("both"), Reads("response"))
_TAP_LAYERS = 4


@dataclass(frozen=True)
class _Pass:
    """A worker's part of a forward pass whose tokens have these KV slots."""

    store: SlotStore
    slots: Tensor

    def receive(self, layer: int, stream: Tensor) -> None:
        self.store.staging.receive(layer, stream)

    def end_pass(self, tokens: int) -> None:
        assert tokens == len(self.slots)
        self.store.keep(self.slots)


def _states(tokens: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """What a layer adds, and the residual stream."""
    hidden = torch.randn(tokens, width, device=device)
    return hidden.bfloat16(), (30 * torch.randn_like(hidden)).bfloat16()


def _captured(work: Callable[[], object]) -> "torch.cuda.CUDAGraph":
    # Before it is captured, work must have run on another stream than the default one.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def graphs(setting: Setting) -> Result:
    """Whether the captured tap, replayed with other inputs, gives what it gives uncaptured.

    What is captured is what vLLM captures: the operation that the hooks call, for every layer; and
    the move of the columns to their slots. On a CPU it is only called.
    """
    width, projection_width, tokens, blocks = 576 if setting.is_gpu else 64, 7, 24, 8
    # The last three are padding.
    plan = GatherPlan("", (), 0, bytes([TokenRole.PROMPT] * (tokens - 3)), True, False)
    device = torch.device(setting.device)
    torch.manual_seed(0)

    def projection() -> Projection:
        return Projection(
            torch.randn(_TAP_LAYERS, width, projection_width, device=device),
            torch.randn(_TAP_LAYERS, projection_width, device=device),
            torch.rand(projection_width, device=device) < 0.5,
        )

    staging = StagingBuffer.empty(projection(), tokens=tokens)
    store = SlotStore(staging, blocks=blocks, block_size=16)
    inputs = [_states(tokens, width, device) for _ in range(_TAP_LAYERS)]
    slots = torch.arange(tokens, device=device)
    order = torch.zeros((), device=device)

    def run() -> None:
        for layer, (hidden, residual) in enumerate(inputs):
            torch.ops.sidelight.project(hidden, residual, layer, order)
        torch.ops.sidelight.end_pass(inputs[-1][0], order)

    set_receiver(_Pass(store, slots))
    replay = _captured(run).replay if setting.is_gpu else run
    difference = 0.0
    for _ in range(3):
        fresh = [_states(tokens, width, device) for _ in range(_TAP_LAYERS)]
        for mine, replacements in zip(inputs, fresh, strict=True):
            for one, source in zip(mine, replacements, strict=True):
                one.copy_(source)
        table = torch.randperm(blocks)[:2].tolist()
        slots.copy_(torch.from_numpy(slots_of(table, np.arange(tokens), 16)))
        slots[-3:] = -1
        # Other probes take their place in the captured graph.
        staging.load(probes := projection())
        uncaptured = StagingBuffer.empty(probes, tokens=tokens)
        replay()
        gathered = store.read([replace(plan, blocks=tuple(table))])
        for layer, (hidden, residual) in enumerate(fresh):
            uncaptured.receive(layer, hidden + residual)
            # A slot that was not written has NaN.
            off = (
                (gathered[:, layer] - uncaptured.rows[layer, :-3]).abs().nan_to_num(torch.inf).max()
            )
            difference = max(difference, min(1.0, float(off)))
    how = "replayed with other inputs" if setting.is_gpu else "called, not captured"
    return Result(
        difference == 0, f"{how}, largest difference {difference:.1e}", {"difference": difference}
    )


def reference(setting: Setting) -> Result:
    """Probes of all mechanisms, and what ``transformers`` says of prompts, in float32 on the CPU.

    A response is forced: the same token again and again. So it is known before vLLM writes it.
    """
    backbone = load_backbone(setting.model_name(), dtype="float32", device="cpu")
    longest = min(1000 if setting.is_gpu else 100, backbone.encoder.max_tokens - FORCED - 1)
    lengths = np.geomspace(1, longest, 40 if setting.is_gpu else 8).astype(int)
    random = np.random.default_rng(0)
    shared = random.integers(5, 300, longest).tolist()
    prompts: list[EncodedPrompt] = []
    texts: list[dict[str, Any]] = []
    for i, length in enumerate(map(int, lengths)):
        # A third of the prompts begin alike, and are found in the prefix cache.
        suffix = random.integers(5, 300, length).tolist()
        tokens = [*shared[: 2 * length // 3], *suffix][:length] if i % 3 == 0 else suffix
        prompt = EncodedPrompt(tuple(tokens), (TokenRole.PROMPT,) * length)
        forced = 5 + i
        # The token that is drawn last is not read.
        response = (forced,) * (FORCED - 1)
        token_ids = (*prompt.token_ids, *response)
        prompts.append(
            EncodedPrompt(token_ids, prompt.token_roles + (TokenRole.RESPONSE,) * (FORCED - 1))
        )
        texts.append({"token_ids": tokens, "forced": forced})
    probes = [
        spread_probe(
            backbone,
            prompts,
            name,
            spec=mechanism_spec(name),
            reads=_WAYS[i % len(_WAYS)],
            is_normalised=i % 2 == 1,
            seed=i,
        )
        for i, name in enumerate(mechanism_names())
    ]
    for probe in probes:
        save_probe(probe, setting.path / "probes" / probe.name)
    by_probe = text_logits(backbone, Bank(probes), prompts)
    for row, text in enumerate(texts):
        text["wanted"] = {
            probe.name: probe.verdict(outputs[row].logits).probabilities["yes"]
            for probe, outputs in zip(probes, by_probe, strict=True)
        }
    path = backbone.model.config._name_or_path  # pyright: ignore[reportPrivateUsage]
    context = min(2048, backbone.encoder.max_tokens)
    write_json(
        setting.path / "reference.json",
        {
            "path": path,
            "context": context,
            "fingerprint": asdict(backbone.fingerprint),
            "texts": texts,
        },
    )
    return Result(True, f"{len(prompts)} prompts of up to {longest} tokens")


def parity(setting: Setting, *, eager: bool) -> Result:
    """The largest difference to the reference, on a first pass and from the prefix cache."""
    expected = json.loads((setting.path / "reference.json").read_text("utf-8"))
    folders = sorted(str(folder) for folder in (setting.path / "probes").iterdir())
    names = [load_probe(folder).name for folder in folders]
    config = {"probes": folders, "fingerprint": expected["fingerprint"], ANNOTATED: True}
    differences: list[float] = []
    with offline_engine(
        expected["path"],
        config,
        setting.engine_option,
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=eager,
        max_model_len=expected["context"],
        max_num_batched_tokens=256,
        max_num_seqs=8,
        gpu_memory_utilization=0.4,
    ) as llm:
        for _ in range(2):
            outputs = _generate(
                llm,
                [text["token_ids"] for text in expected["texts"]],
                [{"allowed_token_ids": [text["forced"]]} for text in expected["texts"]],
                max_tokens=FORCED,
            )
            worst = 0.0
            for output, text in zip(outputs, expected["texts"], strict=True):
                assert set(output.outputs[0].token_ids) == {text["forced"]}
                report = read_report(output.kv_transfer_params)
                for name in names:
                    verdict = report.verdict(name)
                    mine = np.inf if verdict is None else verdict.probabilities["yes"]
                    worst = max(worst, abs(mine - text["wanted"][name]))
            differences.append(min(worst, 1.0))
    first, second = differences
    return Result(
        max(differences) <= PARITY_ERROR,
        f"largest difference {first:.1e}, from the cache {second:.1e}",
        {"first_pass": first, "second_pass": second, "probes": names},
    )


def serving(setting: Setting, *, readouts: int) -> Result:
    """Milliseconds of the same work with some readouts; the weights are random."""
    folder = setting.path / "shape"
    config = model_config(setting.shape)
    config.save_pretrained(folder)
    save_tokenizer(folder)
    who = Fingerprint(
        f"random {setting.shape}", "config", "weights", "tokenizer", "template",
        config.num_hidden_layers + 1, config.hidden_size, "bfloat16",
    )  # fmt: skip
    probes = [untrained_probe(who, f"readout-{i}", seed=i) for i in range(readouts)]
    folders = [str(save_probe(probe, folder / "probes" / probe.name)) for probe in probes]
    named = {"probes": folders, "fingerprint": asdict(who), ANNOTATED: True}
    # Prompts, tokens of a prompt, tokens written.
    works = {
        "prefill": (4, 4096, 1) if setting.is_gpu else (2, 64, 1),
        "one text": (1, 32, 129) if setting.is_gpu else (1, 8, 9),
        "64 texts": (64, 32, 129) if setting.is_gpu else (4, 8, 9),
    }
    values: dict[str, list[float]] = {}
    with offline_engine(
        str(folder),
        named if readouts else None,
        setting.engine_option,
        skip_tokenizer_init=True,
        load_format="dummy",
        dtype="bfloat16",
        enforce_eager=not setting.is_gpu,
        max_model_len=8192 if setting.is_gpu else 512,
        enable_prefix_caching=False,
        # The columns of 100 readouts need half as much as the cache.
        gpu_memory_utilization=0.5,
    ) as llm:

        def run(prompts: int, tokens: int, written: int) -> None:
            texts = [[5 + (7 * i + k) % 290 for k in range(tokens)] for i in range(prompts)]
            outputs = _generate(
                llm, texts, [{}] * prompts, max_tokens=written, is_classified=readouts > 0
            )
            if readouts:
                assert len(read_report(outputs[0].kv_transfer_params).verdicts) == readouts

        for name, (prompts, tokens, written) in works.items():
            run(prompts, tokens, written)
            seconds: list[float] = []
            for _ in range(5 if setting.is_gpu else 2):
                start = perf_counter()
                run(prompts, tokens, written)
                seconds.append(perf_counter() - start)
            values[name] = [1e3 * one / written for one in seconds]
    return Result(True, "measured", {"ms": values})


def _generate(
    llm: Any,
    texts: Sequence[list[int]],
    options: Sequence[dict[str, Any]],
    *,
    max_tokens: int,
    is_classified: bool = True,
) -> list[Any]:
    """vLLM's outputs of so many greedy tokens after each text."""
    from vllm import SamplingParams

    params: list[Any] = []
    for text, fields in zip(texts, options, strict=True):
        prompt = EncodedPrompt(tuple(text), (TokenRole.PROMPT,) * len(text))
        extra = {"kv_transfer_params": request_params(prompt)} if is_classified else None
        greedy = {"temperature": 0, "ignore_eos": True, "detokenize": False}
        params.append(SamplingParams(max_tokens=max_tokens, extra_args=extra, **greedy, **fields))
    return llm.generate([{"prompt_token_ids": text} for text in texts], params, use_tqdm=False)
