"""``sidelight bench``: what extraction, training, judging and serving cost on this machine."""

import json
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sidelight.cli import options
from sidelight.errors import SidelightError
from sidelight.storage import write_json
from sidelight_lab.cli.options import (
    AT_LEAST_TWO,
    POSITIVE,
    cache_option,
    publish,
    record_options,
    split_names,
    split_numbers,
)

if TYPE_CHECKING:
    from sidelight.data.examples import LabelledExamples
    from sidelight_lab.redteam.attacks import Messages

_XSTEST = "xstest_completions/all.jsonl.gz"
_TOKENS = click.IntRange(min=8)
_rows_option = click.option(
    "--rows", type=click.IntRange(min=20), help="Use N rows, drawn at random, class by class."
)


@click.group(epilog=options.examples("sidelight bench extract --data train.jsonl --label toxicity"))
def bench() -> None:
    """Compare costs side by side in one run; do not compare figures of different runs."""


_data_options = options.together(
    click.option("--data", required=True, help="A labelled file."),
    options.text,
    options.label,
    _rows_option,
    click.option("--repeats", type=options.AT_LEAST_ONE, default=3, help="Timed rounds."),
    options.backbone,
    options.as_json,
)


@bench.command("extract")
@_data_options
@options.engine
def bench_extract(runtime: options.Runtime, as_json: bool, repeats: int, **given: Any) -> None:
    """Time extraction into the cache beside a plain forward pass over the same batches.

    With --engine vllm, extraction through vLLM is timed too.
    """
    from sidelight_lab.bench.training import compare_extraction

    examples = _examples(given)
    backbone = replace(runtime, engine="transformers", engine_option={}).load_backbone()
    other = nullcontext()
    if runtime.engine != "transformers":
        other = runtime.state_source(backbone)
    with other as rival:
        figures = compare_extraction(backbone, examples, repeats=repeats, rival=rival)
    _print_figures(figures, as_json)


@bench.command("train")
@_data_options
@options.mechanisms(default="pooling,gate,attention,readout", show_default=True, help="To train.")
@click.option("--seeds", type=options.AT_LEAST_ONE, default=3, help="Trainings of each mechanism.")
def bench_train(
    runtime: options.Runtime,
    as_json: bool,
    repeats: int,
    mechanisms: list[str],
    seeds: int,
    **given: Any,
) -> None:
    """Time the training of several mechanisms with several seeds beside one extraction."""
    from sidelight_lab.bench.training import compare_training

    examples, backbone = _examples(given), runtime.load_backbone()
    figures = compare_training(
        backbone, examples, repeats=repeats, mechanisms=mechanisms, seeds=seeds
    )
    _print_figures(figures, as_json)


@bench.command(
    "defaults",
    epilog=options.examples(
        "sidelight bench defaults --data train.jsonl --label intent --sizes 16,64",
        "sidelight bench defaults --data t.jsonl --sizes 16 --rivals tfidf,sentence_embeddings",
    ),
)
@click.option("--data", required=True, help="A labelled file.")
@options.text
@options.label
@click.option("--sizes", callback=split_numbers, default="16,64", help="Texts of each class.")
@click.option("--texts", callback=split_numbers, help="Texts in all, in the file's shares.")
@click.option("--draws", type=options.AT_LEAST_ONE, default=3, help="Draws of training texts.")
@click.option(
    "--held-out", type=options.AT_LEAST_ONE, default=400, help="Texts to measure on, of any class."
)
@click.option("--rivals", default="tfidf", help="Trained on the same texts.  ")
@options.backbone
@options.as_json
def bench_defaults(runtime: options.Runtime, as_json: bool, **given: Any) -> None:
    """Measure what `sidelight train` makes of a file, on texts that it did not see.

    The same of texts alone (--background none), `linear`, and each rival (tfidf,
    sentence_embeddings, attention_probe, means_all_layers, means_and_lasts, last_layer) stand
    beside the default probe, with what it gains: the 95 % interval over draws and texts. The last
    three, logistic regressions, are trained on texts alone and in the same contexts. The accuracy
    that training printed stands beside the one that was measured.
    """
    from sidelight.training.background import default_background
    from sidelight_lab.bench.defaults import compare_defaults, defaults_table, described

    examples, backbone = _examples(given), runtime.load_backbone()
    with tempfile.TemporaryDirectory() as scratch:
        judged = compare_defaults(
            backbone,
            examples,
            rivals=split_names(given["rivals"]),
            background=default_background(backbone),
            **{key: given[key] for key in ("sizes", "texts", "draws", "held_out")},
            cache_root=Path(scratch),
        )
    shown = json.dumps(described(judged), indent=2) if as_json else defaults_table(judged)
    click.echo(shown)


