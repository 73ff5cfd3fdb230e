"""Draws the pictures of the playground and of the labelling page in ``docs/pictures``.

    PYTHONPATH=tests:tests/matrix/browser .venv/bin/python .ci/pictures.py

It needs Chromium, and the probe of intents that ``sidelight demo`` leaves in the cache.
"""

import json
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from browser import chromium, page_at
from playwright.sync_api import Browser
from starlette.responses import JSONResponse

from sidelight import demo
from sidelight.data.loading import load_examples
from sidelight.engines.transformers.backbone import load_backbone
from sidelight.guards import probe_folder
from sidelight.models.conversation import Reads
from sidelight.models.smollm2 import cache_root
from sidelight.training.settings import FitOptions
from sidelight.types import Task
from sidelight_lab.bench.server_process import ServerProcess
from sidelight_label.app import create_app
from sidelight_label.file import Criterion, LabelFile, ReviewFile
from sidelight_label.pool import Pool, merged
from sidelight_label.queue import LabelQueue, shuffled
from sidelight_label.review import Review
from worlds.judges import scripted_judge, yes_no
from worlds.servers import listening

SIZE = {"width": 900, "height": 900}
PICTURES = Path(__file__).parents[1] / "docs" / "pictures"


def draw_playground(browser: Browser) -> None:
    folders = [probe_folder("guard:injection"), cache_root() / "demo" / demo.INTENT]
    with ServerProcess(folders, options=["--playground"]) as server:
        server.wait_until_ready()
        size = {"width": 900, "height": 700}
        with page_at(browser, f"{server.url}/playground", viewport=size) as page:
            page.get_by_text("smollm2, 2 probes").wait_for()
            page.get_by_role("button", name="Try an attack").click()
            page.keyboard.press("Enter")
            page.get_by_text(re.compile(r"\d+ tokens")).wait_for(timeout=120_000)
            page.get_by_role("button", name="injection").click()
            page.get_by_role("article", name="You").get_by_role("table").wait_for()
            page.get_by_role("tabpanel").screenshot(path=PICTURES / "playground-chat.png")
            page.get_by_role("tab", name="Thresholds").click()
            page.get_by_role("slider").press("ArrowLeft")
            page.get_by_role("tabpanel").screenshot(path=PICTURES / "playground-thresholds.png")


def draw_labelling(browser: Browser, folder: Path) -> None:
    texts = load_examples(Path(demo.__file__).parent / "data" / "urgency_train.jsonl")
    examples, _ = merged(texts, None)
    options = FitOptions(reads=Reads(scope="conversation"), cache_root=folder / "cache")
    pool = Pool(load_backbone("smollm2"), examples, texts.task, options)
    file = LabelFile(folder / "labels.jsonl")
    queue = LabelQueue(pool, file, column="label", labelled={}, folder=folder / "probe")
    for count in (60, 20):
        for _ in range(count):
            row = queue.next()
            queue.label(row, texts.label_names()[row])
        queue.train()
    with (
        listening(create_app(queue, "token")) as address,
        page_at(browser, f"{address}/#token", viewport=SIZE) as page,
    ):
        page.get_by_text("least certain first").wait_for()
        page.screenshot(path=PICTURES / "label.png", full_page=True)


def draw_criterion(browser: Browser, folder: Path) -> None:
    """A rule that is too wide, and the texts that show it."""
    source = load_examples(Path(demo.__file__).parent / "data" / "intent_train.jsonl")
    examples, _ = merged(source, None)
    truth = ["refund" in names for names in source.label_names()]
    by_text = {item.text: each for item, each in zip(source.items, truth, strict=True)}
    # Under that rule, it takes each complaint about money for a request to get it back.
    words = ("charge", "invoice", "bill", "paid")

    def answers(body: Mapping[str, Any]) -> JSONResponse:
        line = body["messages"][-1]["content"].split("\n")[0]
        text = json.loads(line)["turns"][-1]["text"]
        is_fooled = any(word in text.lower() for word in words)
        return JSONResponse(yes_no(0.97 if by_text.get(text, False) or is_fooled else 0.03))

    rule = folder / "refund.md"
    rule.write_text(
        "The text is about money that the writer paid or should pay: charges, refunds, invoices.\n"
    )
    task = Task("binary", ("other", "refund"))
    options = FitOptions(reads=Reads(scope="conversation"), cache_root=folder / "cache")
    pool = Pool(load_backbone("smollm2"), examples, task, options)
    criterion = Criterion(rule)
    with scripted_judge() as judge:
        judge.reply = answers
        settings = judge.settings(model="scripted", criterion=criterion.text)
        retained = ReviewFile(folder / "answers.jsonl")
        review = Review(pool, settings, criterion, retained, shuffled=shuffled(pool.examples))
        queue = LabelQueue(
            pool,
            LabelFile(folder / "refunds.jsonl"),
            column="refund",
            labelled={},
            folder=folder / "refund",
            criterion=criterion,
            review=review,
        )
        # Playwright has a running loop in this thread.
        with ThreadPoolExecutor() as threads:
            threads.submit(queue.ask).result()
    while review.summarise(queue.people)["state"] == "open":
        row = queue.next()
        queue.label(row, [task.labels[truth[row]]])
    with (
        listening(create_app(queue, "token")) as address,
        page_at(browser, f"{address}/#token", viewport=SIZE) as page,
    ):
        page.get_by_text("Balanced agreement with you").wait_for()
        first, second = (page.locator(name).bounding_box() for name in ("#criterion", "#judge"))
        area = {
            "x": first["x"] - 8,
            "y": first["y"] - 8,
            "width": first["width"] + 16,
            "height": min(second["y"] + second["height"] - first["y"] + 16, 900),
        }
        page.screenshot(path=PICTURES / "criterion.png", full_page=True, clip=area)


if __name__ == "__main__":
    with chromium() as browser, TemporaryDirectory() as folder:
        draw_playground(browser)
        draw_labelling(browser, Path(folder))
        draw_criterion(browser, Path(folder))
