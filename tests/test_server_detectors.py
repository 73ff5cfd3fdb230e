"""The detectors API, as the orchestrator, NeMo Guardrails and LiteLLM ask it."""

import pytest

from sidelight.engines.transformers.engine import TransformersEngine
from sidelight.models.conversation import Reads
from sidelight.policy.rules import Rule
from sidelight.server.errors import DETECTORS
from worlds.models import broken, spans_probe, three_probes, untrained_probe
from worlds.servers import ENGINE_ROUNDING, http_client, served, under_rules

TEXT = "Where is my réfund? 🙂 Ask Ann."
TURNS = [{"role": "user", "content": TEXT}]
ANSWERED = [*TURNS, {"role": "assistant", "content": "I cannot help with that."}]
KEY, ADMIN = "user-key", "admin-key"
BODIES = {
    "contents": {"contents": [TEXT, "hello"], "detector_params": {}},
    "chat": {"messages": TURNS, "tools": [], "detector_params": {}},
    "generation": {"prompt": TEXT, "generated_text": "I cannot help.", "detector_params": {}},
}


@pytest.fixture(scope="module")
def address(tiny):
    probes = [
        *three_probes(tiny),
        untrained_probe(tiny, "always", threshold=0.0),
        spans_probe(tiny, "words", threshold=0.3),
        untrained_probe(tiny, "refusal", reads=Reads("response"), threshold=0.0),
        spans_probe(tiny, "names", side="response", threshold=0.3),
    ]
    with served(TransformersEngine(tiny, probes)) as address:
        yield address


