"""A judge is asked about labelled texts once, and fitted to a probe out of fold."""

import json
import math
import re

import numpy as np
import pytest
from starlette.responses import JSONResponse

import wordings
from sidelight.data.evaluation import Estimate
from sidelight.data.examples import Example, LabelledExamples
from sidelight.errors import SidelightError
from sidelight.judges.fitting import (
    SHARES,
    combined_out_of_fold,
    defer_thresholds,
    fit_judge,
    require_fittable,
)
from sidelight.judges.settings import JudgeSettings
from sidelight.models.conversation import Message
from sidelight.policy.rules import BoundRule, Defer, Policy, Rule, require_policy_applies
from sidelight.probes.artifact import load_probe, save_probe
from sidelight.probes.card import JudgeFit, Texts, TrainingRecord, TrainingTexts, read_card, summary
from sidelight.scoring import probe_logits
from sidelight.statistics.background import Conversations, Traffic
from sidelight.statistics.combination import combined_log_odds, fit_combination
from sidelight.statistics.thresholds import ThresholdRule
from sidelight.training.measuring import text_hashes
from worlds.data import planted, write
from worlds.judges import yes_no
from worlds.models import INTENT, TOXICITY, untrained_probe
from worlds.servers import cli

# Of a weight fitted to 4,000 texts.
FITTED = 0.05
ROWS = 600


@pytest.fixture(scope="module")
def probe(tiny):
    """A probe with a record of background traffic."""
    background = Conversations(np.linspace(-6, 2, 400)[:, None], np.zeros(400, dtype=np.int64))
    record = TrainingRecord(traffic=Traffic(background, 0))
    return untrained_probe(tiny, "early", threshold=0.6).changed(training=record)


def sigmoid(logits):
    return 1 / (1 + np.exp(-logits))


def drawn(rows, *, probe, judge, seed=0, share=0.4):
    """Labels, and probabilities of a probe and a judge whose log-odds are so far apart."""
    random = np.random.default_rng(seed)
    holds = random.random(rows) < share
    sides = np.where(holds, 1.0, -1.0)
    scores, answers = (
        sigmoid(distance * sides + random.normal(size=rows) * 1.5) for distance in (probe, judge)
    )
    return holds, scores, answers


def labelled(holds):
    words = np.random.default_rng(1).integers(10**9, size=(len(holds), 3))
    items = [Example((Message("user", f"{a:x} {b:x} {c:x}"),)) for a, b, c in words.tolist()]
    return LabelledExamples(
        tuple(items), ({},) * len(items), task=TOXICITY, labels=holds.astype(np.int64)
    )


JUDGE = JudgeSettings(url="http://127.0.0.1:1/v1", model="judge", criterion="A rule.")


def fitted(probe, holds, scores, answers, *, share=0.05, most=1.0, rule=None):
    return fit_judge(
        probe,
        labelled(holds),
        scores,
        answers,
        judge=JUDGE,
        thresholds=defer_thresholds(probe, share, most),
        share=share,
        rule=rule,
    )


def a_fit(**fields):
    figure = Estimate(0.5, 0.4, 0.6)
    values = {
        "judge": "0123456789ab",
        "model": "judge",
        "weight": 0.25,
        "threshold": -0.5,
        "threshold_rule": "f1",
        "share": 0.05,
        "texts": Texts(rows=600),
        "deferred": 60,
        "recall": figure,
        "recall_of_probe": figure,
        "date": "2026-12-02",
    }
    return JudgeFit(**values | fields)


# The sum of log-odds


def test_fit_combination_recovers_true_weights():
    random = np.random.default_rng(0)
    scores, answers = (sigmoid(random.normal(size=4000) * 2) for _ in range(2))
    logits = 0.6 * combined_log_odds(1.0, scores, answers) + 1.8 * combined_log_odds(
        0.0, scores, answers
    )
    holds = random.random(4000) < sigmoid(logits - 0.7)
    found = fit_combination(scores, answers, holds)
    assert found.weight == pytest.approx(0.25, abs=FITTED)
    assert found.apply(scores, answers).mean() == pytest.approx(holds.mean(), abs=FITTED)
    limit = found.threshold(0.3)
    same = found.apply(scores, answers) >= 0.3
    assert (same == (combined_log_odds(found.weight, scores, answers) >= limit)).all()


def test_noisy_or_inverted_judge_gets_almost_no_weight():
    holds, scores, _ = drawn(4000, probe=1.0, judge=0.0)
    noise = np.random.default_rng(5).random(4000)
    assert fit_combination(scores, noise, holds).weight > 1 - FITTED
    # A judge that says the opposite is not turned around.
    _, _, opposite = drawn(4000, probe=1.0, judge=-1.0)
    assert fit_combination(scores, opposite, holds).weight == 1.0


