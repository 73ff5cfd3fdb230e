"""A judge that labels texts: what it must not do before a person agrees with it."""

import json
import re
from pathlib import Path

import pytest
import uvicorn
from sitting import ReviewSitting, displayed_text, texts_of, truthful
from starlette.responses import JSONResponse

import sidelight_label.review
import wordings
from sidelight.data.annotators import JudgeLabel, annotators_of
from sidelight.data.loading import load_examples
from sidelight.errors import SidelightError
from sidelight.judges.settings import read_judge
from sidelight.probes.card import read_card, summary
from sidelight.training.measuring import describe_training
from sidelight_label.file import LabelFile
from worlds.judges import chat_answer, scripted_judge, yes_no
from worlds.models import saved
from worlds.servers import cli

FIRST, COUNT = 200, 300


@pytest.fixture(autouse=True)
def few_first(monkeypatch):
    """A person has a hundred texts to label in a test, of two hundred."""
    monkeypatch.setattr(sidelight_label.review, "FIRST", FIRST)


@pytest.fixture
def judge():
    with scripted_judge() as judge:
        judge.reply = truthful
        yield judge


@pytest.fixture
def sitting(tiny, tmp_path, judge):
    return ReviewSitting(tiny, tmp_path, judge, count=COUNT)


@pytest.mark.slow
def test_judge_labels_train_a_probe_whose_card_names_annotators(sitting, judge):
    sitting.queue.ask()
    assert len(judge.asked) == FIRST
    assert all("capital X" in body["messages"][0]["content"] for body in judge.asked)
    first = {row for row, _ in sitting.review.labels().items()}
    output = sitting.check()
    assert {*output} <= first
    assert sitting.state == "passed"
    # Its labels are in no file before they are wanted, and all that count are after.
    sitting.queue.ask()
    assert len(judge.asked) == COUNT
    people = len(sitting.queue.decided)
    assert len(sitting.rows_of_judge()) == COUNT - people
    assert len(sitting.read()) == COUNT
    sitting.queue.train()
    assert sitting.review.summarise(sitting.queue.people)["is_doubted"]
    card = read_card(sitting.folder / "probe")
    by_judge, by_people = sorted(card.training.training.annotators, key=lambda each: each.texts)[
        ::-1
    ]
    assert by_judge.name == f"judge {sitting.review.settings.digest}"
    assert (by_judge.texts, by_people.texts) == (COUNT - people, people)
    assert by_judge.agreement.value == 1.0
    assert by_people.agreement is None
    assert re.search(r"balanced agreement.*people \(\d+ texts\)", summary(card)["labelled by"])
    # What trains on the file knows it too, and a label that a person changes is a person's.
    assert annotators_of(sitting.read()) == card.training.training.annotators
    assert describe_training(sitting.read()).annotators == card.training.training.annotators


@pytest.mark.slow
def test_sample_is_blind_and_judge_labels_count_only_afterwards(sitting):
    sitting.queue.ask()
    for _ in range(3):
        row = sitting.queue.next()
        assert sitting.queue.opinions(row) == {}
        told = sitting.review.summarise(sitting.queue.people)
        assert (told["agreement"], told["positives"], told["disagreements"]) == (None, None, [])
        sitting.label(1)
    sitting.queue.publish()
    assert sitting.rows_of_judge() == []
    with pytest.raises(SidelightError, match=wordings.JUDGE_NOT_PASSED):
        sitting.review.ask_rest(lambda: sitting.queue.people)


@pytest.mark.slow
def test_judge_below_the_gate_is_stopped_and_disagreements_are_listed(sitting, judge):
    judge.reply = lambda body: JSONResponse(yes_no(float("a" in displayed_text(body))))
    sitting.queue.ask()
    sitting.check()
    assert sitting.state == "stopped"
    told = sitting.review.summarise(sitting.queue.people)
    assert told["agreement"].startswith("0.")
    assert all(one["person"] != one["judge"] for one in told["disagreements"])
    with pytest.raises(SidelightError, match=wordings.JUDGE_NOT_PASSED):
        sitting.queue.ask()
    assert len(judge.asked) == FIRST
    sitting.queue.publish()
    assert sitting.rows_of_judge() == []


def test_judge_that_always_says_no_is_stopped_immediately(sitting, judge):
    judge.says(0.01)
    sitting.queue.ask()
    assert sitting.state == "stopped"
    assert sitting.review.for_people({}) == []


