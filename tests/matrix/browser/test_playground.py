"""The page at ``/playground``, in a real browser on a real server.

``page_at`` fails if a page asks another origin or writes an error to the console.
"""

import re
from contextlib import contextmanager
from threading import Semaphore

import pytest
from browser import PHONE, chromium, needs_chromium, page_at, violations

from sidelight.engines.transformers.engine import TransformersEngine
from sidelight.models.conversation import Reads
from sidelight.policy.rules import Policy, Rule, read_policy, require_policy_applies
from worlds.data import with_curves
from worlds.models import INTENT, NAMES_AND_PLACES, TOPICS, spans_probe, untrained_probe
from worlds.servers import MODEL, http_client, served

pytestmark = [needs_chromium, pytest.mark.xdist_group("playground")]
KEY = "user-key"
TEXT = "Where is my 💶 refund?"
PROMPT_PROBES = ("toxicity", "spam", "intent", "topics")
TABS = ("Chat", "Why", "Thresholds", "Compare")


@pytest.fixture(scope="module")
def probes(tiny):
    return [
        with_curves(untrained_probe(tiny, "toxicity")),
        with_curves(untrained_probe(tiny, "spam", reads=Reads(scope="each_turn"))),
        untrained_probe(tiny, "intent", task=INTENT, mechanism="gate"),
        with_curves(untrained_probe(tiny, "topics", task=TOPICS)),
        with_curves(untrained_probe(tiny, "refusal", reads=Reads("response"))),
    ]


@pytest.fixture(scope="module")
def address(tiny, probes):
    with served(TransformersEngine(tiny, probes), playground=True) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser, address):
    with opened(browser, address) as page:
        yield page


@contextmanager
def opened(browser, address, **settings):
    with page_at(browser, f"{address}/playground", **settings) as page:
        page.get_by_text(f"{MODEL}, 5 probes").wait_for()
        yield page


@contextmanager
def showing(browser, backbone, probes, *, settings=None, **options):
    """The page of a server of these probes."""
    with (
        served(TransformersEngine(backbone, probes), playground=True, **options) as address,
        page_at(browser, f"{address}/playground", **(settings or {})) as page,
    ):
        page.get_by_text(f"{MODEL}, {len(probes)} probes").wait_for()
        yield page


@contextmanager
def gated(tiny):
    """The model waits before each pass until one more is released."""
    passes = Semaphore(0)
    hook = tiny.model.register_forward_pre_hook(lambda *_: passes.acquire(timeout=60) and None)
    try:
        yield passes
    finally:
        hook.remove()
        passes.release(1000)


def say(page, text=TEXT, *, tokens=20):
    page.get_by_label("Max tokens").fill(str(tokens))
    page.get_by_label("Your message").fill(text)
    page.keyboard.press("Enter")


def ask(address, path, body):
    with http_client(address) as http:
        answer = http.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()


def verdict(address, probe):
    body = {"input": TEXT, "probes": [probe]}
    (found,) = ask(address, "/v1/moderations", body)["results"][0]["sidelight"]["verdicts"]
    return found


def explanation(address, probe, *turns):
    messages = [{"role": role, "content": text} for role, text in turns or [("user", TEXT)]]
    questions = [{"type": "predicate", "name": probe}]
    body = {"model": MODEL, "input": messages, "questions": questions, "explain": "matrix"}
    return ask(address, "/v1/decisions", body)["explanations"][0]


def word_shares(found):
    """What the tokens of each word of ``TEXT`` add up to, as the page writes it."""
    words = [(m.start(), m.end()) for m in re.finditer(r"\s*\S+", TEXT)]
    sums = [
        sum(token["share"] for token in found["tokens"] if first <= token["start"] < end)
        for first, end in words
    ]
    return [share_label(total) for total in sums]


def share_label(share):
    text = f"{share:+.2f}"
    return "0.00" if text[1:] == "0.00" else text.replace("-", "\N{MINUS SIGN}")


def choose(page, tab):
    page.get_by_role("tab", name=tab).click()


def prompts_chips(page, count=4):
    chips = page.get_by_label("Verdicts on this prompt").get_by_role("button")
    chips.nth(count - 1).wait_for()
    return chips


