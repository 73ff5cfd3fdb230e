"""The packaged texts: what their cards and the notice say of them holds."""

import json
import re
from collections import Counter
from functools import cache
from pathlib import Path
from runpy import run_path
from typing import Any

import numpy as np
import pytest
import torch

from sidelight.data.examples import Example, LabelledExamples
from sidelight.data.guards import find_guard
from sidelight.data.loading import load_examples
from sidelight.data.near_duplicates import NearDuplicates, are_alike
from sidelight.guards import packaged_folders, probe_folder
from sidelight.models.conversation import TokenRole
from sidelight.probes.artifact import load_probe
from sidelight.probes.bank import Bank
from sidelight.probes.card import read_card
from sidelight.training.background import load_background

NAMES = ("harmful", "injection", "pii", "refusal", "toxicity")
PACKAGE = Path(__file__).parents[1] / "src" / "sidelight_guards"
# Where the licence could not be confirmed at its source, and what may only be measured on.
UNCONFIRMED = re.compile(r"advbench|tdc|do-not-answer|hatexplain|wildguard|aegis|or-bench", re.I)
LICENCES = re.compile(r"Apache-2\.0|BSD-3-Clause|CC-BY-4\.0|CC-BY-SA-[34]\.0|CC0-1\.0|MIT|public d")
NOTICE = (PACKAGE / "NOTICE").read_text()


@cache
def examples(name: str, test: str = "") -> LabelledExamples:
    source, spans = f"guard:{name}{test and ':' + test}", find_guard(name).card.columns["spans"]
    return load_examples(source) if spans is None else load_examples(source, spans=spans)


def sources(name: str, test: str = "") -> Counter[str]:
    return Counter(str(cells["source"]) for cells in examples(name, test).rows)


@pytest.mark.parametrize("name", NAMES)
def test_installed_guard_has_examples_of_both_classes(name):
    guard = find_guard(name)
    assert guard.folder == PACKAGE / name
    assert (guard.card.reads == "response") == (name == "refusal")
    assert len(examples(name)) > 1500
    is_positive = examples(name).labels.reshape(len(examples(name)), -1).any(1)
    assert 500 < is_positive.sum() < len(is_positive) - 500
    assert not examples(name).skipped.empty_text


@pytest.mark.parametrize("name", NAMES)
def test_card_names_a_licence_for_every_source(name):
    card = find_guard(name).card
    assert set(sources(name)) == set(card.sources)
    origins = [*card.sources.values(), *card.tests.values()]
    assert [origin for origin in origins if not LICENCES.search(origin.licence)] == []


@pytest.mark.parametrize("name", NAMES)
def test_guard_texts_exclude_sources_with_unconfirmed_licences(name):
    tests = [sources(name, test) for test in find_guard(name).card.tests]
    assert [s for s in sum(tests, sources(name)) if UNCONFIRMED.search(s)] == []


def test_notice_counts_rows_of_every_source_and_test():
    told = dict(re.findall(r"^[^|]+ \| ([^|]+) \| ([\d,]+) \| \S", NOTICE, re.MULTILINE))
    trained = sum((sources(name) for name in NAMES), Counter[str]())
    tested = {
        f"{name}, {test}": len(examples(name, test))
        for name in NAMES
        for test in find_guard(name).card.tests
    }
    assert {source: int(rows.replace(",", "")) for source, rows in told.items()} == {
        **trained,
        **tested,
    }


@pytest.mark.parametrize("name", NAMES)
def test_card_tests_match_files_and_have_at_most_450_rows(name):
    tests = find_guard(name).card.tests
    files = {path.name for path in (PACKAGE / name).glob("*.jsonl.gz")}
    assert files == {"train.jsonl.gz", *(f"test_{test}.jsonl.gz" for test in tests)}
    assert all(100 <= len(examples(name, test)) <= 450 for test in tests)
    # Fewer rows would have been kept whole.
    assert {test for test in tests if len(examples(name, test)) >= 400} >= {
        test for test, card in tests.items() if card.drawn
    }


def test_guards_page_lists_example_counts_and_tests():
    page = (PACKAGE.parents[3] / "docs" / "guards.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([\d,]+) / ([\d,]+) \| (.+) \|$", page, re.MULTILINE)
    assert [name for name, *_ in rows] == sorted(NAMES, key=[row[0] for row in rows].index)
    for name, positive, negative, tests in rows:
        is_positive = examples(name).labels.reshape(len(examples(name)), -1).any(1)
        told = (int(positive.replace(",", "")), int(negative.replace(",", "")))
        assert told == (is_positive.sum(), (~is_positive).sum())
        assert re.findall(r"`(\w+)`", tests) == [*find_guard(name).card.tests]


@pytest.mark.parametrize("name", ["docs/guards.md", "README.md"])
def test_documented_tables_match_packaged_files(name):
    root = PACKAGE.parents[3]
    page = (root / name).read_text("utf-8")
    assert "<!-- table of guards" in page
    assert run_path(str(root / ".ci" / "guards.py"))["with_tables"](page) == page


def packaged(name: str, file: str) -> Any:
    return json.loads((PACKAGE / name / file).read_bytes())


@pytest.mark.parametrize("name", NAMES)
def test_packaged_probe_was_trained_on_packaged_texts(name):
    """After a change of the texts, `make guards` trains it again."""
    build, probe = packaged(name, "build.json"), load_probe(PACKAGE / name)
    assert (probe.name, probe.version) == (name, build["probe"])
    assert build["texts_sha256"] == examples(name).content_hash
    assert build["version"] == find_guard(name).card.version
    assert build["texts"] == [probe.card.training.training.rows, len(examples(name))]
    assert set(probe.task.output_labels) <= {*(find_guard(name).card.labels or probe.task.labels)}