@pytest.mark.slow
def test_editing_the_criterion_asks_again_and_draws_a_fresh_sample(sitting, judge):
    sitting.queue.ask()
    earlier = sitting.check()
    assert sitting.rows_of_judge()
    # Without the last label of the sample, nothing is checked.
    sitting.queue.undo(earlier[-1])
    assert sitting.rows_of_judge() == []
    sitting.check()
    with pytest.raises(SidelightError, match=wordings.CRITERION_TAB_DIFFERS):
        sitting.queue.change_criterion("The text has an X.", seen="an older one")
    sitting.queue.change_criterion("The text has an X.", seen=sitting.criterion.text)
    assert sitting.rule.read_text() == "The text has an X.\n"
    assert sitting.rows_of_judge() == []
    assert sitting.state == "unasked"
    assert len(sitting.queue.decided) == len(earlier)
    before = len(judge.asked)
    sitting.queue.ask()
    assert len(judge.asked) > before
    assert "has an X." in judge.asked[-1]["messages"][0]["content"]
    assert sitting.state == "open"
    assert not {*sitting.review.for_people(sitting.queue.people)} & {*earlier}
    told = sitting.review.summarise(sitting.queue.people)
    assert told["earlier"].startswith("1.00")
    # The first criterion comes back, and so do its answers and its sample.
    asked = len(judge.asked)
    sitting.queue.change_criterion("The text has a capital X.", seen="The text has an X.")
    assert sitting.state == "passed"
    assert len(judge.asked) == asked


def test_criterion_changed_by_another_program_is_not_overwritten(sitting):
    sitting.rule.write_text("Mine.")
    with pytest.raises(SidelightError, match=wordings.FILE_CHANGED):
        sitting.queue.change_criterion("Yours.", seen=sitting.criterion.text)
    assert sitting.rule.read_text() == "Mine."
    with pytest.raises(SidelightError, match=wordings.CRITERION_EMPTY):
        sitting.queue.change_criterion(" \n", seen=sitting.criterion.text)


@pytest.mark.slow
def test_killed_review_loses_no_judge_answers(sitting, judge):
    killed = 0

    def reply(body):
        nonlocal killed
        killed += 1
        return truthful(body) if killed <= 90 else JSONResponse({}, status_code=500)

    judge.reply = reply
    with pytest.raises(SidelightError, match=wordings.JUDGE_SILENT):
        sitting.queue.ask()
    assert len(sitting.review.labels()) == 90
    with sitting.answers.path.open("a") as file:
        file.write('{"judge": "to')
    judge.reply = truthful
    asked = len(judge.asked)
    sitting.begin()
    sitting.queue.ask()
    assert len(judge.asked) == asked + FIRST - 90
    sample = sitting.review.for_people({})
    sitting.label(5)
    sitting.begin()
    assert {*sitting.review.for_people(sitting.queue.people)} == {*sample} - {
        *sitting.queue.decided
    }
    sitting.check()
    sitting.queue.ask()
    assert len(judge.asked) == asked + COUNT - 90


@pytest.mark.slow
def test_unanswered_and_doubtful_texts_go_to_the_person(sitting, judge):
    prose, wrong = set(), set()

    def reply(body):
        text = displayed_text(body)
        number = int(text.split()[-1])
        if number % 50 == 0:
            prose.add(number)
            return JSONResponse(chat_answer(("Well", {"Well": 0.99}), (" then", {" then": 0.9})))
        if number % 50 == 1:
            wrong.add(number)
            return JSONResponse(yes_no(0.02 if "X" in text else 0.97))
        return truthful(body)

    judge.reply = reply
    sitting.queue.ask()
    sitting.check()
    sitting.queue.ask()
    people = sitting.queue.people
    wanted = {sitting.pool.examples.rows[row]["id"] for row in sitting.review.for_people(people)}
    each = {sitting.pool.examples.rows[row]["id"] for row in people}
    assert prose - each <= wanted
    # The probe of a tiny model finds most of them.
    assert len(wrong & wanted) > len(wrong - each) / 2
    assert len(wanted) < COUNT / 4
    # A person's label replaces the judge's.
    rows = sitting.label(len(wanted))
    assert {sitting.pool.examples.rows[row]["id"] for row in rows} == wanted
    labels = {row["id"]: row["label"] for row in sitting.read().rows}
    assert len(labels) == COUNT
    assert {n: labels[n] for n in wanted} == {n: sitting.truth[n][0] for n in wanted}


def test_unavailable_judge_raises_an_error_and_manual_labelling_continues(tiny, tmp_path, judge):
    judge.answers(JSONResponse({}, status_code=503))
    sitting = ReviewSitting(tiny, tmp_path, judge, count=COUNT)
    with pytest.raises(SidelightError, match=wordings.JUDGE_SILENT):
        sitting.queue.ask()
    assert len(judge.asked) < 40
    assert sitting.review.progress is None
    assert sitting.label(3)