def test_verdicts_precede_streamed_text_and_running_score(page, tiny):
    answer = page.get_by_role("article", name=MODEL).locator(".text")
    with gated(tiny) as passes:
        say(page)
        page.get_by_text("Classifying…").wait_for()
        passes.release()
        names = [chip.locator("b").inner_text() for chip in prompts_chips(page).all()]
        assert names == [*PROMPT_PROBES]
        lengths = [len(answer.inner_text())]
        for _ in range(3):
            passes.release(6)
            page.wait_for_function(
                "n => document.querySelector('.assistant .text').textContent.length > n",
                arg=lengths[-1],
            )
            lengths.append(len(answer.inner_text()))
        assert page.get_by_role("article", name=MODEL).get_attribute("aria-busy") == "true"
        score = page.get_by_role("img", name="Running score. refusal: toxic")
        score.wait_for()
        drawn_before = score.locator("path").get_attribute("d")
        # In percent from above.
        assert score.locator("line").get_attribute("y1") == "50"
    page.get_by_text("20 tokens, then the limit").wait_for()
    assert lengths == sorted(set(lengths))
    drawn = score.locator("path").get_attribute("d")
    assert drawn.startswith(drawn_before)
    assert drawn.count("L") >= 18


def test_running_response_can_be_stopped(page, tiny):
    with gated(tiny) as passes:
        say(page)
        passes.release(4)
        page.get_by_role("article", name=MODEL).wait_for()
        page.get_by_role("button", name="Stop").click()
        page.get_by_text("Stopped.").wait_for()


def test_verdict_chips_show_flags_and_shade_words_by_share(page, address):
    say(page, tokens=1)
    asked = page.get_by_role("article", name="You")
    for chip, name in zip(prompts_chips(page).all(), PROMPT_PROBES, strict=True):
        expected, text = verdict(address, name), chip.inner_text()
        assert ("not flagged" in text) != expected["flagged"]
        assert f"{expected['probabilities'][expected['label']]:.2f}" in text
    for name in ("toxicity", "intent"):
        page.get_by_role("button", name=name).click()
        asked.get_by_role("table").wait_for()
        shares = asked.locator(".text .share")
        assert [share.get_attribute("title") for share in shares.all()] == word_shares(
            explanation(address, name)
        )
        assert page.get_by_role("button", name=name).get_attribute("aria-pressed") == "true"
    colour = "each => getComputedStyle(each).backgroundColor"
    assert len({share.evaluate(colour) for share in shares.all()}) > 1
    rows = asked.get_by_role("row").all()[1:]
    told = [row.get_by_role("cell").nth(1).inner_text() for row in rows]
    assert sorted(told) == sorted(word_shares(explanation(address, "intent")))
    # From here to the shares of each token in each layer.
    page.get_by_role("button", name="Heat map of this text").click()
    heat = page.get_by_role("region", name="Heat map of tokens and layers")
    heat.wait_for()
    tokens = explanation(address, "intent")["tokens"]
    assert [cell.get_attribute("aria-label") for cell in heat.get_by_role("cell").all()] == [
        share_label(share) for token in tokens for share in token["layers"]
    ]
    heat.focus()
    for step in ("ArrowDown", "ArrowDown", "ArrowRight"):
        page.keyboard.press(step)
    assert page.get_by_text(f"“e”, layer 1: {share_label(tokens[2]['layers'][1])}").is_visible()


def test_conversation_continues_and_earlier_messages_can_decide(page, address):
    for number, text in enumerate((TEXT, "Why?")):
        say(page, text, tokens=1)
        page.get_by_text("1 tokens, then").nth(number).wait_for()
    answer = page.get_by_role("article", name=MODEL).first.locator(".text").inner_text()
    found = explanation(address, "spam", ("user", TEXT), ("assistant", answer), ("user", "Why?"))
    assert {token["message"] for token in found["tokens"]} == {0}
    first, later = page.get_by_role("button", name="spam").all()
    assert "earlier" not in first.inner_text()
    assert f"by the earlier “{TEXT}”" in later.inner_text()
    page.get_by_role("button", name="spam").nth(1).click()
    page.get_by_text(f"Your message “{TEXT}” decided").wait_for()
    # What a screen reader is told.
    assert page.get_by_role("log", name="Conversation").get_by_role("article").count() == 4
    assert page.get_by_role("button", name="toxicity").first.locator(".unseen").count() == 1
    assert page.locator("#why-result, #compare-result").evaluate_all(
        "all => all.map(each => each.ariaLive)"
    ) == ["polite", "polite"]
    page.get_by_role("button", name="New chat").click()
    assert page.get_by_role("article").count() == 0


