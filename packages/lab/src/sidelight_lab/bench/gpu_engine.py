"""What the check of a GPU asks of Sidelight's own engine; ``gpu_vllm.py`` has vLLM's sections.

Without a GPU the same sections run on a tiny model: that tries out the check, and says nothing of
a GPU.
"""

import asyncio
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import httpx
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import sidelight
from sidelight.classifier import Classifier, load
from sidelight.cli import app
from sidelight.data.loading import load_examples
from sidelight.engines.transformers.backbone import DtypeName, load_backbone
from sidelight.engines.transformers.engine import TransformersEngine
from sidelight.models.conversation import Reads
from sidelight.models.smollm2 import EMBEDDED_NAME, embedded_model_path
from sidelight.probes.artifact import load_probe, save_probe
from sidelight.scoring import encode
from sidelight.states.cache import ActivationCache
from sidelight.states.extraction import extract
from sidelight.storage import write_text
from sidelight_lab.bench.measurement import write_answers
from sidelight_lab.bench.server_process import ServerProcess

# The largest difference of a logit in float32, and the share of decisions that may differ in
# bfloat16, whose rounding depends on the order of sums.
LOGIT_ERROR = 0.01
DECISIONS_APART = 0.05
# On held-out texts; the embedded model's probe has about .95.
_ACCURACY = 0.8
_GIB = 2**30
_DEMO = Path(sidelight.__file__).parent / "demo" / "data"
_TRAINING = str(_DEMO / "urgency_train.jsonl")
_TEST = str(_DEMO / "urgency_test.jsonl")
_TEXT = "My cellar is on fire, and we cannot find our cat."
# Width, width of the MLP, layers, heads, heads of keys and values, vocabulary.
SHAPES = {
    "tiny": (128, 192, 4, 4, 4, 49152),
    "135m": (576, 1536, 30, 9, 3, 49152),
    "3b": (3072, 8192, 28, 24, 8, 128256),
    "8b": (4096, 14336, 32, 32, 8, 128256),
}


