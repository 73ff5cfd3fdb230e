"""Results of tools: which texts are counted, and which turns a rule reads."""

import json

import pytest

import wordings
from sidelight.data.loading import load_examples
from sidelight.engines.transformers.backbone import load_backbone
from sidelight.errors import SidelightError
from sidelight.models.conversation import Reads
from sidelight.probes.artifact import save_probe
from sidelight.probes.bank import Bank
from sidelight_lab.bench.tools import REQUEST, measure_tools
from worlds.models import TOXICITY, saved, score, untrained_probe
from worlds.servers import cli

ROWS = [
    {"text": f"{kind} {i}: a result of a tool", "label": label, "subset": kind}
    for kind in ("logs", "mails")
    for i, label in enumerate(("fine", "fine", "toxic"))
]
# One pass reads the request alone, the other before a call and a result.
ROUNDING = 1e-5
ALL, TOOL = 'turns = "all"', 'turns = "tool"'


def probe_of(backbone, threshold=0.5, task=TOXICITY):
    reads = Reads(scope="each_turn")
    return untrained_probe(backbone, "toxicity", task=task, reads=reads, threshold=threshold)


def metrics(backbone, threshold):
    record = measure_tools(
        backbone, probe_of(backbone, threshold), load_examples(ROWS, task=TOXICITY)
    )
    return json.loads(record.to_json())["results"]


def counts(of_rule):
    return {
        name: tuple((rates[label]["flagged"], rates[label]["texts"]) for label in rates)
        for name, rates in of_rule.items()
    }


@pytest.mark.parametrize(("threshold", "share"), [(0.0, 1), (1.0, 0)])
def test_each_kind_counts_harmless_and_poisoned_results(tiny, threshold, share):
    kind = ((2 * share, 2), (share, 1))
    expected = {"all": ((4 * share, 4), (2 * share, 2)), "logs": kind, "mails": kind}
    each = metrics(tiny, threshold)
    assert counts(each[ALL]) == counts(each[TOOL]) == expected


def test_flagged_request_counts_only_under_the_all_turns_rule(tiny):
    # As the first turn of a longer chat: its states do not depend on later turns.
    probe, prompt = probe_of(tiny), tiny.encoder.encode([REQUEST])
    ((logits,),) = score(tiny, Bank([probe]), [prompt])
    each = float(probe.calibration.apply(logits[None])[0, 0])
    found = metrics(tiny, each - ROUNDING)
    assert counts(found[ALL])["all"] == ((4, 4), (2, 2))
    assert sum(flagged for flagged, _ in counts(found[TOOL])["all"]) < 6


def test_probe_that_classifies_no_turns_is_rejected(tiny):
    with pytest.raises(SidelightError, match=wordings.JUDGES_NO_TURNS):
        measure_tools(tiny, untrained_probe(tiny, "p"), load_examples(ROWS, task=TOXICITY))


@pytest.mark.slow
def test_command_prints_and_writes_the_results_table(tiny, tmp_path, capsys):
    model = load_backbone(saved(tiny, tmp_path / "model"))
    probe = save_probe(probe_of(model), tmp_path / "probe")
    data = tmp_path / "results.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in ROWS))
    assert cli("bench", "tools", str(probe), "--data", str(data), "--out", str(tmp_path)) == 0
    output = capsys.readouterr().out
    assert output == (tmp_path / "tools.md").read_text()
    assert {"all", "logs", "mails"} <= {
        line.split("|")[1].strip() for line in output.split("\n") if "|" in line
    }