def test_page_names_the_blocking_probe_and_where_text_is_cut(browser, tiny, probes):
    always = Rule("block", threshold=0.0)
    blocking, cutting = Policy(input={"toxicity": always}), Policy(output={"refusal": always})
    with showing(browser, tiny, probes, policy=blocking) as page:
        page.expected_errors = ("status of 400",)
        say(page)
        page.get_by_text("The prompt was blocked by toxicity.").wait_for()
        chips = page.get_by_label("Verdicts on this prompt").get_by_role("listitem")
        assert "⚑ toxic" in chips.first.inner_text()
        # Its scores are withheld, and so is its curve.
        assert not re.search(r"\d", chips.first.inner_text())
        choose(page, "Thresholds")
        page.get_by_role("combobox", name="Probe", exact=True).select_option("toxicity")
        assert page.get_by_text("discloses no scores of this probe to your key").is_visible()
    with showing(browser, tiny, probes, policy=cutting) as page:
        say(page)
        page.get_by_text(re.compile(r"Cut by the policy after \d+ tokens")).wait_for()


def test_response_probe_explanation_includes_the_response(page):
    choose(page, "Why")
    page.get_by_role("combobox", name="Probe", exact=True).select_option("refusal")
    page.get_by_label("The model's answer, which this probe reads").fill("I cannot help.")
    page.get_by_role("button", name="Explain").click()
    result = page.locator("#why-result")
    result.get_by_text("Orange words speak for “toxic”").wait_for()
    assert "I cannot help." in result.locator(".text").inner_text()


def test_threshold_slider_reports_counts_and_exports_a_valid_policy(page, probes, tmp_path):
    choose(page, "Thresholds")
    chosen = page.get_by_role("combobox", name="Probe", exact=True)
    curve = probes[1].card.training.curves["toxic"]
    chosen.select_option("spam")
    slider = page.get_by_role("slider", name="Threshold:")
    for key, point in (("Home", -1), ("End", 0), ("ArrowLeft", 1), ("PageDown", None)):
        slider.press(key)
        at = len(curve.thresholds) - 1 - int(slider.input_value())
        assert point is None or at == range(len(curve.thresholds))[point]
        caught, alarms = curve.true_positives[at], curve.false_positives[at]
        assert page.get_by_text(f"Catches {caught} of {curve.positives} texts").is_visible()
        assert page.get_by_text(f"Falsely flags {alarms} of {curve.negatives} others").is_visible()
        told = slider.get_attribute("aria-valuetext")
        assert told.startswith(f"{curve.thresholds[at]:.3f}: Catches {caught} of")
    for name, mode in (("toxicity", "block"), ("topics", "flag"), ("refusal", "block")):
        chosen.select_option(name)
        page.get_by_label("What a flag does").select_option(mode)
        slider.press("ArrowRight")
    with page.expect_download() as downloading:
        page.get_by_role("button", name="Download policy.toml").click()
    path = tmp_path / "policy.toml"
    downloading.value.save_as(path)
    policy = read_policy(path)
    require_policy_applies(policy, probes)
    assert path.read_text() == page.get_by_role("region", name="Policy file").inner_text()
    modes = {name: rule.mode for name, rule in policy.input.items()}
    assert modes == {"spam": modes.get("spam"), "toxicity": "block", "topics": "flag"}
    assert policy.input["topics"].labels == ("violence",)
    assert policy.output["refusal"].mode == "block"
    curve = probes[0].card.training.curves["toxic"]
    assert min(abs(policy.input["toxicity"].threshold - each) for each in curve.thresholds) < 1e-6


@pytest.fixture(scope="module")
def labelling(tiny):
    """A probe of prompts and one of answers that label words."""
    sides = {"early": "prompt", "late": "response"}
    return [
        with_curves(spans_probe(tiny, name, side=side, threshold=0.8))
        for name, side in sides.items()
    ]


