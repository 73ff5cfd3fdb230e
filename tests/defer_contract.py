"""The laws of rules that defer to a judge, which our own server and vLLM's run alike."""

import asyncio
import math
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import httpx
import pytest
from starlette.responses import JSONResponse

from policy_contract import (
    ADMIN,
    CHATS,
    CHECKS,
    CLASSIFY,
    CONTENTS,
    GUARDRAIL,
    LEAK,
    STREAMED,
    TOKENS,
    Asked,
    Subjects,
    chat,
    choices,
    in_header,
    refusal,
    verdicts,
)
from sidelight.data.evaluation import Estimate
from sidelight.policy.rules import read_policy
from sidelight.probes.artifact import load_probe, save_probe
from sidelight.probes.card import JudgeFit, Texts
from worlds.judges import CRITERION, ScriptedJudge, scripted_judge, yes_no

_MODELS = count()
_POLICY = """
system_turns = "trust"
[judges.guardian]
url = "{url}"
model = "judge-{number}"
criterion = "criterion.md"
retries = 0
timeout_s = {timeout_s}
{options}
[input.injection]
mode = "{mode}"
threshold = {threshold}
on_failure = "{on_failure}"
defer = {{ judge = "guardian", share = 0.0 }}
[output.leak]
mode = "block"
threshold = {leak}
on_failure = "{on_failure}"
defer = {{ judge = "guardian", share = 0.0, judge_every = 8 }}
"""


@dataclass(frozen=True)
class DeferringServer:
    """A live server whose policy a test replaces.

    Attributes:
        http: A client that has no key.
        model: What requests call the model.
        judge: The judge that rules defer to.
        home: Where policies are written.
        subjects: What is served.
    """

    http: httpx.Client
    model: str
    judge: ScriptedJudge
    home: Path
    subjects: Subjects

    def defers(
        self,
        *,
        mode: str = "block",
        on_failure: str = "block",
        timeout_s: float = 5.0,
        options: str = "",
        threshold: float | None = None,
    ) -> None:
        """Serves under a policy with a judge that has answered nothing yet."""
        (self.home / "criterion.md").write_text(CRITERION)
        policy = self.home / "deferring.toml"
        policy.write_text(
            _POLICY.format(
                url=self.judge.address,
                number=next(_MODELS),
                mode=mode,
                on_failure=on_failure,
                timeout_s=timeout_s,
                options=options,
                threshold=self.subjects.threshold if threshold is None else threshold,
                leak=LEAK,
            )
        )
        self.serve(policy, [*self.subjects.folder_of.values()])
        self.judge.asked.clear()

    def serve(self, policy: Path, probes: Sequence[str] | None = None) -> None:
        answer = self.put(policy, probes)
        assert answer.status_code == 200, answer.text

    def put(self, policy: Path, probes: Sequence[str] | None = None) -> httpx.Response:
        admin = {"Authorization": f"Bearer {ADMIN}"}
        body = {"policy": str(policy), **({} if probes is None else {"probe": [*probes]})}
        return self.http.put("/admin/probes", json=body, headers=admin)

    def fits(self, *, weight: float, threshold: float) -> None:
        """Serves under the last policy, with probes that are fitted to its judge like this."""
        policy = self.home / "deferring.toml"
        judge = read_policy(policy).judges["guardian"]
        figure = Estimate(0.5, 0.4, 0.6)
        fit = JudgeFit(
            judge=judge.digest,
            model=judge.model,
            weight=weight,
            threshold=threshold,
            threshold_rule="f1",
            share=0.0,
            texts=Texts(),
            deferred=0,
            recall=figure,
            recall_of_probe=figure,
            date="2026-01-01",
        )
        folders = dict(self.subjects.folder_of)
        for name in ("injection", "leak"):
            result = load_probe(folders[name]).changed(judge_fit=fit)
            folders[name] = str(save_probe(result, self.home / f"fitted-{next(_MODELS)}" / name))
        self.serve(policy, [*folders.values()])

    def post(self, asked: Asked, key: str | None = None) -> httpx.Response:
        path, body = asked
        return self.http.post(path, json=self._body(path, body), headers=_authorization(key))

    @contextmanager
    def stream(self, asked: Asked) -> Iterator[httpx.Response]:
        path, body = asked
        with self.http.stream("POST", path, json=self._body(path, body)) as response:
            yield response

    def counted(self, *words: str) -> float:
        lines = self.http.get("/metrics", headers=_authorization(ADMIN)).text.splitlines()
        series = [line for line in lines if all(word in line for word in words)]
        return sum(float(line.rsplit(" ", 1)[1]) for line in series)

    def _body(self, path, body):
        if path not in (CHECKS, GUARDRAIL, CONTENTS):
            body = {"model": self.model, **body}
        if path == CHATS:
            body = {"temperature": 0, "max_tokens": TOKENS, **body}
        return body