def detect(http, route, detector=None, **body):
    headers = {} if detector is None else {"detector-id": detector}
    answer = http.post(f"{DETECTORS}{route}", json={**BODIES[route], **body}, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.json()


def refusal(http, route, detector=None, headers=None, **body):
    """The status and the words of a refusal, which has nothing else."""
    headers = {"detector-id": detector} if detector else headers
    answer = http.post(f"{DETECTORS}{route}", json={**BODIES[route], **body}, headers=headers)
    assert answer.json().keys() == {"code", "message"}, answer.text
    assert answer.json()["code"] == answer.status_code
    return answer.status_code, answer.json()["message"]


def verdicts(http, texts):
    results = http.post("/v1/moderations", json={"input": texts}).json()["results"]
    return [{v["probe"]: v for v in one["sidelight"]["verdicts"]} for one in results]


def test_contents_lists_detections_of_prompt_probes_per_text(http):
    texts = [TEXT, "hello"]
    first, empty, last = detect(http, "contents", contents=[texts[0], "", texts[1]])
    assert empty == []
    for text, detections, entries in zip(texts, (first, last), verdicts(http, texts), strict=True):
        flagged = {name for name, verdict in entries.items() if verdict["flagged"]}
        assert {one["detection"] for one in detections} == flagged
        for one in detections:
            assert one["text"] == text[one["start"] : one["end"]]
            verdict = entries[one["detection"]]
            assert one["detection_type"] in verdict["labels"]
            if "spans" not in verdict:
                assert (one["start"], one["end"]) == (0, len(text))
                probability = verdict["probabilities"][one["detection_type"]]
                assert one["score"] == pytest.approx(probability, abs=ENGINE_ROUNDING)
        # A multi-class probe flags nothing by itself.
        assert "intent" not in flagged
    assert "always" in {one["detection"] for one in first}


def test_span_detections_have_code_point_offsets_and_individual_scores(http):
    (entries,) = verdicts(http, [TEXT])
    spans = entries["words"]["spans"]
    assert spans
    found = detect(http, "contents", "words", contents=[TEXT])[0]
    placed = [one for one in found if one["detection_type"] in {span["label"] for span in spans}]
    assert [(one["start"], one["end"], one["detection_type"]) for one in placed] == [
        (span["start"], span["end"], span["label"]) for span in spans
    ]
    scores = [span["probability"] for span in spans]
    assert [one["score"] for one in placed] == pytest.approx(scores, abs=ENGINE_ROUNDING)
    # One is behind a character outside the basic plane.
    assert max(one["end"] for one in placed) > TEXT.index("🙂")
    assert all(one["text"] == TEXT[one["start"] : one["end"]] for one in placed)


def test_detector_header_selects_single_probe(http):
    for name in ("always", "toxicity", "topics"):
        for detections in detect(http, "contents", name):
            assert {one["detection"] for one in detections} <= {name}
    assert detect(http, "contents", "intent") == [[], []]
    status, message = refusal(http, "contents", "alway")
    assert status == 404
    assert "Did you mean 'always'?" in message


def test_response_detector_reads_contents_as_responses(http):
    (found,) = detect(http, "contents", "refusal", contents=["I cannot help."])
    body = {"input_type": "response", "texts": ["I cannot help."]}
    guarded = http.post("/beta/litellm_basic_guardrail_api", json=body).json()
    entry = {v["probe"]: v for v in guarded["sidelight"]["verdicts"]}["refusal"]
    assert found[0]["score"] == pytest.approx(entry["probabilities"]["toxic"], abs=ENGINE_ROUNDING)


def test_chat_detections_form_flat_list_and_include_responses(http):
    asked, answered = (detect(http, "chat", messages=turns) for turns in (TURNS, ANSWERED))
    assert {one["detection"] for one in asked} >= {"always"}
    assert not {one["detection"] for one in asked} & {"refusal", "names"}
    assert {one["detection"] for one in answered} >= {"always", "refusal"}
    for one in (*asked, *answered):
        assert {"detection", "detection_type", "score"} <= one.keys()
        spans = one.get("metadata", {"start": 0, "end": 1})
        assert 0 <= spans["start"] < spans["end"] <= len(TEXT)
    assert any("metadata" in one for one in asked)
    several = detect(http, "chat", messages=[*ANSWERED, *TURNS])
    assert {one["metadata"]["message"] for one in several if "metadata" in one} >= {0, 2}
    assert refusal(http, "chat", "refusal", messages=TURNS)[0] == 400


def test_generation_is_classified_by_response_probes(http):
    found = detect(http, "generation")
    assert "refusal" in {one["detection"] for one in found} <= {"refusal", "names"}
    decided = {"model": "tiny/llama", "questions": [{"type": "predicate", "name": "refusal"}]}
    turns = [*TURNS, {"role": "assistant", "content": BODIES["generation"]["generated_text"]}]
    answer = http.post("/v1/decisions", json={**decided, "input": turns}).json()["answers"][0]
    (detection,) = detect(http, "generation", "refusal")
    assert detection["score"] == pytest.approx(answer["probability"], abs=ENGINE_ROUNDING)
    assert detect(http, "generation", generated_text="") == []
    assert detect(http, "generation", prompt="")
    status, message = refusal(http, "generation", "always")
    assert status == 400
    assert "contents" in message


@pytest.mark.parametrize("threshold", [0.0, 0.9, 1.0])
def test_client_threshold_has_no_effect(http, threshold):
    """NeMo always sends its own, and compares with it itself."""
    body = {"detector_params": {"threshold": threshold}}
    assert detect(http, "contents", "always", **body) == detect(http, "contents", "always")


@pytest.mark.parametrize(
    ("route", "body", "word"),
    [
        ("contents", {"detector_params": {"regex": ["email"]}}, "regex"),
        ("contents", {"contents": []}, "contents"),
        ("contents", {"contents": "x"}, "contents"),
        ("contents", {"contents": ["x"] * 600}, "Too many inputs"),
        ("contents", {"contents": ["x" * 300]}, "tokens"),
        ("contents", {"model": "x"}, "model"),
        ("chat", {"tools": [{"type": "function"}]}, "tools"),
        ("chat", {"messages": []}, "messages"),
        ("chat", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ("generation", {"generated_text": None}, "generated_text"),
    ],
)
def test_unsupported_or_invalid_parameters_are_rejected_in_api_format(http, route, body, word):
    status, message = refusal(http, route, **body)
    assert status == 400
    assert word in message


def test_every_failure_uses_detectors_api_error_format(tiny):
    probe = untrained_probe(tiny, "toxicity")
    with under_rules(tiny, [broken(probe)]) as http:
        assert refusal(http, "contents")[0] == 500
    options = {"api_key": KEY, "max_body_bytes": 200}
    with served(TransformersEngine(tiny, [probe]), **options) as address, http_client(address) as h:
        key = {"Authorization": f"Bearer {KEY}"}
        for route in BODIES:
            assert refusal(h, route)[0] == 401
        assert refusal(h, "contents", headers=key, contents=["x" * 300])[0] == 413
        for method, path, status in (("POST", "context/doc", 404), ("GET", "contents", 405)):
            answer = h.request(method, f"{DETECTORS}{path}", headers=key)
            assert (answer.status_code, answer.json()["code"]) == (status, status)
            assert answer.json()["message"]
        # Other routes keep OpenAI's.
        assert h.post("/classify", json={"input": "x"}).json()["error"]["code"] == "invalid_api_key"


def test_detectors_hide_scores_spans_and_shadow_probes_from_clients(tiny):
    flagging = [untrained_probe(tiny, n, threshold=0.0) for n in ("labelled", "newer")]
    probes = [*flagging, spans_probe(tiny, "words", threshold=0.3)]
    rules = {
        "labelled": Rule("block"),
        "newer": Rule("shadow"),
        "words": Rule("flag", disclose="labels"),
    }
    with under_rules(tiny, probes, rules) as http:
        (found,) = detect(http, "contents", contents=[TEXT])
        assert {one["detection"] for one in found} == {"labelled", "words"}
        assert {one["score"] for one in found} == {1.0}
        assert {(one["start"], one["end"]) for one in found} == {(0, len(TEXT))}
        assert not any("metadata" in one for one in detect(http, "chat"))
        status, message = refusal(http, "contents", "newer")
        assert status == 404
        assert "newer" not in message.partition("Known:")[2]
        headers = {"Authorization": f"Bearer {ADMIN}"}
        answer = http.post(f"{DETECTORS}contents", json=BODIES["contents"], headers=headers).json()
        assert {one["detection"] for one in answer[0]} == {"labelled", "words"}
        assert 0 < answer[0][0]["score"] < 1


def test_shadow_probes_are_counted_but_report_nothing(tiny):
    """As behind LiteLLM: a policy that only observes must not take an application down."""
    probes = [
        untrained_probe(tiny, "newer", threshold=0.0),
        untrained_probe(tiny, "later", reads=Reads("response"), threshold=0.0),
    ]
    with under_rules(tiny, probes, dict.fromkeys(("newer", "later"), Rule("shadow"))) as http:
        assert detect(http, "contents") == [[], []]
        assert detect(http, "chat") == []
        assert detect(http, "generation") == []
        series = http.get("/metrics", headers={"Authorization": f"Bearer {ADMIN}"}).text
    for name in ("newer", "later"):
        counts = [x for x in series.splitlines() if f'probe="{name}"' in x and "score_count" in x]
        assert sum(float(line.rpartition(" ")[2]) for line in counts) > 0


@pytest.mark.parametrize("reads_response", [False, True])
def test_detectors_reject_texts_that_no_probe_reads(tiny, reads_response):
    probe = untrained_probe(tiny, "only", reads=Reads("response") if reads_response else Reads())
    with under_rules(tiny, [probe]) as http:
        for route in ("contents", "chat") if reads_response else ("generation",):
            assert refusal(http, route)[0] == 400
