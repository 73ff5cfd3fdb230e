"""The page of ``sidelight label``: in a real browser, and asked by those who must not."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import pytest

from browser import PHONE, chromium, needs_chromium, page_at, violations
from commands import saved
from live import running
from sidelight import demo
from sidelight.artifact import save_probe
from sidelight.backbone import load_backbone
from sidelight.data.loading import load_examples
from sidelight.labelling import app as labelling_app
from sidelight.labelling.app import server_settings
from sidelight.labelling.file import LabelFile
from sidelight.labelling.pool import Pool, merged
from sidelight.labelling.queue import LabelQueue
from sidelight.manifest import read_manifest
from sidelight.prompts import Reads
from test_labelling import Sitting, texts_of
from tiny import untrained_probe

TOKEN = "a-token-of-this-test"
KEYS = {"fine": "1", "toxic": "2"}


@pytest.fixture
def sitting(tiny, tmp_path):
    return Sitting(tiny, tmp_path)


@pytest.fixture
def address(sitting) -> Iterator[str]:
    with running(server_settings(sitting.queue, TOKEN)) as address:
        yield address


@pytest.fixture
def http(address) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with httpx.Client(base_url=address, headers=headers, timeout=10) as client:
        yield client


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser, address):
    with page_at(browser, f"{address}/#{TOKEN}") as page:
        page.get_by_text("of 60 labelled").wait_for()
        yield page


def saved_labels(sitting):
    return [json.loads(line)["label"] for line in sitting.out.read_text().splitlines()]


def wait_for_labels(page, count):
    page.get_by_text(f"{count} of 60 labelled,").wait_for()


def press_truth(page, sitting):
    """Labels the text that the page shows, by its key."""
    shown = page.locator("#text .text").inner_text()
    (row,) = [row for row, cells in enumerate(sitting.rows) if cells["text"] == shown]
    done = len(sitting.queue.decided)
    page.keyboard.press(KEYS[sitting.truth[row][0]])
    wait_for_labels(page, done + 1)
    return row


# Who may ask.


def test_who_does_not_know_the_token_learns_and_changes_nothing(sitting, http, address):
    wrong = [{}, {"Authorization": "Bearer x"}, {"Authorization": TOKEN}, {"Cookie": TOKEN}]
    with httpx.Client(base_url=address) as stranger:
        for headers in wrong:
            asked = stranger.get("/api/state", headers=headers)
            told = stranger.post("/api/label", json={"row": 0, "labels": ["fine"]}, headers=headers)
            assert (asked.status_code, told.status_code) == (401, 401)
            assert sitting.rows[0]["text"] not in asked.text + told.text
        pages = [stranger.get(path) for path in labelling_app._FILES]
    assert [page.status_code for page in pages] == [200] * len(pages)
    assert not any(row["text"] in page.text for page in pages for row in sitting.rows)
    assert not any(TOKEN in page.text for page in pages)
    assert saved_labels(sitting) == []
    assert http.get("/api/state").status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        # A name of another site that leads to this machine.
        ({"Host": "evil.example"}, 421),
        ({"Host": "evil.example:{port}"}, 421),
        ({"Host": "localhost:{port}"}, 421),
        ({"Host": "127.0.0.1:1"}, 421),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Origin": "http://localhost:{port}"}, 403),
        ({"Origin": "null"}, 403),
    ],
)
def test_other_hosts_and_origins_are_refused_even_with_the_token(sitting, http, headers, status):
    port = http.base_url.port
    headers = {name: value.format(port=port) for name, value in headers.items()}
    body = {"row": 0, "labels": ["fine"]}
    for asked in (
        http.get("/", headers=headers),
        http.get("/api/state", headers=headers),
        http.post("/api/label", json=body, headers=headers),
    ):
        assert asked.status_code == status
    assert saved_labels(sitting) == []
    own = {"Origin": f"http://127.0.0.1:{port}"}
    assert http.post("/api/label", json=body, headers=own).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/../pyproject.toml",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/static/..%2fapp.py",
        "//etc/passwd",
        "/label.js/../../queue.py",
        "/index.html",
        "/docs",
        "/openapi.json",
    ],
)
def test_no_path_leads_to_another_file(http, path):
    asked = http.build_request("GET", http.base_url)
    asked.url = asked.url.copy_with(raw_path=path.encode())
    assert http.send(asked).status_code == 404


def test_pages_ask_nothing_of_other_sites_and_run_no_inline_script(http):
    for path in labelling_app._FILES:
        headers = http.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize(
    "body",
    [
        "{",
        '{"row": 0}',
        '{"row": "0", "labels": ["fine"]}',
        '{"row": 0, "labels": ["fine"], "x": 1}',
    ],
)
def test_a_malformed_decision_is_refused(sitting, http, body):
    headers = {"Content-Type": "application/json"}
    assert http.post("/api/label", content=body, headers=headers).status_code == 422
    assert saved_labels(sitting) == []


@pytest.mark.parametrize("row", [-1, 60, 10**12])
def test_a_text_that_does_not_exist_is_refused(sitting, http, row):
    told = http.post("/api/label", json={"row": row, "labels": ["fine"]})
    assert (told.status_code, saved_labels(sitting)) == (400, [])


def test_decisions_at_the_same_time_are_each_saved_once(sitting, http):
    """Eight tabs label all texts at once: each text is in the file once, and no row is torn."""
    codes = []

    def label_all():
        with httpx.Client(base_url=http.base_url, headers=http.headers, timeout=30) as own:
            for row in range(60):
                told = own.post("/api/label", json={"row": row, "labels": ["fine"]})
                codes.append(told.status_code)

    tabs = [threading.Thread(target=label_all) for _ in range(8)]
    for tab in tabs:
        tab.start()
    for tab in tabs:
        tab.join()
    assert sorted(set(codes)) == [200, 409]
    assert codes.count(200) == 60
    ids = [json.loads(line)["id"] for line in sitting.out.read_text().splitlines()]
    assert sorted(ids) == list(range(60))


def test_a_training_that_fails_is_told_and_labelling_goes_on(sitting, http):
    assert http.post("/api/train").status_code == 400
    sitting.label(40)
    sitting.folder.joinpath("probe").write_text("a file, where a folder has to be")
    http.post("/api/train")
    while (state := http.get("/api/state").json())["training"]["is_running"]:
        pass
    assert "Cannot write the probe" in state["training"]["failure"]
    assert http.post(
        "/api/label", json={"row": state["text"]["row"], "labels": ["fine"]}
    ).is_success


# In a browser.


@needs_chromium
def test_from_no_labels_to_a_probe_by_keys_alone(sitting, page):
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
    page.get_by_text("The 5 texts labelled since").wait_for()
    assert len(saved_labels(sitting)) == done + 5
    assert read_manifest(sitting.folder / "probe").task.labels == ("fine", "toxic")
    assert violations(page) == []


@needs_chromium
def test_skip_and_undo_by_keys(sitting, page):
    first = page.locator("#text .text").inner_text()
    page.keyboard.press("s")
    page.get_by_text("1 skipped").wait_for()
    assert page.locator("#text .text").inner_text() != first
    page.keyboard.press("1")
    wait_for_labels(page, 1)
    page.keyboard.press("u")
    wait_for_labels(page, 0)
    page.keyboard.press("u")
    page.get_by_text("0 skipped").wait_for()
    assert page.locator("#text .text").inner_text() == first
    assert page.get_by_role("button", name="Undo").is_disabled()


@needs_chromium
def test_a_key_that_is_held_down_or_belongs_to_the_browser_decides_nothing_more(sitting, page):
    page.keyboard.down("1")
    for _ in range(5):
        page.keyboard.down("1")
    page.keyboard.up("1")
    wait_for_labels(page, 1)
    page.keyboard.press("Control+2")
    page.get_by_role("checkbox", name="Keys").uncheck()
    page.keyboard.press("2")
    page.get_by_role("button", name="toxic").click()
    wait_for_labels(page, 2)
    assert saved_labels(sitting) == ["fine", "toxic"]


@needs_chromium
def test_a_second_tab_that_is_late_sees_what_the_first_decided(sitting, page, browser, address):
    with page_at(browser, f"{address}/#{TOKEN}") as late:
        late.expected_errors = ("409",)
        late.get_by_text("0 of 60").wait_for()
        press_truth(page, sitting)
        late.keyboard.press("1")
        late.get_by_text("has been labelled already").wait_for()
        assert late.locator("#text").inner_text() == page.locator("#text").inner_text()
        late.keyboard.press("2")
        wait_for_labels(late, 2)
    assert len(saved_labels(sitting)) == 2


@needs_chromium
def test_html_in_a_text_is_shown_as_its_letters(tiny, tmp_path, browser):
    sitting = Sitting(tiny, tmp_path)
    attack = "<img src=x onerror='document.title=1'><script>document.title=2</script></div>"
    sitting.rows = [{"text": attack}]
    sitting.begin_again()
    with (
        running(server_settings(sitting.queue, TOKEN)) as address,
        page_at(browser, f"{address}/#{TOKEN}") as page,
    ):
        page.get_by_text("0 of 1").wait_for()
        assert page.locator("#text .text").inner_text() == attack
        assert page.title() == "Sidelight: label"


@needs_chromium
def test_a_long_text_scrolls_and_says_what_probes_read(tiny, tmp_path, browser):
    sitting = Sitting(tiny, tmp_path)
    sitting.rows = [{"text": "a very long text\n" * 200}]
    sitting.begin_again()
    with (
        running(server_settings(sitting.queue, TOKEN)) as address,
        page_at(browser, f"{address}/#{TOKEN}", viewport=PHONE) as page,
    ):
        page.get_by_text("Probes read").wait_for()
        button = page.get_by_role("button", name="toxic")
        box = button.bounding_box()
        assert 0 <= box["y"] <= PHONE["height"] - box["height"]
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        assert violations(page) == []


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_several_labels_are_chosen_and_saved(tiny, tmp_path, browser, scheme):
    sitting = Sitting(tiny, tmp_path, "multilabel")
    with (
        running(server_settings(sitting.queue, TOKEN)) as address,
        page_at(browser, f"{address}/#{TOKEN}", color_scheme=scheme) as page,
    ):
        page.get_by_text("0 of 60").wait_for()
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


@needs_chromium
def test_without_the_token_the_page_says_what_to_open(browser, address):
    with page_at(browser, address) as page:
        page.expected_errors = ("401",)
        page.get_by_text("Open the address that 'sidelight label' printed").wait_for()
        assert page.locator("#sitting").is_hidden()


@needs_chromium
def test_another_site_can_neither_read_nor_post(sitting, browser, address, tmp_path):
    """From a page of another origin, and from one in a frame."""
    evil = tmp_path / "evil"
    evil.mkdir()
    (evil / "index.html").write_text("<title>evil</title>")
    server = subprocess.Popen(
        [sys.executable, "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(evil)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={"PYTHONUNBUFFERED": "1"},
        text=True,
    )
    try:
        port = server.stdout.readline().split(" port ")[1].split()[0]
        context = browser.new_context()
        page = context.new_page()
        page.goto(f"http://127.0.0.1:{port}/")
        attempts = page.evaluate(
            """async ([address, token]) => {
              const body = JSON.stringify({ row: 0, labels: ["fine"] });
              const tries = [
                ["api/state", {}],
                ["api/label", { method: "POST", body, mode: "no-cors" }],
                ["api/label", { method: "POST", body, headers: {
                  "Content-Type": "application/json" } }],
                ["api/label", { method: "POST", body, headers: {
                  Authorization: `Bearer ${token}` } }],
              ];
              const said = [];
              for (const [path, options] of tries) {
                const answer = await fetch(`${address}/${path}`, options).catch(() => null);
                said.push(answer ? `${answer.type} ${await answer.text()}` : "refused");
              }
              const frame = document.createElement("iframe");
              frame.src = `${address}/#${token}`;
              document.body.append(frame);
              await new Promise((done) => { frame.onload = done; setTimeout(done, 2000); });
              return said;
            }""",
            [address, TOKEN],
        )
        assert attempts == ["refused", "opaque ", "refused", "refused"]
        assert "of 60 labelled" not in "".join(
            frame.content() for frame in page.frames[1:] if not frame.is_detached()
        )
        context.close()
    finally:
        server.terminate()
        server.wait()
        server.stdout.close()
    assert saved_labels(sitting) == []


@needs_chromium
@pytest.mark.unchecked
@pytest.mark.skipif(
    "SIDELIGHT_PICTURES" not in os.environ,
    reason="set SIDELIGHT_PICTURES=1 to draw the docs' picture with the embedded model",
)
def test_the_picture_of_the_docs_is_of_this_page(browser, tmp_path):
    picture = Path(__file__).parents[1] / "docs" / "pictures" / "label.png"
    texts = load_examples(Path(demo.__file__).parent / "data" / "urgency_train.jsonl")
    examples, _ = merged(texts, None)
    reads = Reads(scope="conversation")
    pool = Pool(
        load_backbone("smollm2"), examples, texts.task, reads=reads, root=tmp_path / "cache"
    )
    with closing(LabelFile(tmp_path / "labels.jsonl")) as file:
        folder = tmp_path / "probe"
        queue = LabelQueue(pool, file, column="label", labelled={}, folder=folder)
        for count in (60, 20):
            for _ in range(count):
                row = queue.next()
                queue.label(row, texts.label_names()[row])
            queue.train()
        size = {"width": 900, "height": 900}
        with (
            running(server_settings(queue, TOKEN)) as address,
            page_at(browser, f"{address}/#{TOKEN}", viewport=size) as page,
        ):
            page.get_by_text("least certain first").wait_for()
            page.screenshot(path=picture, full_page=True)


@contextmanager
def started(folder, *options):
    """The process, with the address that it prints and all that it prints."""
    command = [sys.executable, "-m", "sidelight", "label", "texts.jsonl", *options]
    with subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        said = []
        try:
            for line in process.stdout:
                said.append(line)
                if line.startswith("Label at "):
                    yield process, line.split()[2], said
            assert process.wait(30) == 0, said
        finally:
            process.kill()


@needs_chromium
def test_the_command_from_start_to_end(tiny, tmp_path, browser):
    """As a user starts it, with the address that it prints; no text is in what it logs."""
    rows, _ = texts_of("binary", 60)
    (tmp_path / "texts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    model = ["--model", saved(tiny, tmp_path / "model"), "--cache", str(tmp_path / "cache")]
    with started(tmp_path, "--labels", "fine,toxic", *model) as (process, address, said):
        with page_at(browser, address) as page:
            page.get_by_text("0 of 60").wait_for()
            page.keyboard.press("1")
            wait_for_labels(page, 1)
        process.send_signal(signal.SIGINT)
    assert said[-2] == "1 texts are labelled in texts-labels.jsonl (1 of them just now).\n"
    assert said[-1].startswith("Next: sidelight train --data texts-labels.jsonl --out ")
    assert not any(row["text"] in line for row in rows for line in said)
    save_probe(untrained_probe(tiny, "one"), tmp_path / "one")
    with started(tmp_path, "--probe", "one", *model) as (process, address, said):
        address, _, token = address.partition("#")
        headers = {"Authorization": f"Bearer {token}"}
        state = httpx.get(f"{address}api/state", headers=headers).json()
        process.send_signal(signal.SIGINT)
    assert (state["done"], [*state["text"]["opinions"]]) == (1, ["one"])