@dataclass(frozen=True)
class Setting:
    """What the sections are told.

    Attributes:
        folder: Where sections leave files for later ones.
        model: The model of all sections but ``serving``; None takes the embedded one, or a tiny one
            on a CPU.
        shape: Whose sizes the model with random weights has that ``serving`` is timed with.
        engine_option: Fields of vLLM's ``EngineArgs``.
    """

    device: str
    folder: str
    model: str | None
    shape: str
    engine_option: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def is_gpu(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def path(self) -> Path:
        return Path(self.folder)

    def model_name(self) -> str:
        """The model, as ``sidelight --model`` takes it; a tiny one is made if it is not there."""
        if self.model or self.is_gpu:
            return self.model or EMBEDDED_NAME
        folder = self.path / "model"
        if not folder.exists():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(model_config("tiny"), dtype=torch.float32)
            save_tokenizer(folder)
            model.save_pretrained(folder)
        return str(folder)


@dataclass(frozen=True)
class Result:
    """What came of a section: whether it is right, in a line, and its figures as JSON values."""

    passed: bool
    summary: str
    metrics: Mapping[str, Any] = field(default_factory=dict[str, Any])


def cpu(setting: Setting) -> Result:
    """A probe that is trained on the CPU in float32, for the other sections, and its logits."""
    _train(setting, "probe", "--dtype", "float32", device="cpu")
    dtypes: Sequence[DtypeName] = ("float32", "bfloat16")
    for dtype in dtypes:
        items = load_examples(_TEST, label=None).items
        np.save(setting.path / f"{dtype}.npy", _loaded(setting, "cpu", dtype).logits(items))
    return Result(True, f"trained, accuracy {_accuracy(setting, 'probe', 'cpu'):.3f}")


def train(setting: Setting) -> Result:
    """Training and evaluation on the device."""
    _train(setting, "trained")
    accuracy = _accuracy(setting, "trained", setting.device)
    is_right = accuracy >= _ACCURACY or not setting.is_gpu
    return Result(is_right, f"accuracy {accuracy:.3f} on held-out texts", {"accuracy": accuracy})


def agreement(setting: Setting, *, dtype: DtypeName) -> Result:
    """The logits of the probe on the device, beside those on the CPU."""
    classifier = _loaded(setting, setting.device, dtype)
    wanted = np.load(setting.path / f"{dtype}.npy")
    found = classifier.logits(load_examples(_TEST, label=None).items)
    apart = float(np.abs(found - wanted).max())
    verdict = classifier.probe.verdict
    differing = sum(
        verdict(one).flagged != verdict(another).flagged
        for one, another in zip(found, wanted, strict=True)
    )
    is_right = (
        apart <= LOGIT_ERROR if dtype == "float32" else differing <= DECISIONS_APART * len(found)
    )
    return Result(
        is_right,
        f"largest difference of a logit {apart:.1e}, {differing} of {len(found)} decisions differ",
        {"largest": apart, "differing": differing, "texts": len(found)},
    )


def spans(setting: Setting) -> Result:
    """A probe that labels words, trained on the device, and what it labels of a text."""
    rows = [json.loads(line) for line in Path(_TRAINING).read_text("utf-8").splitlines()]
    for row in rows:
        found = re.finditer(r"\b(I|[Mm]y|[Ww]e|[Oo]ur)\b", row["text"])
        row["spans"] = [{"start": m.start(), "end": m.end(), "label": "WORD"} for m in found]
    data = setting.path / "spans.jsonl"
    write_text(data, "".join(json.dumps(row) + "\n" for row in rows))
    words = ("--data", str(data), "--spans", "spans", *_new(setting, "spans"))
    _run(setting, "train", *words, *_fewer(setting))
    count = len(_predicted(setting, "spans", _TEXT)["spans"])
    return Result(count > 0 or not setting.is_gpu, f"labels {count} words of a text")


def predict(setting: Setting) -> Result:
    """``sidelight predict`` of a file."""
    _run(
        setting, "predict", str(setting.path / "probe"), "--data", _TEST,
        "--out", str(setting.path / "verdicts.jsonl"),
    )  # fmt: skip
    count = len((setting.path / "verdicts.jsonl").read_text("utf-8").splitlines())
    return Result(count > 0, f"{count} verdicts")


def explain(setting: Setting) -> Result:
    """``sidelight predict --explain``: the shares of tokens and layers add up to the logit."""
    explanation = _predicted(setting, "probe", _TEXT, "--explain")["explanation"]
    tokens = sum(token["share"] for token in explanation["tokens"])
    total = explanation["baseline"] + explanation["template"] + tokens
    off = abs(total - explanation["logit"])
    return Result(off <= LOGIT_ERROR, f"shares of tokens miss the logit by {off:.1e}")


def recalibrate(setting: Setting) -> Result:
    """``sidelight recalibrate`` to other labelled texts."""
    folder = str(setting.path / "probe")
    _run(setting, "recalibrate", folder, "--data", _TEST, "--force", *_new(setting, "recalibrated"))
    thresholds = load_probe(setting.path / "recalibrated").thresholds
    return Result(True, f"threshold {thresholds[0]:.3f}")


def serve(setting: Setting) -> Result:
    """A server that is asked for a chat and a moderation, and then gets other probes."""
    first = load_probe(setting.path / "probe")
    second = first.changed(name="second")
    folders = [setting.path / "probe", save_probe(second, setting.path / "second")]
    key = secrets.token_hex()
    options = ["--model", setting.model_name(), "--device", setting.device, "--admin-key", key]
    server = ServerProcess(folders[:1], options=options)
    with server, httpx.Client(base_url=server.url, timeout=60) as client:
        server.wait_until_ready()
        client.headers["authorization"] = f"Bearer {key}"

        def ask(method: str, path: str, **body: Any) -> Any:
            answer = client.request(method, path, json=body or None)
            assert answer.is_success, f"{path} answered {answer.status_code}: {answer.text}"
            return answer.json()

        model = ask("GET", "/v1/models")["data"][0]["id"]

        def chat() -> list[list[float]]:
            messages = [{"role": "user", "content": _TEXT}]
            asked = {"model": model, "messages": messages, "max_tokens": 8}
            answer = ask("POST", "/v1/chat/completions", **asked)
            verdicts = answer["sidelight"]["verdicts"]
            return [[*verdict["probabilities"].values()] for verdict in verdicts]

        (before,) = chat()
        ask("POST", "/v1/moderations", input=_TEXT)
        ask("PUT", "/admin/probes", probe=[str(folder) for folder in folders])
        after = chat()
    apart = float(np.abs(np.subtract(after, before)).max())
    return Result(
        len(after) == 2 and apart <= LOGIT_ERROR,
        f"a chat, a moderation, and {len(after)} probes after a reload, whose probabilities differ "
        f"from those before by {apart:.1e}",
    )


def second_gpu(setting: Setting) -> Result:
    """``agreement`` and ``serve`` on the second GPU, where one is: threads begin on the first."""
    if setting.is_gpu and torch.cuda.device_count() < 2:
        return Result(True, "there is none")
    there = setting if setting.device == "cpu" else replace(setting, device=f"{setting.device}:1")
    results = [agreement(there, dtype="bfloat16"), *([serve(there)] if setting.is_gpu else [])]
    passed = all(result.passed for result in results)
    return Result(passed, "; ".join(result.summary for result in results))


def speed(setting: Setting, *, probes: int) -> Result:
    """Tokens a second of extraction and decoding, and the memory of the GPU."""
    backbone = load_backbone(setting.model_name(), device=setting.device)
    served = [load_probe(setting.path / "probe").changed(name=f"probe-{i}") for i in range(probes)]
    prompts = encode(backbone.encoder, load_examples(_TEST, label=None).items)
    rates: dict[str, float] = {}
    gib: dict[str, float] = {}
    with TemporaryDirectory() as scratch:
        for folder in ("warm", "timed"):
            cache = ActivationCache(
                Path(scratch) / folder, prompts, reads=Reads(), fingerprint=backbone.fingerprint
            )
            start = perf_counter()
            extract(backbone, cache)
            rates["extraction"] = sum(map(len, prompts)) / (perf_counter() - start)
    tokens = 128 if setting.is_gpu else 8

    async def decode() -> None:
        engine = TransformersEngine(backbone, served)
        if setting.is_gpu:
            gib["loaded"] = torch.cuda.memory_allocated() / _GIB
        await engine.start()
        try:
            for texts in (1, 1, 8):
                start = perf_counter()
                written = await write_answers(engine, texts, tokens)
                rates[f"decoding {texts}"] = written / (perf_counter() - start)
        finally:
            await engine.close()

    asyncio.run(decode())
    if setting.is_gpu:
        gib["at most"] = torch.cuda.max_memory_allocated() / _GIB
    summary = (
        f"tokens a second: {rates['extraction']:,.0f} of extraction, {rates['decoding 1']:,.0f} "
        f"written in one text and {rates['decoding 8']:,.0f} in 8"
    )
    memory = "".join(f", {value:.2f} GiB {name}" for name, value in gib.items())
    return Result(True, summary + memory, {"tokens/s": rates, "gib": gib})


def _run(setting: Setting, *words: str, device: str | None = None) -> None:
    """Run a command of ``sidelight``, whose errors are raised as they are."""
    where = ["--model", setting.model_name(), "--device", device or setting.device]
    app.main([*words, *where], standalone_mode=False)


def _new(setting: Setting, name: str) -> list[str]:
    return ["--out", str(setting.path / name)]


def _train(setting: Setting, name: str, *words: str, device: str | None = None) -> None:
    words = ("--data", _TRAINING, "--positive", "urgent", *words, *_fewer(setting))
    # Background would take a tiny model most of its time.
    without_background = () if setting.is_gpu else ("--background", "none")
    _run(setting, "train", *words, *without_background, *_new(setting, name), device=device)


def _fewer(setting: Setting) -> Sequence[str]:
    """Options that make training quick where it says nothing."""
    return () if setting.is_gpu else ("--set", "epochs=1", "--set", "limit=40")


def _loaded(setting: Setting, device: str, dtype: DtypeName) -> Classifier:
    model = setting.model_name()
    return load(setting.path / "probe", model=model, device=device, dtype=dtype)


def _accuracy(setting: Setting, name: str, device: str) -> float:
    """Of a probe on texts that were left out, as ``sidelight eval`` says."""
    out = setting.path / f"{name}.json"
    words = (str(setting.path / name), "--data", _TEST, "--out", str(out))
    _run(setting, "eval", *words, device=device)
    return json.loads(out.read_text("utf-8"))["accuracy"]["value"]


def _predicted(setting: Setting, name: str, text: str, *words: str) -> dict[str, Any]:
    """The verdict of ``sidelight predict`` on one text."""
    out = setting.path / "verdict.jsonl"
    _run(setting, "predict", str(setting.path / name), text, *words, "--out", str(out))
    return json.loads(out.read_text("utf-8"))


def model_config(shape: str) -> LlamaConfig:
    width, inner, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        initializer_range=0.1,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        attn_implementation="sdpa",  # pyright: ignore[reportCallIssue]
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )


def save_tokenizer(folder: Path) -> None:
    """The embedded model's."""
    AutoTokenizer.from_pretrained(embedded_model_path()).save_pretrained(folder)
