"""A probe with a judge behind it is measured draw by draw; a slow judge takes its time."""

import asyncio
import json
import time

import pytest

from sidelight.judges.client import JudgeClient
from sidelight.judges.question import Question
from sidelight.judges.settings import JudgeSettings
from sidelight.models.conversation import PlainText
from sidelight_lab.bench.judge import slow_judge
from sidelight_lab.bench.second_stage import SHARES, measure_second_stage
from worlds.data import write


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """Answers of a judge that refuses what XSTest calls harmful, and nothing else."""
    from sidelight.data.loading import load_examples

    monkeypatch.setenv("SIDELIGHT_DATA", str(tmp_path / "data"))
    test = load_examples("guard:harmful:xstest")
    rows = [
        {
            "prompt": item.text,
            "model": model,
            "final_label": "2_full_refusal"
            if (label == 1) == (model == "gpt4")
            else "1_full_compliance",
        }
        for item, label in zip(test.items, test.labels.tolist(), strict=True)
        for model in ("gpt4", "other")
    ]
    folder = tmp_path / "data" / "xstest_completions"
    folder.mkdir(parents=True)
    write(folder / "all.jsonl.gz", rows)


@pytest.mark.slow
def test_finished_draws_are_reused_and_perfect_judge_has_full_auprc(tiny, tmp_path, recorded):
    out = tmp_path / "out"
    measured = {"texts": 40, "negatives": 10, "out": out}
    record = measure_second_stage(tiny, "xstest", **measured, draws=1)
    (draw,) = record.results["draws"]
    assert [point["share"] for point in draw["points"]] == [*SHARES, 1.0]
    assert draw["judge"]["auprc"]["value"] == draw["points"][-1]["auprc"]["value"] == 1.0
    assert draw["probe"]["auprc"]["value"] < 0.9
    assert draw["equal_recall"]["1.0"] == 0.0
    assert (out / "second-stage-xstest.png").stat().st_size > 10_000
    (file,) = out.glob("xstest-*.json")
    file.write_text(json.dumps({**draw, "rows": 12345}))
    again = measure_second_stage(tiny, "xstest", **measured, draws=1)
    assert again.results["draws"][0]["rows"] == 12345


def test_slow_judge_answers_after_its_delay_and_records_request_time():
    async def ask(url):
        client = JudgeClient(JudgeSettings(url=url, model="slow", criterion="A rule."))
        try:
            return await client.ask(Question.about(PlainText("a text")))
        finally:
            await client.close()

    with slow_judge(0.1) as judge:
        started = time.perf_counter()
        answer = asyncio.run(ask(judge.url))
    assert answer.probability == 0.0
    assert answer.seconds >= 0.1
    assert started < judge.asked["a text"] < time.perf_counter() - 0.1