def _print_figures(figures: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(figures, indent=2))
        return
    for name, value in figures.items():
        click.echo(f"{name:<28} {value}")


def _examples(given: dict[str, Any], **columns: Any) -> "LabelledExamples":
    from sidelight.data.loading import load_examples

    label: str = given["label"]
    loaded = load_examples(given["data"], text=given["text"], label=label, **columns)
    if given.get("rows") is None:
        return loaded
    return loaded.select(loaded.draw(given["rows"], seed=0))


@bench.command(
    "everyday",
    epilog=options.examples(
        "sidelight bench everyday probes/injection --data held_out.jsonl --out everyday",
        "sidelight bench everyday probes/toxicity --data held_out.jsonl --padding chats.jsonl",
    ),
)
@click.argument("probe", type=options.PATH)
@click.option("--data", required=True, help="Labelled texts that the probe was not trained on.")
@options.text
@options.label
@click.option("--flag", help="Labels that flag a text, with commas. [default: all positive ones]")
@click.option("--attacks", type=options.AT_LEAST_ONE, default=20, help="Positive texts to hide.")
@click.option(
    "--padding",
    help="File of harmless texts instead of ToxicChat's, for the real prompts and the padding; "
    "the probe must not have been trained on them.",
)
@click.option("--harmless", help="File of more harmless texts, which get a row.")
@click.option("--seed", type=int, default=0, help="Draws texts and paddings.")
@record_options("everyday.json and everyday.md", has_plots=False)
@options.dtype
@options.device
def bench_everyday(probe: Path, out: Path | None, as_json: bool, **given: Any) -> None:
    """Test whether a probe is right in front of ordinary traffic, and finds attacks in it.

    Harmless are small talk, conversations of agents with results of their tools, prompts of users,
    and long texts. Attacks are positive texts that are flagged alone. They stand in padding, beside
    questions and stories, and in turns of four words. The net is recall minus false alarms on
    the same texts without the attacks.
    """
    from sidelight.data.loading import load_examples
    from sidelight.training.classifier import load
    from sidelight_lab.bench.everyday import measure_everyday, toxicchat_prompts
    from sidelight_lab.redteam.subjects import ProbeTarget, flagging_thresholds

    classifier = load(probe, dtype=given["dtype"], device=given["device"])
    target = ProbeTarget(
        backbone=classifier.backbone,
        thresholds=flagging_thresholds(classifier.probe, labels=split_names(given["flag"])),
        probe=classifier.probe,
    )

    own: dict[str, list[Messages]] = {}
    if given["harmless"] is not None:
        texts = load_examples(given["harmless"], text=given["text"], label=None)
        own[Path(given["harmless"]).name] = [item.messages for item in texts.items]
    prompts: list[str] = []
    if given["padding"] is not None:
        texts = load_examples(given["padding"], text=given["text"], label=None)
        prompts = [item.text for item in texts.items]
    else:
        try:
            prompts = toxicchat_prompts()
        except SidelightError as error:
            click.echo(f"Real prompts and padding are left out: {error}", err=True)
    record = measure_everyday(
        target,
        _examples(given, task=classifier.probe.task),
        prompts=prompts,
        own=own,
        attacks=given["attacks"],
        seed=given["seed"],
    )
    publish(record, out, as_json=as_json)