def _authorization(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


@contextmanager
def deferring(
    address: str, model: str, subjects: Subjects, home: Path
) -> Iterator[DeferringServer]:
    """The live server at an address, which has the probes of the subjects and an admin key."""
    (home / "plain.toml").write_text(subjects.policy)
    with scripted_judge() as judge, httpx.Client(base_url=address, timeout=60) as http:
        server = DeferringServer(http, model, judge, home, subjects)
        try:
            yield server
        finally:
            server.serve(home / "plain.toml", [*subjects.folder_of.values()])


def uncut(subjects: Subjects, text: str) -> tuple[str, str]:
    """What the model alone answers, and why that ends."""
    ids, _, _ = subjects.answers[text]
    return subjects.decoded(ids), "length"


def is_cut(subjects: Subjects, answer: httpx.Response) -> bool:
    """Whether the answer to a leaking text ends before its streak.

    A server that is busy may write several tokens in one piece, which is held back as a whole.
    """
    (choice,) = choices(answer).values()
    sent, _ = subjects.sent(subjects.leaking)
    return subjects.decoded(sent).startswith(choice[0]) and choice[1] == "content_filter"


def usage(response: httpx.Response) -> dict[str, int]:
    return {k: v for k, v in response.json()["usage"].items() if isinstance(v, int)}


class DeferContract:
    """A test class that inherits it needs the fixtures ``server`` and ``subjects``."""

    @STREAMED
    def test_prompt_cleared_by_the_judge_gets_the_unguarded_response(
        self, server, subjects, streamed
    ):
        server.defers(threshold=0.0)
        asked = chat(subjects.passing, stream=streamed)
        server.judge.says(0.1)
        cleared = server.post(asked)
        assert server.judge.asked
        server.serve(server.home / "plain.toml")
        plain = server.post(asked)
        assert choices(cleared) == choices(plain) == {0: uncut(subjects, subjects.passing)}
        if not streamed:
            assert usage(cleared) == usage(plain)

    @STREAMED
    def test_prompt_flagged_by_the_judge_is_blocked(self, server, subjects, streamed):
        server.defers()
        server.judge.says(0.9)
        answer = server.post(chat(subjects.injected, stream=streamed))
        assert refusal(answer) == (400, "content_filter")
        assert in_header(answer)["injection"]["flagged"]
        # Below the threshold, no judge is asked.
        server.judge.asked.clear()
        assert server.post(chat(subjects.benign, max_tokens=1)).status_code == 200
        assert not server.judge.asked

    @STREAMED
    def test_silent_judge_blocks_prompts_and_cuts_responses(self, server, subjects, streamed):
        server.defers(timeout_s=0.3)
        server.judge.says(0.0, after_s=1)
        answer = server.post(chat(subjects.injected, stream=streamed))
        assert refusal(answer) == (500, "verdict_failed")
        assert "a judge gave no answer" in answer.text
        server.judge.answers(JSONResponse({}, status_code=500))
        answer = server.post(chat(subjects.injected, stream=streamed))
        assert refusal(answer) == (500, "verdict_failed")
        answer = server.post(chat(subjects.leaking, stream=streamed))
        assert is_cut(subjects, answer)
        assert "error" in verdicts(answer)["leak"]

    def test_text_waits_for_the_judge_without_blocking_other_requests(self, server, subjects):
        server.defers(timeout_s=20)
        is_silent = threading.Event()

        async def reply(_body):
            while not is_silent.is_set():
                await asyncio.sleep(0.01)
            return JSONResponse(yes_no(0.0))

        server.judge.reply = reply
        arrived: list[float] = []

        def read():
            with server.stream(chat(subjects.leaking, stream=True)) as response:
                for line in response.iter_lines():
                    if '"content":"' in line.replace(" ", ""):
                        arrived.append(time.perf_counter())

        reader = threading.Thread(target=read)
        reader.start()
        try:
            deadline = time.perf_counter() + 20
            while not server.judge.asked:
                assert time.perf_counter() < deadline
                time.sleep(0.005)
            # The loop is free.
            assert server.post(chat(subjects.benign, max_tokens=1)).status_code == 200
            before = len(arrived)
            time.sleep(0.1)
            assert len(arrived) == before
        finally:
            is_silent.set()
            reader.join()
        assert len(arrived) > before

    @STREAMED
    def test_judge_decides_whether_a_response_is_cut(self, server, subjects, streamed):
        asked = chat(subjects.leaking, stream=streamed)
        for probability, wanted in (
            (0.1, uncut(subjects, subjects.leaking)),
            (0.9, None),
        ):
            server.defers()
            server.judge.says(probability)
            answer = server.post(asked)
            if wanted is None:
                assert is_cut(subjects, answer)
            else:
                assert choices(answer) == {0: wanted}
            assert verdicts(answer)["leak"]["flagged"] == (probability > 0.5)
            # At the first streak, at most every 8 tokens after it, and at the end.
            assert 1 <= len(server.judge.asked) <= 2 + TOKENS // 8

    def test_judge_fit_combines_probe_and_judge_scores(self, server, subjects):
        """At log-odds of 0.4, which the judge alone would let pass."""
        odds = math.log(0.4 / 0.6)
        asked = [chat(subjects.injected), chat(subjects.leaking)]
        for weight, threshold, probability, is_stopped in (
            (0.0, odds - 0.1, 0.4, True),
            (0.0, odds + 0.1, 0.4, False),
            # A text on which the probe alone decides.
            (1.0, -5.0, 0.001, True),
            (1.0, 11.0, 0.999, False),
        ):
            server.defers()
            server.fits(weight=weight, threshold=threshold)
            server.judge.says(probability)
            prompt, response = map(server.post, asked)
            assert (prompt.status_code == 400) == is_stopped
            assert is_cut(subjects, response) == is_stopped
            assert server.judge.asked

    def test_policy_with_an_unfitted_judge_is_rejected(self, server, subjects):
        server.defers()
        server.fits(weight=0.5, threshold=0.0)
        judge, policy = server.judge, server.home / "deferring.toml"
        policy.write_text(policy.read_text().replace('model = "judge-', 'model = "newer-'))
        answer = server.put(policy)
        assert answer.status_code == 400, answer.text
        judge.answers(JSONResponse({}, status_code=500))
        # The old policy serves on.
        assert refusal(server.post(chat(subjects.injected))) == (500, "verdict_failed")

    def test_judge_failure_follows_the_on_failure_rule(self, server, subjects):
        changed = 'sidelight_judge_changes_total{judge="guardian"'
        for on_failure, wanted in (("pass", 200), ("probe", 400), ("block", 500)):
            server.defers(on_failure=on_failure)
            server.judge.answers(JSONResponse({}, status_code=500))
            before = server.counted(changed)
            answer = server.post(chat(subjects.injected))
            assert answer.status_code == wanted, (on_failure, answer.text)
            assert server.counted(changed) == before
        server.defers(on_failure="probe")
        answer = server.post(chat(subjects.leaking))
        assert is_cut(subjects, answer)

    def test_exhausted_judge_budget_counts_as_failure(self, server, subjects):
        server.defers(options="budget_per_minute = 1")
        server.judge.says(0.1)
        assert server.post(chat(subjects.injected, max_tokens=1)).status_code == 200
        # The same text has its answer; another one has none.
        assert server.post(chat(subjects.injected, max_tokens=1)).status_code == 200
        rest = [t for t in subjects.texts if t not in (subjects.injected, *subjects.unflagged)]
        for text in rest:
            answer = server.post(chat(text, max_tokens=1))
            assert answer.status_code in (200, 500)
        assert len(server.judge.asked) == 1
        failed = 'sidelight_judge_questions_total{judge="guardian",outcome="budget"'
        assert server.counted(failed, "injection") >= 1

    def test_choices_of_one_prompt_share_a_judge_question(self, server, subjects):
        server.defers()
        server.judge.says(0.1, after_s=0.05)
        answer = server.post(chat(subjects.injected, n=2, temperature=0.01, max_tokens=1))
        assert answer.status_code == 200
        asked = [text for text in server.judge.texts if "assistant" not in text.split("turns")[-1]]
        assert len(asked) == 1

    def test_classification_routes_ask_the_judge_too(self, server, subjects):
        flagged = {
            CHECKS: lambda r: r.json()["results"][0]["flagged"],
            CLASSIFY: lambda r: r.json()["data"][0]["label"] == "toxic",
            CONTENTS: lambda r: bool(r.json()[0]),
            GUARDRAIL: lambda r: r.json()["action"] == "BLOCKED",
        }
        bodies = {
            CHECKS: {"input": [subjects.injected], "probes": ["injection"]},
            CLASSIFY: {"model": "injection", "input": [subjects.injected]},
            CONTENTS: {"contents": [subjects.injected]},
            GUARDRAIL: {
                "input_type": "request",
                "texts": [subjects.injected],
                "additional_provider_specific_params": {"probes": ["injection"]},
            },
        }
        for probability in (0.9, 0.1):
            for path, body in bodies.items():
                server.defers()
                server.judge.says(probability)
                answer = server.http.post(
                    path,
                    json=server._body(path, body),
                    headers={"detector-id": "injection"} if path == CONTENTS else {},
                )
                assert answer.status_code == 200, (path, answer.text)
                assert flagged[path](answer) == (probability > 0.5), path
                assert server.judge.asked, path
        server.judge.answers(JSONResponse({}, status_code=500))
        for path, body in bodies.items():
            server.defers()
            answer = server.http.post(
                path,
                json=server._body(path, body),
                headers={"detector-id": "injection"} if path == CONTENTS else {},
            )
            assert answer.status_code == 500, path

    @STREAMED
    def test_only_admins_see_the_judge_decision(self, server, subjects, streamed):
        server.defers()
        server.judge.says(0.1)
        for key in (None, ADMIN):
            answer = server.post(chat(subjects.injected, max_tokens=1, stream=streamed), key)
            entry = verdicts(answer)["injection"]
            assert entry["flagged"] is False
            assert entry.get("decided_by") == ("judge" if key else None)
            assert ("guardian" in answer.text) == bool(key)
        judge = entry["judge"]
        assert (judge["name"], judge["changed"]) == ("guardian", True)
        assert judge["probability"] == pytest.approx(0.1)

    def test_flag_mode_follows_the_judge_and_shadow_adds_no_delay(self, server, subjects):
        for probability in (0.1, 0.9):
            server.defers(mode="flag")
            server.judge.says(probability)
            answer = server.post(chat(subjects.injected, max_tokens=1))
            assert ("injection" in answer.headers.get("x-sidelight-flagged", "")) == (
                probability > 0.5
            )
        server.defers(mode="shadow")
        changed = 'sidelight_judge_changes_total{judge="guardian"'
        before = server.counted(changed, 'outcome="passed"')
        server.judge.says(0.1, after_s=0.5)
        started = time.perf_counter()
        answer = server.post(chat(subjects.injected, max_tokens=1))
        assert time.perf_counter() - started < 0.4
        assert "injection" not in answer.text
        deadline = time.perf_counter() + 5
        while server.counted(changed, 'outcome="passed"') == before:
            assert time.perf_counter() < deadline
            time.sleep(0.02)

    def test_server_with_judges_rejects_judge_requests(self, server, subjects):
        server.defers()
        asked = chat(subjects.benign, max_tokens=1)
        answer = server.http.post(
            asked[0], json=server._body(*asked), headers={"x-sidelight-judge": "1"}
        )
        assert refusal(answer) == (400, "judge_loop")

    def test_judge_questions_and_changes_are_counted(self, server, subjects):
        answered = 'sidelight_judge_questions_total{judge="guardian",outcome="answered"'
        changed = 'sidelight_judge_changes_total{judge="guardian",outcome="passed"'
        before = server.counted(answered), server.counted(changed)
        server.defers()
        server.judge.says(0.1)
        server.post(chat(subjects.injected, max_tokens=1))
        after = server.counted(answered), server.counted(changed)
        assert [new - old for new, old in zip(after, before, strict=True)][1] >= 1
        assert after[0] > before[0]
        assert server.counted('sidelight_judge_answer_seconds_count{judge="guardian"') > 0