def test_fit_combination_tolerates_few_texts_and_single_class():
    scores, answers = np.array([0.4, 0.6]), np.array([0.9, 0.1])
    for holds in ([True, True], [True, False]):
        found = fit_combination(scores, answers, np.array(holds))
        assert 0 <= found.weight <= 1
        assert math.isfinite(found.shift)
    assert fit_combination(scores[:0], answers[:0], np.zeros(0, bool)).weight == 0.5


def test_fit_flags_by_documented_formula():
    fit = a_fit(weight=0.25, threshold=-0.5)
    for score, answer in ((0.9, 0.2), (0.1, 0.9), (0.5, 0.4), (0.99, 0.01)):
        odds = 0.25 * math.log(score / (1 - score)) + 0.75 * math.log(answer / (1 - answer))
        assert fit.flags(score, answer) == (odds >= -0.5)
    # Sure of it, to the last bit.
    assert a_fit(weight=0.5, threshold=11.0).flags(1.0, 1.0)
    assert not a_fit(weight=0.5, threshold=-11.0).flags(0.0, 0.0)


# Figures by share


def test_strong_judge_raises_recall_and_random_judge_adds_nothing(probe):
    holds, scores, answers = drawn(ROWS, probe=1.0, judge=3.0)
    report = fitted(probe, holds, scores, answers)
    recalls = [point.recall_at_1pct_fpr.value for point in report.points]
    assert [point.share for point in report.points] == [*SHARES, 1.0]
    assert report.probe.recall_at_1pct_fpr.value < recalls[3] < recalls[-1]
    assert report.points[-1].auprc.value > report.probe.auprc.value
    assert report.gain.low > 0
    assert report.judge_gain.low > 0
    assert wordings.JUDGE_GAINS in report.findings[0]
    assert wordings.JUDGE_ONLY_BETTER in report.findings[1]
    assert report.decisions["fit"].flagged < report.decisions["probe"].flagged / 2

    report = fitted(probe, holds, scores, np.random.default_rng(3).random(ROWS))
    assert report.gain.low <= 0
    assert wordings.JUDGE_ADDS_NOTHING in report.findings[0]
    assert len(report.findings) == 1


def test_out_of_fold_scores_ignore_labels_of_their_fold():
    holds, scores, answers = drawn(200, probe=0.5, judge=1.0)
    folds = tuple(np.arange(fold, 200, 5) for fold in range(5))
    is_deferred = scores > 0.3
    found = combined_out_of_fold(scores, answers, holds, is_deferred, folds)
    assert (found[~is_deferred] == 0).all()
    for fold in folds:
        changed = holds.copy()
        changed[fold] ^= True
        again = combined_out_of_fold(scores, answers, changed, is_deferred, folds)
        assert (again[fold] == found[fold]).all()
        assert (again != found).any()


def test_recall_counts_only_deferred_texts(probe):
    holds, scores, answers = drawn(ROWS, probe=0.3, judge=3.0)
    strict = probe.changed(thresholds=(float(np.sort(scores)[-30]),))
    report = fitted(strict, holds, scores, answers, share=0.0)
    first = report.points[0]
    assert (first.share, first.deferred) == (0.0, 30)
    assert first.recall_at_1pct_fpr.value <= 30 / holds.sum()


def test_defer_thresholds_match_those_of_policies(probe):
    thresholds = defer_thresholds(probe, 0.03)
    assert [*thresholds] == [0.0, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 1.0]
    for share in SHARES:
        bound = BoundRule(probe, Rule("block", defer=Defer("g", share=share)))
        assert thresholds[share] == bound.defer_threshold
    assert [*defer_thresholds(probe, 0.05, 0.02)] == [0.0, 0.01, 0.02, 0.05]
    assert [*defer_thresholds(probe.changed(training=TrainingRecord()), 0.0)] == [0.0, 1.0]


def test_texts_below_deferral_threshold_need_no_judge_answer(probe):
    holds, scores, answers = drawn(ROWS, probe=1.0, judge=3.0)
    lowest = min(defer_thresholds(probe, 0.05, 0.1).values())
    full = fitted(probe, holds, scores, answers)
    subset = fitted(probe, holds, scores, np.where(scores >= lowest, answers, np.nan), most=0.1)
    assert subset.judge is subset.judge_gain is None
    by_share = {point.share: point for point in full.points}
    assert all(point == by_share[point.share] for point in subset.points)
    assert subset.fit.weight == full.fit.weight
    assert subset.gain == full.gain