@bench.command(
    "latency",
    epilog=options.examples(
        "sidelight bench latency --quick",
        "sidelight bench latency --out latency --plots latency",
        "sidelight bench latency --data test.jsonl.gz --rows 100 --batch-sizes 1 --mechanisms gate",
    ),
)
@click.option("--data", help="Prompts of a file, instead of random token ids.")
@options.text
@click.option("--rows", type=options.AT_LEAST_ONE, default=64, help="Prompts of --data to use.")
@click.option(
    "--max-tokens", type=options.AT_LEAST_ONE, default=512, help="Longer prompts of --data are cut."
)
@click.option("--batch-sizes", callback=split_numbers, help="Prompts of a batch. [default: 1,16]")
@click.option(
    "--lengths",
    callback=split_numbers,
    help="Tokens of a random prompt. [default: 16,64,256,512,1024,2048]",
)
@click.option("--mechanisms", help="Names, separated by commas. [default: all]")
@click.option("--cascades/--no-cascades", default=True, help="Include two models in turn.")
@click.option("--repeats", type=options.AT_LEAST_ONE, help="Timed rounds. [default: 5]")
@click.option("--quick", is_flag=True, help="Batch 1, lengths 16 and 256, 2 repeats.")
@record_options("latency.json and latency.md")
@options.backbone
def bench_latency(
    runtime: options.Runtime, as_json: bool, out: Path | None, plots: Path | None, **given: Any
) -> None:
    """Time one new token of the LLM with and without probes, and with what probes replace.

    The rows are the LLM alone, with each mechanism, with ten probes, with each mechanism reading
    kept hidden states, and behind a classifier or a guard of its own. Weights of probes and
    classifiers are random, which does not change their speed.
    """
    from sidelight.data.loading import load_examples
    from sidelight_lab.bench.latency import measure_latency
    from sidelight_lab.bench.subjects import default_subjects, random_loads, text_loads

    repeats = given["repeats"] or (2 if given["quick"] else 5)
    backbone = runtime.load_backbone()
    names = None if given["mechanisms"] is None else split_names(given["mechanisms"])
    subjects = default_subjects(backbone, mechanisms=names, cascades=given["cascades"])
    sizes = given["batch_sizes"] or ((1,) if given["quick"] else (1, 16))
    if given["data"] is None:
        usual = (16, 256) if given["quick"] else (16, 64, 256, 512, 1024, 2048)
        fitting = [length for length in usual if length <= backbone.encoder.max_tokens]
        loads = random_loads(backbone, given["lengths"] or fitting, batch_sizes=sizes)
    else:
        loads = text_loads(
            backbone,
            load_examples(given["data"], text=given["text"], label=None).items[: given["rows"]],
            batch_sizes=sizes,
            max_tokens=given["max_tokens"],
            title=f"prompts of {Path(given['data']).name}",
        )
    record = measure_latency(backbone, subjects, loads, repeats=repeats)
    publish(record, out, as_json=as_json, plots=plots)