@pytest.mark.parametrize("name", NAMES)
def test_packaged_results_match_packaged_probe_and_tests(name):
    results, version = packaged(name, "figures.json"), load_probe(PACKAGE / name).version
    tests = {test: examples(name, test).content_hash for test in find_guard(name).card.tests}
    assert {test: result["texts_sha256"] for test, result in results.items()} == tests
    assert {result["probe"] for result in results.values()} == {version}


@pytest.mark.parametrize("name", NAMES)
def test_probe_folder_resolves_guards_by_name_and_model(name):
    assert probe_folder(f"guard:{name}") == PACKAGE / name
    for folder in packaged_folders(find_guard(name)):
        digest = read_card(folder).backbone.digest
        assert probe_folder(f"guard:{name}", "a model", lambda digest=digest: digest) == folder


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_gguf_copy_matches_probe_logits(name):
    probe, copy = (load_probe(PACKAGE / name / folder) for folder in ("", "smollm2.gguf"))
    assert copy.card.training.copy_of == probe.version
    build = packaged(name, "build.json")["gguf"]
    assert build["probe"] == probe.version
    assert build["agreeing"] >= 0.99 * build["texts"] > 900
    hidden = torch.randn(31, 40, 576, generator=torch.Generator().manual_seed(0)) * 5
    token_roles = [
        bytes([TokenRole.RESPONSE if probe.reads.includes_response else TokenRole.PROMPT] * 40)
    ]
    logits: list[np.ndarray] = []
    for probe_or_copy in (probe, copy):
        bank = Bank([probe_or_copy])
        tap = bank.tap()
        for layer in range(probe_or_copy.card.backbone.layers):
            tap(layer, hidden[layer, None])
        logits += bank.logits(bank.summarise(tap.projected().flatten(0, 1), token_roles))
    np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_packaged_probes_contain_no_example_or_background_text(name):
    texts = {turn.content for turns in load_background("packaged").conversations for turn in turns}
    texts |= {turn.content for item in examples(name).items for turn in item.messages}
    for folder in packaged_folders(find_guard(name)):
        record = load_probe(folder).card.to_json()
        # Beginnings too; names of sources are short.
        assert not [text for text in texts if len(text) > 40 and text[:40] in record]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_training_texts_are_not_near_duplicates_of_test_texts(name):
    training = examples(name)
    tests = [examples(name, test) for test in find_guard(name).card.tests]
    keys = [item.text_key for dataset in (training, *tests) for item in dataset.items]
    alike = NearDuplicates.among(keys)
    is_training = np.zeros(alike.texts.max() + 1, dtype=bool)
    is_training[alike.texts[: len(training)]] = True
    assert not is_training[alike.texts[len(training) :]].any()
    assert (is_training[alike.left] == is_training[alike.right]).all()


# What recognises each kind of ``tool_results``.
KINDS = {
    "weather records": r"temp_m(ax|in)|precipitation,",
    "airport records": r'"iata"',
    "earthquake reports": r'"magType"|"tsunami"',
    "bird strikes": r"Wildlife (Size|Species)",
    "git log": r"(?m)^commit [0-9a-f]{7,}$",
    "git diff": r"(?m)^diff --git |^@@ -",
    "linter rules": r"(?m)^## What it does",
    "linter reports": r"(?m)^ *--> \S+:\d+:\d+",
    "command help": r"(?im)^usage:\s",
    "listings": r"(?m)^(total \d+$|[d-]rw[x-]|Package +Version)",
}


def test_training_data_excludes_tested_tool_result_kinds():
    tested = examples("injection", "tool_results")
    kinds = [str(cells["subset"]) for cells in tested.rows]
    assert Counter(zip(kinds, tested.labels.tolist(), strict=True)) == {
        (kind, label): rows for kind in KINDS for label, rows in ((0, 30), (1, 15))
    }
    found = Counter(
        kind
        for kind, item in zip(kinds, tested.items, strict=True)
        if re.search(KINDS[kind], item.text)
    )
    # Some are cut.
    assert all(found[kind] >= 36 for kind in KINDS), found
    texts = {item.text for item in examples("injection").items}
    conversations = load_background("packaged").conversations
    texts |= {turn.content for turns in conversations for turn in turns}
    assert [kind for kind in KINDS if any(re.search(KINDS[kind], text) for text in texts)] == []


@pytest.mark.slow
def test_background_contains_no_near_duplicates_of_test_texts():
    """It would train as a text without the label."""
    tests = [examples(name, test) for name in NAMES for test in find_guard(name).card.tests]
    keys = sorted({item.text_key for test in tests for item in test.items})
    turns_of_background = {
        turn for turns in load_background("packaged").conversations for turn in turns
    }
    asked = sorted(
        {Example((turn,)).text_key for turn in turns_of_background if turn.role != "assistant"}
    )
    alike = are_alike(asked, keys, cosine=0.75)
    assert not alike.any(), [asked[row] for row in np.flatnonzero(alike)]


def test_share_alike_rows_name_their_authors():
    coded = [row for row in examples("injection").rows if "url" in row]
    assert len(coded) > 50
    assert all("stackoverflow.com/" in str(row["url"]) and row["authors"] for row in coded)
    payloads = [
        row for row in examples("injection").rows if str(row["source"]).startswith("payload")
    ]
    backgrounds = find_guard("injection").card.sources
    named = {f"background:{row['document']}" for row in payloads}
    assert {source for source in named if source in backgrounds} == named