def test_unanswered_texts_are_dropped_up_to_a_limit(probe):
    holds, scores, answers = drawn(ROWS, probe=1.0, judge=3.0)
    answers[: ROWS // 25] = np.nan
    report = fitted(probe, holds, scores, answers)
    assert (report.rows, report.unanswered) == (ROWS - ROWS // 25, ROWS // 25)
    answers[: ROWS // 10] = np.nan
    with pytest.raises(SidelightError, match=wordings.JUDGE_UNANSWERED.format(missing=60)):
        fitted(probe, holds, scores, answers)


def test_fitted_threshold_follows_its_rule(probe):
    holds, scores, answers = drawn(4000, probe=1.0, judge=2.0)
    lax = fitted(probe, holds, scores, answers, share=0.2, rule=ThresholdRule.parse("fpr=0.1"))
    strict = fitted(probe, holds, scores, answers, share=0.2, rule=ThresholdRule.parse("fpr=0.02"))
    negatives = (~holds).sum()
    for report, rate in ((lax, 0.1), (strict, 0.02)):
        assert report.decisions["fit"].flagged / negatives == pytest.approx(rate, abs=0.01)
        deferred = scores >= min(probe.thresholds[0], probe.share_threshold("toxic", 0.2))
        flags = [
            report.fit.flags(score, verdict) and is_deferred
            for score, verdict, is_deferred in zip(scores, answers, deferred, strict=True)
        ]
        assert np.mean(np.array(flags)[~holds]) == pytest.approx(rate, abs=0.01)
    assert strict.fit.threshold > lax.fit.threshold
    assert strict.fit.threshold_rule == "fpr=0.02"


def test_require_fittable_rejects_unsuitable_probes_and_texts(tiny, probe):
    holds, _, _ = drawn(ROWS, probe=1.0, judge=3.0)
    texts = labelled(holds)
    require_fittable(probe.card, texts, 0.05)
    several = untrained_probe(tiny, "intent", task=INTENT).card
    with pytest.raises(SidelightError, match=wordings.JUDGE_OF_ONE_LABEL):
        require_fittable(several, texts, 0.05)
    record = probe.card.training.model_copy(
        update={"training": TrainingTexts(texts=text_hashes(texts))}
    )
    with pytest.raises(SidelightError, match=wordings.JUDGE_TRAINED_TEXTS):
        require_fittable(probe.changed(training=record).card, texts, 0.05)
    with pytest.raises(SidelightError, match=wordings.JUDGE_TOO_FEW):
        require_fittable(probe.card, labelled(np.arange(40) < 3), 0.05)
    without = probe.changed(training=TrainingRecord()).card
    require_fittable(without, texts, 0.0)
    with pytest.raises(SidelightError, match=wordings.NO_BACKGROUND_SHARE):
        require_fittable(without, texts, 0.05)


def test_fit_rejects_too_few_deferred_texts(probe):
    holds, scores, answers = drawn(60, probe=1.0, judge=3.0)
    strict = probe.changed(thresholds=(float(np.sort(scores)[-8]),))
    with pytest.raises(SidelightError, match=wordings.JUDGE_FEW_DEFERRED):
        fitted(strict, holds, scores, answers, share=0.0)


# The card, and what a policy makes of it


def test_probe_card_stores_judge_fit_only_when_fitted(tiny, tmp_path, probe):
    plain = load_probe(save_probe(probe, tmp_path / "plain"))
    assert "judge_fit" not in plain.card.to_json()
    result = load_probe(save_probe(plain.changed(judge_fit=a_fit()), tmp_path / "fitted"))
    assert result.card.judge_fit == a_fit()
    assert result.version != plain.version
    assert "judge (0123456789ab)" in summary(read_card(tmp_path / "fitted"))["judge"]
    several = untrained_probe(tiny, "intent", task=INTENT).changed(judge_fit=a_fit())
    with pytest.raises(SidelightError, match="judge_fit"):
        load_probe(save_probe(several, tmp_path / "several"))


def test_policy_rejects_judge_other_than_the_fitted_one(probe):
    rule = Rule("block", defer=Defer("guardian"))
    policy = Policy(input={"early": rule}, judges={"guardian": JUDGE})
    require_policy_applies(policy, [probe.changed(judge_fit=a_fit(judge=JUDGE.digest))])
    for changed in ({"model": "newer"}, {"criterion": "Another rule."}, {"extra": {"seed": 1}}):
        fit = a_fit(judge=JUDGE.model_copy(update=changed).digest)
        with pytest.raises(SidelightError, match=wordings.FITTED_TO_ANOTHER):
            require_policy_applies(policy, [probe.changed(judge_fit=fit)])
    # Without a judge, there is nothing to fit to.
    without_defer = Policy(input={"early": Rule("block")})
    require_policy_applies(without_defer, [probe.changed(judge_fit=a_fit())])


def test_judge_url_and_timeout_do_not_change_digest():
    moved = JUDGE.model_copy(update={"url": "https://judge.example/v1", "timeout_s": 3.0})
    assert moved.digest == JUDGE.digest


# The command


@pytest.fixture
def command(tiny, model, tmp_path, monkeypatch, judge, probe):
    monkeypatch.setenv("SIDELIGHT_CACHE", str(tmp_path / "cache"))
    texts, labels = planted("binary", 120, seed=3)
    rows = [
        {"text": f"{text} {i}", "toxic": TOXICITY.labels[label]}
        for i, (text, label) in enumerate(zip(texts, labels, strict=True))
    ]
    data = str(write(tmp_path / "rows.jsonl", rows))
    folder = tmp_path / "probe"
    items = [Example((Message("user", str(row["text"])),)) for row in rows]
    scores = probe.calibration.apply(probe_logits(tiny, probe, items))
    half = float(np.median(scores))
    save_probe(probe.changed(thresholds=(half,)), folder)
    (tmp_path / "rule.md").write_text("A rule.")
    file = tmp_path / "judge.toml"
    file.write_text(f'url = "{judge.address}"\nmodel = "judge"\ncriterion = "rule.md"\n')

    def reply(body):
        text = str(body["messages"])
        return JSONResponse(yes_no(0.95 if "XX" in text or "X" in text.split("turns")[1] else 0.05))

    judge.reply = reply
    arguments = ("eval", str(folder), "--data", data, "--label", "toxic", "--model", model)
    return [*arguments, "--judge", str(file)]


def test_eval_asks_judge_and_saves_probe_with_fit(command, judge, tmp_path, capsys):
    plots = tmp_path / "plots"
    assert cli(*command, "--plots", str(plots), "--out", str(tmp_path / "figures.json")) == 0
    printed = capsys.readouterr()
    assert len(judge.asked) == 120
    assert re.search(r"Asking judge at .* about 120 texts, about [\d,]+ tokens", printed.err)
    result = read_card(tmp_path / "probe-judged")
    metrics = json.loads((tmp_path / "figures.json").read_text())["second_stage"]
    assert all(finding in printed.out for finding in metrics["findings"])
    assert metrics["saved"] == str(tmp_path / "probe-judged")
    assert result.judge_fit.weight == metrics["fit"]["weight"]
    assert result.judge_fit.texts.rows == 120
    assert (plots / "second_stage.png").stat().st_size > 10_000
    judge.asked.clear()
    # The folder holds a probe by now; answers are known.
    assert cli(*command) == 2
    assert cli(*command, "--force", "--json") == 0
    assert json.loads(capsys.readouterr().out)["second_stage"]["gain"] == metrics["gain"]
    assert not judge.asked


def test_eval_asks_about_requested_share_only(command, judge, tmp_path, capsys):
    assert cli(*command, "--ask", "0.05", "--json") == 0
    metrics = json.loads(capsys.readouterr().out)["second_stage"]
    assert len(judge.asked) == metrics["points"][-1]["deferred"] == 60
    assert metrics["judge"] is None


def test_eval_validates_options_before_asking_judge(command, judge, tmp_path, capsys):
    without = command[:-2]
    assert cli(*without, "--save", str(tmp_path / "x")) == 2
    assert "--judge" in capsys.readouterr().err
    (tmp_path / "judge.toml").write_text('url = "http://127.0.0.1:1/v1"\nmodel = "judge"\n')
    assert cli(*command) == 2
    assert "criterion" in capsys.readouterr().err
    assert not judge.asked
    assert not (tmp_path / "probe-judged").exists()


def test_eval_continues_past_missing_verdicts_and_reports_them(command, judge, capsys):
    reply = judge.reply
    judge.reply = lambda body: (
        JSONResponse({}, status_code=400) if len(judge.asked) == 1 else reply(body)
    )
    assert cli(*command) == 0
    assert "gave no verdict on 1 texts (status 1)" in capsys.readouterr().err
    judge.asked.clear()
    judge.asked.append({})
    assert cli(*command, "--force") == 0
    assert len(judge.asked) == 2
    assert "no verdict" not in capsys.readouterr().err
