"""The page at ``/playground`` in a real browser, on a real server."""

from dataclasses import replace

import numpy as np
import pytest

from browser import chromium, needs_chromium, page_at, violations
from live import served
from sidelight.engines.transformers import TransformersEngine
from sidelight.policy.rules import Policy, Rule
from sidelight.prompts import Reads
from sidelight.thresholds import OperatingCurve
from tiny import INTENT, TOPICS, tiny_backbone, untrained_probe

pytestmark = needs_chromium


def with_curves(probe):
    """The probe with the curve of each label on 200 texts."""
    random = np.random.default_rng(0)
    curves = {}
    for label in probe.label_thresholds:
        scores = random.random(200)
        holds = random.random(200) < scores
        curves[label] = OperatingCurve.of(scores, holds).to_dict()
    return replace(probe, record={"validation": {"curves": curves}})


@pytest.fixture(scope="module")
def backbone():
    return tiny_backbone()


@pytest.fixture(scope="module")
def probes(backbone):
    return [
        with_curves(untrained_probe(backbone, "toxicity")),
        with_curves(untrained_probe(backbone, "spam")),
        untrained_probe(backbone, "intent", task=INTENT, mechanism="gate"),
        with_curves(untrained_probe(backbone, "topics", task=TOPICS)),
        with_curves(untrained_probe(backbone, "refusal", reads=Reads("response"))),
    ]


@pytest.fixture(scope="module")
def address(backbone, probes):
    with served(TransformersEngine(backbone, probes), playground=True) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser, address):
    with page_at(browser, f"{address}/playground") as page:
        page.get_by_text("tiny/llama, 5 probes").wait_for()
        yield page


def test_chat(page):
    page.get_by_label("Your message").fill("Where is my refund?")
    page.keyboard.press("Enter")
    page.wait_for_timeout(1500)
    page.screenshot(path="/work/scratch/play/chat.png", full_page=True)
    print(violations(page))