def test_label_changed_by_a_person_is_attributed_to_people(tmp_path):
    path = tmp_path / "labels.jsonl"
    cell = {"judge": "m 0", "probability": 0.9, "agreement": AGREEMENT}
    rows = [{"text": f"t{n}", "label": label, "labelled": cell} for n, label in enumerate("xxy")]
    path.write_text("".join(json.dumps(row) + "\n" for row in [{"text": "p", "label": "y"}, *rows]))
    file = LabelFile(path, lambda row: JudgeLabel.of(row, is_positive=row["label"] == "x"))
    file.replace_judge_rows([])
    assert [json.loads(line)["text"] for line in path.read_text().splitlines()] == ["p", "t2"]
    examples = load_examples(rows, positive="x")
    assert [(each.name, each.texts) for each in annotators_of(examples)] == [
        ("m 0", 2),
        ("people", 1),
    ]


AGREEMENT = {"texts": 100, "positives": 40, "value": 0.9, "low": 0.8, "high": 0.95}


def test_foreign_cells_are_not_parsed_as_judge_labels():
    for cell in (None, "x", 3, {"judge": "m"}, {"judge": "m", "probability": 0.9, "agreement": 1}):
        assert JudgeLabel.of({"labelled": cell}, is_positive=True) is None


def test_judge_answers_file_contains_no_texts_and_is_private(sitting, judge):
    sitting.queue.ask()
    content = sitting.answers.path.read_text()
    assert not any(row["text"] in content for row in sitting.rows)
    assert sitting.answers.path.stat().st_mode & 0o777 == 0o600


def test_read_judge_requires_a_criterion_from_file_or_argument(tmp_path):
    (tmp_path / "judge.toml").write_text('url = "http://127.0.0.1:1/v1"\nmodel = "m"\n')
    with pytest.raises(SidelightError, match=wordings.JUDGE_WITHOUT_CRITERION):
        read_judge(tmp_path / "judge.toml")
    mine = read_judge(tmp_path / "judge.toml", "Mine.")
    assert mine.criterion == "Mine."


def test_documented_judge_configurations_are_valid(tmp_path):
    page = (Path(__file__).parents[3] / "docs" / "from-a-rule.md").read_text()
    output = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    for text in output:
        (tmp_path / "judge.toml").write_text(text)
        assert read_judge(tmp_path / "judge.toml", "A rule.").kind == "chat"
    assert len(output) == 2


def test_command_rejects_invalid_judge_options_immediately(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "rule.md").write_text("A rule.")
    (tmp_path / "judge.toml").write_text('url = "http://127.0.0.1:1/v1"\nmodel = "m"\n')
    (tmp_path / "keyed.toml").write_text(
        'url = "http://127.0.0.1:1/v1"\nmodel = "m"\nkey_env = "NO_SUCH_KEY"\n'
    )
    rule = ["--criterion", "rule.md"]
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    for options, message in (
        (["--labels", "a,b", "--criterion", "none.md"], "Cannot read the criterion"),
        (["--labels", "a,b", "--judge", "judge.toml"], "asks about a criterion"),
        (["--labels", "a,b", *rule, "--judge", "keyed.toml"], "NO_SUCH_KEY, which is not set"),
        (["--labels", "a,b,c", *rule, "--judge", "judge.toml"], "needs exactly two labels"),
        (["--labels", "a,b", *rule, "--price", "1"], "need --judge"),
    ):
        assert cli("label", "texts.jsonl", *options) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "texts.jsonl").write_text('{"text": "a", "labelled": "by me"}\n')
    assert cli("label", "texts.jsonl", "--labels", "a,b") == 2
    assert "Rename the column" in capsys.readouterr().err


def test_command_asks_the_judge_and_prints_the_cost(tiny, tmp_path, monkeypatch, capsys, judge):
    """As a user starts it: no text and no key is in what it prints."""
    rows, _ = texts_of("binary", 150)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JUDGE_KEY", "a-secret-key")
    (tmp_path / "texts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "rule.md").write_text("A capital X.")
    (tmp_path / "judge.toml").write_text(
        f'url = "{judge.address}"\nmodel = "m"\nkey_env = "JUDGE_KEY"\n'
    )
    monkeypatch.setattr(uvicorn.Server, "run", lambda *_: None)
    command = ["label", "texts.jsonl", "--labels", "fine,toxic", "--criterion", "rule.md"]
    command += ["--judge", "judge.toml", "--judge-limit", "120", "--price", "2"]
    command += ["--model", saved(tiny, tmp_path / "model"), "--cache", str(tmp_path / "cache")]
    for asked in (120, 120):
        assert cli(*command) == 0
        assert len(judge.asked) == asked
        output = capsys.readouterr()
        printed = output.out + output.err
        assert not any(row["text"] in printed for row in rows)
        assert "a-secret-key" not in printed
    assert judge.headers[0]["authorization"] == "Bearer a-secret-key"
    assert "0 more have the judge's label." in output.out
    (tmp_path / "texts-labels-judge.jsonl").unlink()
    assert cli(*command) == 0
    assert re.search(
        r"Judge m labels a first part: 120 texts, about [\d,]+ tokens \(about 0\.\d\d\)",
        capsys.readouterr().out,
    )