def highlights(article):
    """The marked words of a message, each with its labels."""
    return article.locator("mark").evaluate_all(
        "all => all.map(mark => [mark.firstChild.data, mark.lastChild.lastChild.data])"
    )


def labelled(text, spans):
    """The words of overlapping spans, each with all labels, from the spans themselves."""
    runs = []
    for span in spans:
        start, end = span["start"], span["end"]
        if runs and start < runs[-1][1]:
            start, last, labels = runs.pop()
            end, labels = max(last, end), labels | {span["label"]: None}
        else:
            labels = {span["label"]: None}
        runs.append((start, end, labels))
    return [[text[start:end], ", ".join(labels)] for start, end, labels in runs]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_labelled_spans_are_highlighted_in_prompts_and_responses(browser, tiny, labelling, scheme):
    texts = ["Is 💶 for Ann Lee in Rome?", "Or <b>for</b> Bo?"]
    turns = []
    with showing(browser, tiny, labelling, settings={"color_scheme": scheme}) as page:
        for number, text in enumerate(texts):
            say(page, text)
            page.get_by_text("20 tokens, then").nth(number).wait_for()
            turns.append({"role": "user", "content": text})
            body = {"model": MODEL, "messages": turns, "max_tokens": 20, "temperature": 0}
            completion = ask(page.url.partition("/playground")[0], "/v1/chat/completions", body)
            turns.append(completion["choices"][0]["message"])
            prompt_spans, response_spans = (
                verdict["spans"] for verdict in completion["sidelight"]["verdicts"]
            )
            turn_spans = [
                span for span in prompt_spans if span.get("message", 2 * number) == 2 * number
            ]
            for who, content, spans in (
                ("You", text, turn_spans),
                (MODEL, turns[-1]["content"], response_spans),
            ):
                article = page.get_by_role("article", name=who).nth(number)
                assert highlights(article) == labelled(content, spans)
                assert highlights(article)
        assert {label for _, label in highlights(page)} >= {*NAMES_AND_PLACES.labels}
        title = page.locator("mark").first.get_attribute("title")
        assert re.match(r"“.+” (NAME|PLACE) [01]\.\d\d, by early", title)
        assert violations(page) == []
        # Shaded words have no marks, and they come back.
        asked = page.get_by_role("article", name="You").last
        before = highlights(asked)
        chip = asked.get_by_role("button", name="early")
        chip.click()
        asked.locator("small").first.wait_for(state="detached")
        chip.click()
        assert highlights(asked) == before


def test_redacted_words_are_displayed_as_sent(browser, tiny, labelling):
    # This key sees the spans of the text as it was.
    policy = Policy(output={"late": Rule("redact", disclose="scores")})
    with showing(browser, tiny, labelling, policy=policy) as page:
        say(page)
        page.get_by_text("20 tokens, then").wait_for()
        answer = page.get_by_role("article", name=MODEL)
        assert re.search(r"\[(NAME|PLACE)\]", answer.locator(".text").inner_text())
        assert highlights(answer) == []
        assert highlights(page.get_by_role("article", name="You"))


def test_redact_mode_is_available_only_for_span_probes(browser, tiny, probes, labelling, tmp_path):
    loaded = [*labelling, *probes[:1]]
    with showing(browser, tiny, loaded) as page:
        choose(page, "Thresholds")
        chosen = page.get_by_role("combobox", name="Probe", exact=True)
        mode = page.get_by_label("What a flag does")
        redact = mode.locator("[value=redact]")
        chosen.select_option("toxicity")
        assert redact.is_disabled()
        for name in ("early", "late"):
            chosen.select_option(name)
            assert redact.is_enabled()
            mode.select_option("redact")
        path = tmp_path / "policy.toml"
        path.write_text(page.get_by_role("region", name="Policy file").inner_text())
    policy = read_policy(path)
    require_policy_applies(policy, loaded)
    assert policy == Policy(input={"early": Rule("redact")}, output={"late": Rule("redact")})


