"""The page of ``sidelight label`` in a real browser."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from browser import PHONE, chromium, needs_chromium, page_at, violations
from sitting import TOKEN, ReviewSitting, Sitting, displayed_text, saved_labels, texts_of, truthful
from starlette.responses import JSONResponse

from sidelight.probes.artifact import save_probe
from sidelight.probes.card import read_card
from sidelight_label.app import create_app
from worlds.judges import scripted_judge, yes_no
from worlds.models import saved, untrained_probe
from worlds.servers import listening

pytestmark = [needs_chromium, pytest.mark.xdist_group("label")]
KEYS = {"fine": "1", "toxic": "2"}


@pytest.fixture
def sitting(tiny, tmp_path):
    return Sitting(tiny, tmp_path)


@pytest.fixture
def address(sitting) -> Iterator[str]:
    with listening(create_app(sitting.queue, TOKEN)) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@contextmanager
def opened(browser, address, count=60, **settings):
    with page_at(browser, f"{address}/#{TOKEN}", **settings) as page:
        page.get_by_text(f"of {count} labelled").wait_for()
        yield page


@pytest.fixture
def page(browser, address):
    with opened(browser, address) as page:
        yield page


def wait_for_labels(page, count):
    page.get_by_text(f"{count} of 60 labelled,").wait_for()


def press_truth(page, sitting):
    """Labels the text that the page shows, by its key."""
    text = page.locator("#text .text").inner_text()
    (row,) = [row for row, cells in enumerate(sitting.rows) if cells["text"] == text]
    done = len(sitting.queue.decided)
    page.keyboard.press(KEYS[sitting.truth[row][0]])
    wait_for_labels(page, done + 1)
    return row


def test_keyboard_user_trains_a_probe_from_unlabelled_texts(sitting, page):
    assert page.evaluate("location.hash") == ""
    while sitting.queue.obstacle:
        assert page.get_by_role("button", name="Train").is_disabled()
        press_truth(page, sitting)
    for _ in range(10):
        press_truth(page, sitting)
    page.keyboard.press("t")
    page.get_by_text("The probe is in").wait_for()
    done = len(sitting.queue.decided)
    page.get_by_role("row", name=f"the probe of {done} labels").wait_for()
    page.get_by_text("Order: least certain first").wait_for()
    for _ in range(5):
        press_truth(page, sitting)
    page.keyboard.press("t")
    page.get_by_text(f"All {done + 5} labelled texts").wait_for()
    assert len(saved_labels(sitting)) == done + 5
    assert read_card(sitting.folder / "probe").task.labels == ("fine", "toxic")
    assert violations(page) == []


def test_keys_skip_and_undo_and_ignore_repeats_and_browser_shortcuts(sitting, page):
    first = page.locator("#text .text").inner_text()
    page.keyboard.press("s")
    page.get_by_text("1 skipped").wait_for()
    assert page.locator("#text .text").inner_text() != first
    for _ in range(5):
        page.keyboard.down("1")
    page.keyboard.up("1")
    wait_for_labels(page, 1)
    page.keyboard.press("u")
    wait_for_labels(page, 0)
    page.keyboard.press("u")
    page.get_by_text("0 skipped").wait_for()
    assert page.locator("#text .text").inner_text() == first
    assert page.get_by_role("button", name="Undo").is_disabled()
    page.keyboard.press("Control+2")
    page.get_by_role("checkbox", name="Keys").uncheck()
    page.keyboard.press("2")
    page.get_by_role("button", name="toxic").click()
    wait_for_labels(page, 1)
    assert saved_labels(sitting) == ["toxic"]


def test_second_tab_follows_the_first_and_tokenless_tab_gets_nothing(
    sitting, page, browser, address
):
    with opened(browser, address) as second_tab:
        second_tab.expected_errors = ("400",)
        press_truth(page, sitting)
        second_tab.keyboard.press("1")
        second_tab.get_by_text("has already been labelled").wait_for()
        assert second_tab.locator("#text").inner_text() == page.locator("#text").inner_text()
        second_tab.keyboard.press("2")
        wait_for_labels(second_tab, 2)
    assert len(saved_labels(sitting)) == 2
    with page_at(browser, address) as stranger:
        stranger.expected_errors = ("401",)
        stranger.get_by_text("Open the address that 'sidelight label' printed").wait_for()
        assert stranger.locator("#sitting").is_hidden()


def test_html_in_texts_is_escaped_and_long_texts_scroll(tiny, tmp_path, browser):
    sitting = Sitting(tiny, tmp_path)
    attack = "<img src=x onerror='document.title=1'><script>document.title=2</script></div>"
    sitting.rows = [{"text": attack}]
    queue = sitting.begin().queue
    with listening(create_app(queue, TOKEN)) as at, opened(browser, at, 1) as page:
        assert page.locator("#text .text").inner_text() == attack
        assert page.title() == "Sidelight: label"
    sitting.rows = [{"text": "a very long text\n" * 200}]
    queue = sitting.begin().queue
    with (
        listening(create_app(queue, TOKEN)) as at,
        opened(browser, at, 1, viewport=PHONE) as page,
    ):
        page.get_by_text("Probes read").wait_for()
        box = page.get_by_role("button", name="toxic").bounding_box()
        assert 0 <= box["y"] <= PHONE["height"] - box["height"]
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        assert violations(page) == []


def test_multiple_labels_can_be_selected_and_saved(tiny, tmp_path, browser):
    sitting = Sitting(tiny, tmp_path, "multilabel")
    with (
        listening(create_app(sitting.queue, TOKEN)) as at,
        opened(browser, at, color_scheme="dark") as page,
    ):
        for key in ("1", "3", "3", "2"):
            page.keyboard.press(key)
        pressed = page.locator("[aria-pressed=true]")
        assert pressed.count() == 2
        assert violations(page) == []
        page.keyboard.press("Enter")
        wait_for_labels(page, 1)
        assert pressed.count() == 0
        page.get_by_role("button", name="Save").click()
        wait_for_labels(page, 2)
    assert saved_labels(sitting) == [["x", "y"], []]


def test_user_checks_judge_edits_its_criterion_and_accepts_its_labels(tiny, tmp_path, browser):
    with scripted_judge() as judge:
        judge.reply = lambda body: JSONResponse(yes_no(float("a" in displayed_text(body))))
        sitting = ReviewSitting(tiny, tmp_path, judge, count=360)
        sitting.limit = 240
        sitting.begin()
        # Playwright has a running loop in this thread.
        with ThreadPoolExecutor() as threads:
            threads.submit(sitting.queue.ask).result()
        with (
            listening(create_app(sitting.queue, TOKEN)) as address,
            opened(browser, address, 360) as page,
        ):
            page.get_by_text("Label a blind sample first: 100 texts are left").wait_for()
            assert page.locator("#opinions").is_hidden()
            assert page.locator("#differences").is_hidden()
            sitting.check()
            page.reload()
            page.goto(f"{address}/#{TOKEN}")
            page.get_by_text("Its agreement is below 0.80").wait_for()
            assert page.locator("#differences tbody tr").count() > 10
            assert violations(page) == []
            rule = page.get_by_role("textbox", name="The criterion")
            save = page.get_by_role("button", name="Save the criterion")
            assert save.is_disabled()
            rule.fill("The text has a capital X, twice.")
            # A digit in the rule is no label.
            rule.press_sequentially(" 1")
            save.click()
            page.get_by_text("It has not labelled the texts under this criterion").wait_for()
            assert sitting.rule.read_text() == "The text has a capital X, twice. 1\n"
            judge.reply = truthful
            page.get_by_role("button", name="Ask the judge").click()
            page.get_by_text("Label a blind sample first").wait_for()
            page.get_by_text("On texts that you labelled outside of this sample: 1.00").wait_for()
            sitting.check()
            page.goto("about:blank")
            page.goto(f"{address}/#{TOKEN}")
            page.get_by_text("It has passed: its labels count.").wait_for()
            assert violations(page) == []
    assert len(sitting.rows_of_judge()) > 0


def test_label_command_works_end_to_end(tiny, tmp_path, browser):
    """As a user starts it, with the address that it prints; no text is in what it logs."""
    rows, _ = texts_of("binary", 60)
    (tmp_path / "texts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    model = ["--model", saved(tiny, tmp_path / "model"), "--cache", str(tmp_path / "cache")]
    save_probe(untrained_probe(tiny, "one"), tmp_path / "one")
    command = [sys.executable, "-m", "sidelight", "label", "texts.jsonl", "--probe", "one", *model]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("Label at "):
                with page_at(browser, line.split()[2]) as page:
                    page.get_by_text("0 of 60").wait_for()
                    page.keyboard.press("1")
                    wait_for_labels(page, 1)
                process.send_signal(signal.SIGINT)
    assert process.returncode == 0, lines
    assert lines[-2] == "1 texts are labelled in texts-labels.jsonl (1 in this session).\n"
    assert lines[-1].startswith("Next: sidelight train --data texts-labels.jsonl --out ")
    assert not any(row["text"] in line for row in rows for line in lines)