@bench.command(
    "streaming",
    epilog=options.examples(
        "sidelight bench streaming --out streaming --plots streaming",
        "sidelight bench streaming --data answers.jsonl --label kind --positive leak --name leak",
    ),
)
@click.option("--data", help=f"Responses with labels. [default: {_XSTEST} in $SIDELIGHT_DATA]")
@click.option("--text", default="prompt", help="Column of the prompt.")
@click.option("--response", default="response", help="Column of the response.")
@click.option("--label", default="final_label", help="Column of the label.")
@click.option(
    "--positive",
    default="2_full_refusal,3_partial_refusal",
    help="Labels to catch, separated by commas.",
)
@click.option("--name", default="refusal", help="Name of what is caught, and of the probe.")
@click.option("--seeds", type=options.AT_LEAST_ONE, default=3, help="Trainings of the probe.")
@click.option(
    "--max-tokens",
    type=_TOKENS,
    default=128,
    help="Longer training texts (prompt and response) are cut; test texts are read whole.",
)
@_rows_option
@cache_option()
@record_options("streaming.json, streaming.md and one probe")
@options.backbone
def bench_streaming(
    runtime: options.Runtime, as_json: bool, out: Path | None, plots: Path | None, **given: Any
) -> None:
    """Measure how soon and how surely a probe catches a response while it is written.

    Probes are trained on the responses to one part of the prompts, rules are chosen on a second
    part, and the figures are those of a third. The probe stands beside its verdict on the whole
    response, TF-IDF on the text so far, and a list of phrases.
    """
    from sidelight.artifact import save_probe
    from sidelight_lab.bench.streaming import compare_streaming, with_positives
    from sidelight_lab.datasets import default_root

    backbone = runtime.load_backbone()
    given["data"] = given["data"] or default_root() / _XSTEST
    examples = with_positives(
        _examples(given, response=given["response"]),
        split_names(given["positive"]),
        name=given["name"],
    )
    record, probe = compare_streaming(
        backbone,
        examples,
        cache_root=given["cache"],
        **{option: given[option] for option in ("label", "name", "seeds", "max_tokens")},
    )
    if out is not None:
        save_probe(probe, out / "probe")
    publish(record, out, as_json=as_json, plots=plots)


_served_model_option = click.option(
    "--model", default="smollm2", help="As `sidelight serve` takes it."
)


@bench.command(
    "load",
    epilog=options.examples(
        "sidelight bench load --out load",
        "sidelight bench load --clients 8 --minutes 0.5 --round 5",
    ),
)
@_served_model_option
@click.option("--clients", type=options.AT_LEAST_ONE, default=64, help="Clients at once.")
@click.option("--minutes", type=POSITIVE, default=10.0, help="Minutes with probes, in total.")
@click.option(
    "--round", "round_s", type=POSITIVE, default=60.0, help="Seconds with probes in a round."
)
@click.option(
    "--plain-round", "plain_round_s", type=POSITIVE, default=20.0, help="Seconds without them."
)
@click.option("--max-tokens", type=AT_LEAST_TWO, default=16, help="Tokens of an answer.")
@record_options("load.json and load.md", has_plots=False)
def bench_load(minutes: float, out: Path | None, as_json: bool, **given: Any) -> None:
    """Let many chat clients ask at once, with blocking policies on prompt and response.

    The right verdicts on each prompt are known beforehand, so a verdict that is lost, comes twice
    or belongs to another request is found: the command then ends with an error. A second server
    without probes is asked in turn, to compare times.
    """
    from sidelight_lab.bench.load import run_load

    with tempfile.TemporaryDirectory() as scratch:
        record = run_load(Path(scratch), seconds=60 * minutes, **given)
    publish(record, out, as_json=as_json)
    if not record.results["is_sound"]:
        raise SidelightError("Some answers were faulty: see the table of faults.")


@bench.command(
    "soak",
    epilog=options.examples(
        "sidelight bench soak --out soak --plots soak",
        "sidelight bench soak --connections 200 --burst 50 --requests 240",
    ),
)
@_served_model_option
@click.option(
    "--connections",
    type=options.AT_LEAST_ONE,
    default=10_000,
    help="Connections, opened in bursts.",
)
@click.option("--burst", type=click.IntRange(1, 1000), default=500, help="Connections of a burst.")
@click.option(
    "--requests", type=click.IntRange(min=60), default=5_000, help="Sent after the bursts."
)
@click.option("--clients", type=click.IntRange(1, 64), default=32, help="Requests at once.")
@click.option("--max-tokens", type=click.IntRange(min=3), default=4, help="Tokens of an answer.")
@click.option(
    "--growth",
    "allowed_growth",
    type=click.FloatRange(min=0),
    default=1.0,
    help="How much memory may grow, in MB per 1,000 requests.",
)
@record_options("soak.json and soak.md")
def bench_soak(out: Path | None, plots: Path | None, as_json: bool, **given: Any) -> None:
    """Open connections in bursts, most of them broken off, then send requests of every kind.

    Requests are answered, streamed, blocked, cut, refused and given up. Memory and open files of
    the server are watched meanwhile. The exit code is 1 if a visit did not end as it had to, if
    memory grew, or if files or requests were left over at the end.
    """
    from sidelight_lab.bench.soak import run_soak

    with tempfile.TemporaryDirectory() as scratch:
        record = run_soak(Path(scratch), **given)
    publish(record, out, as_json=as_json, plots=plots)
    if record.results["faults"]:
        sys.exit(1)