def test_compare_tab_shows_two_probes_side_by_side(page, address):
    choose(page, "Compare")
    page.get_by_label("Probe A").select_option("spam")
    page.get_by_label("Probe B").select_option("intent")
    page.locator("#compare-text").fill(TEXT)
    page.locator("#compare").get_by_role("button", name="Compare").click()
    for side, name in (("Probe A", "spam"), ("Probe B", "intent")):
        region = page.get_by_role("region", name=side)
        region.wait_for()
        for label, probability in verdict(address, name)["probabilities"].items():
            assert region.get_by_role("row", name=f"{label} {probability:.3f}").is_visible()
        shares = region.locator(".text .share").all()
        assert [each.get_attribute("title") for each in shares] == word_shares(
            explanation(address, name)
        )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"color_scheme": "dark", "viewport": PHONE},
    ],
    ids=["light", "dark phone"],
)
def test_page_is_accessible_and_nothing_overflows(browser, address, settings):
    with opened(browser, address, **settings) as page:
        say(page, tokens=8)
        page.get_by_text("8 tokens, then").wait_for()
        page.get_by_role("button", name="toxicity").click()
        page.get_by_role("article", name="You").get_by_role("table").wait_for()
        require_accessible(page)
        choose(page, "Why")
        page.get_by_role("button", name="Explain").click()
        page.get_by_role("button", name="Show the heat map").click()
        page.get_by_role("region", name="Heat map").wait_for()
        require_accessible(page)
        choose(page, "Thresholds")
        page.get_by_role("slider", name="Threshold:").press("ArrowLeft")
        require_accessible(page)
        choose(page, "Compare")
        page.locator("#compare").get_by_role("button", name="Compare").click()
        page.get_by_role("region", name="Probe B").wait_for()
        page.get_by_text("Key", exact=True).click()
        require_accessible(page)
        is_dark = settings.get("color_scheme") == "dark"
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (max(map(int, re.findall(r"\d+", background))) < 128) == is_dark


def require_accessible(page):
    assert violations(page) == []
    sizes = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert sizes[0] <= sizes[1]


def test_page_is_usable_with_only_a_keyboard(page):
    page.get_by_role("tab", name="Chat").focus()
    for tab in (*TABS[1:], TABS[0]):
        page.keyboard.press("ArrowRight")
        assert page.evaluate("document.activeElement.textContent") == tab
        assert page.get_by_role("tabpanel", name=tab).is_visible()
    # The other tabs are passed over.
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.type("Where is it?")
    page.keyboard.press("Enter")
    prompts_chips(page)
    page.get_by_text("tokens").last.wait_for()
    page.get_by_role("button", name="toxicity").press("Enter")
    page.get_by_role("article", name="You").get_by_role("table").wait_for()


def test_page_needs_no_key_but_its_api_calls_do(browser, tiny, probes):
    engine = TransformersEngine(tiny, probes)
    with (
        served(engine, playground=True, api_key=KEY) as address,
        page_at(browser, f"{address}/playground") as page,
    ):
        asked = []
        page.expected_errors = ("status of 401",)
        page.on("request", lambda request: asked.append(request.url))
        page.get_by_text("This server needs an API key").wait_for()
        page.keyboard.type("another")
        page.keyboard.press("Enter")
        page.get_by_text("The server does not know this key").wait_for()
        page.keyboard.press("Control+A")
        page.keyboard.type(KEY)
        page.keyboard.press("Enter")
        page.get_by_text(f"{MODEL}, 5 probes").wait_for()
        say(page, tokens=2)
        page.get_by_text("2 tokens, then").wait_for()
        assert KEY not in "".join([*asked, page.url])
        assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]


def test_page_blocks_external_requests_and_injected_scripts(browser, address):
    with opened(browser, address) as page:
        page.expected_errors = ("Content Security Policy", "violates", "asks http://127.0.0.2")
        failure = page.evaluate("fetch('http://127.0.0.2:1/x').catch(error => error.name)")
        assert failure == "TypeError"
        page.evaluate(
            """() => {
                const script = document.createElement('script');
                script.textContent = 'window.ran = true';
                document.body.append(script);
            }"""
        )
        assert page.evaluate("window.ran") is None
        # What is written is never parsed.
        say(page, "<img src=x onerror=alert(1)>", tokens=1)
        page.get_by_text("<img src=x onerror=alert(1)>").first.wait_for()
        assert page.locator("article img").count() == 0
