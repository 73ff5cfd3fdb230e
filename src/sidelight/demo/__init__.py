"""The demonstration behind ``make demo``, with its bundled texts.

Trains a guard and a probe of intents, serves them, and asks one question.
"""

import json
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import uvicorn
from openai import OpenAI
from rich.console import Console
from rich.table import Table

from sidelight.artifact import load_probe, save_probe
from sidelight.backbone import TransformersBackbone, load_backbone
from sidelight.data.examples import LabelledExamples
from sidelight.data.guards import draw_texts
from sidelight.data.loading import load_examples
from sidelight.engines.base import Engine
from sidelight.engines.transformers import TransformersEngine
from sidelight.progress import say
from sidelight.server.app import create_app, listen, server_settings
from sidelight.server.config import ServerConfig
from sidelight.smollm2 import EMBEDDED_NAME, cache_root
from sidelight.training.background import load_background
from sidelight.training.classifier import Classifier
from sidelight.training.fit import fit
from sidelight.training.settings import FitOptions

_DATA = Path(__file__).parent / "data"
# With so many packaged texts of the guard, the demonstration takes under four minutes of two cores.
_GUARD_ROWS, _TEST_ROWS = 180, 60
_QUESTION = (
    "I was charged twice for my subscription this month and I need the money back today, "
    "before my rent is due. What can I do?"
)
# A log is as wide as its tables.
_console = Console(width=None if sys.stdout.isatty() else 110)


def run_demo(*, keep: bool, port: int) -> None:
    """The whole demonstration, saying what it does.

    Args:
        keep: Whether the server stays until Ctrl-C.
        port: To serve on; 0 takes a free one.
    """
    start = time.monotonic()
    # If the texts of guards are missing, the error comes before all else.
    texts = demo_texts()
    _say("Loading the embedded model (unpacked to the cache the first time)")
    backbone = load_backbone(EMBEDDED_NAME, for_reading=True)
    # The probes share the states of ordinary traffic; a demonstration that was killed goes on.
    states = cache_root() / "demo-states"
    folders = [_train(backbone, name, *parts, states) for name, parts in texts.items()]
    shutil.rmtree(states, ignore_errors=True)
    _say("Serving the model and its probes")
    engine = TransformersEngine(backbone, [load_probe(folder) for folder in folders])
    with _serving(engine, ServerConfig(port=port, playground=True, log_level="warning")) as url:
        _ask(OpenAI(base_url=f"{url}/v1", api_key="unused"))
        _say(f"Done in {time.monotonic() - start:.0f} s. Whole guards: sidelight guard --help")
        named = [word for path in folders for word in ("--probe", str(path))]
        command = shlex.join(["sidelight", "serve", "--playground", *named])
        _say(f"Serve these, with a page to try them: {command}")
        if keep:
            _say(f"Try it at {url}/playground; the server stays until Ctrl-C")
            with suppress(KeyboardInterrupt):
                threading.Event().wait()


@contextmanager
def _serving(engine: Engine, config: ServerConfig) -> Generator[str]:
    """The address of a server in a thread of its own, which ends with the block."""
    listener = listen(config)
    server = uvicorn.Server(server_settings(create_app(engine, config), config))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        # The socket is open: a client waits until the server takes its connection.
        yield f"http://{config.host}:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def demo_texts() -> dict[str, tuple[LabelledExamples, str]]:
    """The texts that each probe is trained on, and what it is tested on.

    Raises:
        SidelightError: The package of guards is not installed.
    """
    injection = draw_texts(load_examples("guard:injection"), _GUARD_ROWS)
    intent = load_examples(_DATA / "intent_train.jsonl")
    return {
        "injection": (injection, "guard:injection:cyberseceval"),
        "intent": (intent, str(_DATA / "intent_test.jsonl")),
    }


def _train(
    backbone: TransformersBackbone, name: str, training: LabelledExamples, test: str, states: Path
) -> Path:
    _say(f"Training '{name}' on {len(training)} texts with the model frozen")
    options = FitOptions(background=load_background("packaged"), cache_root=states, keep_cache=True)
    result = fit(backbone, training, None, name=name, options=options)
    for sentence in result.warnings:
        say(f"Warning: {sentence}")
    probe = result.probe
    classifier = Classifier(backbone, probe)
    report = classifier.evaluate(draw_texts(load_examples(test, task=probe.task), _TEST_ROWS))
    auroc, f1 = report.metrics["auroc"], report.metrics["f1"]
    _say(f"On {report.rows} other texts: AUROC {auroc}, F1 {f1}")
    if test.startswith("guard:"):
        say("It learned from a small part of its texts, to be quick: see docs/guards.md for all.")
    return save_probe(probe, cache_root() / "demo" / name)


def _ask(client: OpenAI) -> None:
    _say("One chat completion through the openai client: text and verdicts together")
    answer = client.chat.completions.create(
        model=EMBEDDED_NAME,
        messages=[{"role": "user", "content": _QUESTION}],
        max_tokens=80,
        temperature=0,
    )
    table = Table(show_lines=True)
    table.add_column("text", ratio=3)
    table.add_column("verdicts on the prompt", ratio=2)
    verdicts: Sequence[dict[str, Any]] = (answer.model_extra or {})["sidelight"]["verdicts"]
    table.add_row(
        f"User: {_QUESTION}\n\nModel: {answer.choices[0].message.content}",
        "\n\n".join(_verdict(verdict) for verdict in verdicts),
    )
    _console.print(table)


def _verdict(verdict: dict[str, Any]) -> str:
    chance = json.dumps({k: round(p, 3) for k, p in verdict["probabilities"].items()})
    return f"{verdict['probe']}: {verdict['label'].upper()}\n{chance}"


def _say(message: str) -> None:
    # Commands stay on one line, so that they can be copied.
    _console.print(f"[bold cyan]==>[/bold cyan] {message}", highlight=False, soft_wrap=True)