@bench.command(
    "serve",
    epilog=options.examples(
        "OMP_NUM_THREADS=1 VLLM_CPU_KVCACHE_SPACE=1 sidelight bench serve --engine vllm",
        "sidelight bench serve --engine vllm --engine-option enforce_eager=true",
    ),
)
@click.option(
    "--engine",
    type=click.Choice(["vllm"]),
    required=True,
    expose_value=False,
    help="The engine that can exchange probes in a running worker.",
)
@click.option("--rounds", type=AT_LEAST_TWO, default=30, help="Paired rounds.")
@click.option(
    "--tokens", type=click.IntRange(min=8), default=256, help="Tokens of a prompt, roughly."
)
@click.option("--requests", type=AT_LEAST_TWO, default=8, help="Requests that run together.")
@click.option("--written", type=AT_LEAST_TWO, default=96, help="Tokens that each request writes.")
@options.json_file
@options.model
@options.dtype
@options.engine_option
def bench_serve(
    rounds: int, out: Path | None, model: str | None, engine_option: dict[str, Any], **given: Any
) -> None:
    """Do the same work with and without probes in one running vLLM, in paired rounds.

    The probes have random weights: 0, 1, 10 and 100 readout probes, one attention probe, and a
    readout of responses. What they add is a share of the value without probes, with a 95 % interval
    over rounds. --out is written after every
    round, so a run that is stopped keeps those before.
    """
    from sidelight_lab.bench.serving import measure_costs

    costs: list[dict[str, Any]] = []
    for found in measure_costs(model or "smollm2", options=engine_option, rounds=rounds, **given):
        costs = found["costs"]
        if out is not None:
            write_json(out, found)
    for cost in costs:
        click.echo(
            "{probes:<14} {measure:<20} {without:9.2f} {unit:<10} without  {added:+7.1%}  "
            "({low:+.1%} to {high:+.1%})".format(**cost)
        )


@bench.command(
    "gpu",
    epilog=options.examples(
        "sidelight bench gpu --out gpu-check",
        "sidelight bench gpu --out gpu-check --only tap --only graphs",
    ),
)
@click.option(
    "--out", type=options.PATH, callback=options.checked_folder, required=True,
    help="Folder for gpu.json, gpu.md and logs.",
)  # fmt: skip
@click.option(
    "--model", help="Model of the parity check, small enough for float32. [default: smollm2]"
)
@click.option(
    "--shape",
    help="Whose sizes serving is timed with: 135m, 3b or 8b. [default: the largest that fits]",
)
@click.option("--only", multiple=True, metavar="NAME", help="Sections that begin so; repeatable.")
@click.option("--again", is_flag=True, help="Measure again what has a result.")
@options.engine_option
def bench_gpu(out: Path, **given: Any) -> None:
    """Check probes inside vLLM on this machine's GPU: parity and overhead, in 25 minutes.

    Each section runs in a process of its own, so one that fails loses no other. A second run
    continues: sections that have a result are skipped. Without a GPU the sections run with tiny
    sizes, to try out the check. The exit code is 1 if a section failed or did not pass.
    """
    from sidelight_lab.bench.gpu import run_check

    passed = run_check(out, **given)
    click.echo(f"The report is {out / 'gpu.md'}.")
    if not passed:
        sys.exit(1)
