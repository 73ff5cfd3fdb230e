"""Draws the pictures of the playground and of the labelling page in ``docs/pictures``.

    PYTHONPATH=tests:tests/matrix/browser .venv/bin/python .ci/pictures.py

It needs Chromium, and the probe of intents that ``sidelight demo`` leaves in the cache.
"""

import re
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

from browser import chromium, page_at
from playwright.sync_api import Browser

from sidelight import demo
from sidelight.data.loading import load_examples
from sidelight.engines.transformers.backbone import load_backbone
from sidelight.guards import probe_folder
from sidelight.models.conversation import Reads
from sidelight.models.smollm2 import cache_root
from sidelight_lab.bench.server_process import ServerProcess
from sidelight_label.app import create_app
from sidelight_label.file import LabelFile
from sidelight_label.pool import Pool, merged
from sidelight_label.queue import LabelQueue
from worlds.servers import listening

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
    reads = Reads(scope="conversation")
    pool = Pool(load_backbone("smollm2"), examples, texts.task, reads=reads, root=folder / "cache")
    with closing(LabelFile(folder / "labels.jsonl")) as file:
        queue = LabelQueue(pool, file, column="label", labelled={}, folder=folder / "probe")
        for count in (60, 20):
            for _ in range(count):
                row = queue.next()
                queue.label(row, texts.label_names()[row])
            queue.train()
        size = {"width": 900, "height": 900}
        with (
            listening(create_app(queue, "token")) as address,
            page_at(browser, f"{address}/#token", viewport=size) as page,
        ):
            page.get_by_text("least certain first").wait_for()
            page.screenshot(path=PICTURES / "label.png", full_page=True)


if __name__ == "__main__":
    with chromium() as browser, TemporaryDirectory() as folder:
        draw_playground(browser)
        draw_labelling(browser, Path(folder))
