"""``sidelight bench``: what probes cost on this machine, and whether they are right."""

import json
import sys
import tempfile
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from sidelight.cli import options
from sidelight.cli.runtime import Runtime
from sidelight.errors import SidelightError
from sidelight.guards import probe_folder
from sidelight.models.smollm2 import EMBEDDED_NAME
from sidelight.storage import write_json
from sidelight_lab.cli.options import AT_LEAST_TWO, POSITIVE, names, publish, split_numbers

if TYPE_CHECKING:
    from sidelight.engines.transformers.backbone import DtypeName
    from sidelight_lab.redteam.attacks import Messages


@click.group(epilog=options.examples("sidelight bench everyday probes/mine --data held_out.jsonl"))
def bench() -> None:
    """Compare costs side by side in one run; do not compare figures of different runs."""


_data = options.together(options.data, options.text, options.label)
_record = options.together(
    click.option(
        "--out",
        type=options.PATH,
        callback=options.checked_folder,
        help="Folder for the figures as JSON and as Markdown.",
    ),
    options.as_json,
)


@bench.command(
    "defaults",
    epilog=options.examples(
        "sidelight bench defaults --data train.jsonl --label intent --sizes 16,64",
        "sidelight bench defaults --data t.jsonl --sizes 16 --rivals tfidf,sentence_embeddings",
    ),
)
@_data
@click.option("--sizes", callback=split_numbers, default="16,64", help="Texts of each class.")
@click.option("--texts", callback=split_numbers, help="Texts in all, in the file's shares.")
@click.option("--draws", type=options.AT_LEAST_ONE, default=3, help="Draws of training texts.")
@click.option(
    "--held-out", type=options.AT_LEAST_ONE, default=400, help="Texts to measure on, of any class."
)
@click.option("--rivals", callback=names, default="tfidf", help="Trained on the same texts.  ")
@options.transformers
@options.as_json
def bench_defaults(
    runtime: Runtime,
    as_json: bool,
    data: str,
    text: str,
    label: str,
    rivals: list[str],
    **options: Any,
) -> None:
    """Measure what `sidelight train` makes of a file, on texts that it did not see.

    The same of texts alone (--background none), and each rival (tfidf, sentence_embeddings,
    attention_probe, encoder, means_all_layers, means_and_lasts, last_layer, mean_last_layer)
    stand beside the default probe, with what it gains: the 95 % interval over draws and texts. The
    last four, logistic regressions, are trained on texts alone and in the same
    contexts. The accuracy that training printed stands beside the one that was measured, and so
    does the share of background conversations that is flagged, of sources that no row was trained
    on.
    """
    from sidelight.data.loading import load_examples

    # Before imports that take seconds: a wrong file or column is refused at once.
    examples = load_examples(data, text=text, label=label)
    from sidelight.training.background import load_background
    from sidelight_lab.bench.defaults import compare_defaults, defaults_table, summarise

    backbone = runtime.load_transformers()
    with tempfile.TemporaryDirectory() as scratch:
        evaluated = compare_defaults(
            backbone,
            examples,
            **options,
            rivals=rivals,
            background=load_background("packaged"),
            cache_root=Path(scratch),
        )
    output = json.dumps(summarise(evaluated), indent=2) if as_json else defaults_table(evaluated)
    click.echo(output)


@bench.command(
    "everyday",
    epilog=options.examples(
        "sidelight bench everyday probes/injection --data held_out.jsonl --out everyday",
        "sidelight bench everyday probes/toxicity --data held_out.jsonl --padding chats.jsonl",
    ),
)
@click.argument("probe", type=options.PATH)
@_data
@click.option(
    "--padding",
    help="File of harmless texts instead of ToxicChat's, for the real prompts and the padding; "
    "the probe must not have been trained on them.",
)
@click.option("--harmless", help="File of more harmless texts, which get a row.")
@_record
@options.dtype
@options.device
def bench_everyday(
    probe: Path,
    data: str,
    text: str,
    label: str,
    padding: str | None,
    harmless: str | None,
    out: Path | None,
    as_json: bool,
    dtype: "DtypeName",
    device: str,
) -> None:
    """Test whether a probe is right in front of background traffic, and finds attacks in it.

    Harmless are small talk, conversations of agents with results of their tools, prompts of users,
    and long texts. Attacks are positive texts that are flagged alone. They stand in padding, before
    questions, and in turns of four words. The net is recall minus false alarms on
    the same texts without the attacks.
    """
    from sidelight.data.loading import load_examples
    from sidelight.probes.card import read_card

    # Before imports that take seconds: a wrong probe, file or column is refused at once.
    probe = probe_folder(probe)
    examples = load_examples(data, text=text, label=label, task=read_card(probe).task)
    from sidelight.classifier import load
    from sidelight_lab.bench.everyday import measure_everyday, toxicchat_prompts
    from sidelight_lab.redteam.targets import ProbeTarget, flagging_thresholds

    harmless_texts: dict[str, list[Messages]] = {}
    if harmless is not None:
        texts = load_examples(harmless, text=text, label=None)
        harmless_texts[Path(harmless).name] = [item.messages for item in texts.items]
    prompts: list[str] = []
    if padding is not None:
        prompts = [item.text for item in load_examples(padding, text=text, label=None).items]
    else:
        try:
            prompts = toxicchat_prompts()
        except SidelightError as error:
            click.echo(f"Real prompts and padding are left out: {error}", err=True)
    classifier = load(probe, dtype=dtype, device=device)
    target = ProbeTarget(
        backbone=classifier.backbone,
        thresholds=flagging_thresholds(classifier.probe),
        probe=classifier.probe,
    )
    record = measure_everyday(target, examples, prompts=prompts, user_texts=harmless_texts)
    publish(record, out, as_json=as_json)


@bench.command(
    "spans",
    epilog=options.examples(
        "sidelight bench spans --data t.jsonl --validation v.jsonl --test test.jsonl --out spans",
    ),
)
@options.training("And every setting of the optimisation of `sidelight train`.")
@click.option("--test", required=True, help="Texts to measure on.")
@click.option("--spans", default="spans", help="Column of the spans.")
@click.option("--seeds", type=options.AT_LEAST_ONE, default=3, help="Of the probe of all layers.")
@click.option(
    "--rivals",
    callback=names,
    default="last layer,mean of layers,lexicon,window,encoder",
    help="What stands beside it.  ",
)
@options.as_json
@options.transformers
def bench_spans(
    runtime: Runtime,
    inputs: options.TrainingInputs,
    assigned: dict[str, str],
    out: Path,
    as_json: bool,
    test: str,
    spans: str,
    seeds: int,
    rivals: list[str],
) -> None:
    """Compare a probe of spans with rivals that learn from the same texts.

    Rivals are the same probe of the last layer alone and of the mean over layers, the words of
    labelled spans (lexicon), a logistic regression on TF-IDF of a word and its neighbours (window),
    and a MiniLM that is fine-tuned to label its tokens (encoder). Differences are paired by text.
    """
    from sidelight.data.examples import validation_share
    from sidelight.data.loading import load_examples
    from sidelight.models.smollm2 import cache_root
    from sidelight.training.settings import TrainingSettings, suggested_settings
    from sidelight_lab.bench.spans import compare_spans

    # The seeds are --seeds.
    kinds = {field.name: field.type for field in fields(TrainingSettings) if field.name != "seed"}
    settings = suggested_settings("spans").changed(**options.typed(assigned, kinds))
    fit_options = replace(inputs.fit_options(), settings=settings)
    training, validation = inputs.load(spans)
    if validation is None:
        training, validation = training.split(validation_share(len(training)), seed=0)
    tested = load_examples(
        test, text=inputs.text, response=inputs.response, spans=spans, task=training.task
    )
    with tempfile.TemporaryDirectory(dir=inputs.cache) as scratch:
        root = fit_options.cache_root or cache_root() / "activations"
        record = compare_spans(
            runtime.load_transformers(),
            training,
            validation,
            tested,
            options=fit_options,
            seeds=seeds,
            root=root if inputs.keep_cache else Path(scratch),
            out=out,
            rivals=rivals,
        )
    publish(record, out, as_json=as_json)


@bench.command(
    "guards",
    epilog=options.examples(
        "sidelight bench guards --out results/guards",
        "sidelight bench guards --only injection,harmful --rows 600 --out results/guards",
    ),
)
@click.option("--only", callback=names, help="Guards. [default: all that judge whole texts]  ")
@click.option("--rows", type=AT_LEAST_TWO, help="Train on so many texts of each. [default: all]")
@click.option(
    "--rivals",
    callback=names,
    default="pooling,gate,attention,mean_last_layer,means_all_layers,tfidf,encoder",
    help="What stands beside it.  ",
)
@click.option(
    "--draws", type=options.AT_LEAST_ONE, default=1, help="Draw --rows texts so often, and average."
)
@click.option("--seeds", type=options.AT_LEAST_ONE, default=1, help="Of ours and the mechanisms.")
@options.out
@options.as_json
@options.transformers
def bench_guards(
    runtime: Runtime, only: list[str] | None, out: Path, as_json: bool, **options: Any
) -> None:
    """Measure probes of the ready guards on their public tests, beside rivals.

    What `sidelight train --data guard:NAME` makes stands beside the paper's mechanisms, linear
    probes of the last layer and of all layers, TF-IDF and a fine-tuned MiniLM, all trained on the
    same texts alone. A quarter of the packaged background, by sources, is left out of training, and
    every row is measured on it. Below each test stand figures that other guards have published. A
    second run repeats no guard that has finished; hidden states are in --out until the end.
    """
    from sidelight.training.background import load_background
    from sidelight_lab.bench.guards import measure_guards

    record = measure_guards(
        runtime.load_transformers(),
        only or (),
        background=load_background("packaged"),
        out=out,
        **options,
    )
    publish(record, out, as_json=as_json)


@bench.command(
    "states",
    epilog=options.examples(
        "sidelight bench states --data train.jsonl --label intent --out states",
        "sidelight bench states --data guard:refusal --response response --texts 400",
    ),
)
@_data
@options.response
@click.option("--spans", help="Column of labelled spans, in place of --label.")
@click.option("--texts", type=AT_LEAST_TWO, default=400, help="Texts in each draw.")
@click.option("--draws", type=options.AT_LEAST_ONE, default=3, help="Draws, each with its seed.")
@_record
@options.transformers
def bench_states(
    runtime: Runtime,
    data: str,
    text: str,
    label: str,
    response: str | None,
    spans: str | None,
    texts: int,
    draws: int,
    out: Path | None,
    as_json: bool,
) -> None:
    """Measure what a probe loses by training on compressed hidden states.

    The default probe trains on whole states, then on all, a half and a quarter of each layer's
    principal directions, in 8 and in 16 bits. Each form's AUROC on left-out texts is compared with
    that of whole states on the same texts.
    """
    from sidelight.data.loading import load_examples

    # Before imports that take seconds: a wrong file or column is refused at once.
    examples = load_examples(data, text=text, label=label, response=response, spans=spans)
    from sidelight_lab.bench.states import compare_states

    with tempfile.TemporaryDirectory() as scratch:
        record = compare_states(
            runtime.load_transformers(),
            examples,
            side="prompt" if examples.items[0].response is None else "response",
            texts=texts,
            draws=draws,
            cache_root=Path(scratch),
        )
    publish(record, out, as_json=as_json)


@bench.command(
    "training",
    epilog=options.examples(
        "OMP_NUM_THREADS=1 sidelight bench training --out training",
        "sidelight bench training --texts 500,2000 --states stream --layers 8",
    ),
)
@click.option("--texts", callback=split_numbers, default="1000,5000,20000", help="How many.  ")
@click.option(
    "--states",
    type=click.Choice(["disk", "stream"]),
    multiple=True,
    default=["disk", "stream"],
    help="How hidden states are kept, as in --set states=; may be repeated.",
)
@click.option("--words", type=options.AT_LEAST_ONE, default=5, help="Of each text.")
@click.option("--epochs", type=options.AT_LEAST_ONE, default=1, help="Of each training.")
@click.option("--layers", type=options.AT_LEAST_ONE, help="Hidden states that are read.")
@click.option("--memory", type=float, default=0.25, help="GiB of hidden states in memory.")
@click.option("--threads", type=options.AT_LEAST_ONE, default=1, help="Of each training.")
@options.model
@_record
def bench_training(
    texts: list[int],
    states: tuple[Literal["disk", "stream"], ...],
    model: str | None,
    out: Path | None,
    as_json: bool,
    **values: Any,
) -> None:
    """Measure what a training takes: seconds, memory and disk by the number of texts.

    Texts are runs of words of the packaged background, without contexts. Hidden states are
    kept compressed on disk, or computed again in each epoch. Each training has a process
    of its own. After a kill, the same command goes on with the next training, if --out names the
    same folder, where it also draws training.svg.
    """
    from sidelight_lab.bench.training import Workload, measure_training

    workload = Workload(model or EMBEDDED_NAME, **values)
    publish(measure_training(texts, states, workload, out=out), out, as_json=as_json)


@bench.command(
    "flips",
    epilog=options.examples(
        "sidelight bench flips --data train.jsonl --test test.jsonl --positive spam --out flips",
    ),
)
@_data
@click.option("--test", required=True, help="Texts to measure on.")
@click.option("--positive", required=True, help="The positive label; all others are negative.")
@click.option("--texts", type=AT_LEAST_TWO, default=400, help="Training texts.")
@click.option("--tested", type=AT_LEAST_TWO, default=400, help="Texts to measure on, at most.")
@click.option("--flips", callback=split_numbers, default="5,10,20", help="In percent.  ")
@click.option("--draws", type=options.AT_LEAST_ONE, default=3, help="Draws of the flips.")
@options.out
@options.as_json
@options.transformers
def bench_flips(runtime: Runtime, data: str, out: Path, as_json: bool, **values: Any) -> None:
    """Measure what wrong labels of a judge cost the probe of `sidelight label --judge`.

    Some of the true labels are flipped to one side: positives that a judge misses, or negatives
    that it takes for positives. A second probe learns after the true labels of the texts that the
    first one doubts are known. Draws that are done are not repeated.
    """
    from sidelight_lab.bench.judge_labels import measure_flips

    backbone = runtime.load_transformers()
    record = measure_flips(backbone, data, **values, cache=out / "cache", out=out)
    publish(record, out, as_json=as_json)


@bench.command(
    "second-stage",
    epilog=options.examples(
        "sidelight bench second-stage toxicchat --out results/second-stage",
        "sidelight bench second-stage xstest --texts 1000 --out results/second-stage",
    ),
)
@click.argument("subject", type=click.Choice(["toxicchat", "xstest"]))
@click.option("--texts", type=AT_LEAST_TWO, default=400, help="Training texts of a draw.")
@click.option("--negatives", type=AT_LEAST_TWO, default=800, help="Negative texts of ToxicChat.")
@click.option("--draws", type=options.AT_LEAST_ONE, default=3, help="Draws of training texts.")
@options.out
@options.as_json
@options.transformers
def bench_second_stage(runtime: Runtime, out: Path, as_json: bool, **values: Any) -> None:
    """Measure a probe with a judge behind it, by the share of texts that the judge gets.

    Of toxicchat, the judge is a MiniLM that is fine-tuned on the probe's training texts. Of xstest,
    it is GPT-4, by its recorded answers: a prompt that it refuses is harmful; the probe learns from
    the texts of the ready guard harmful. Probes are trained without background traffic. Draws that
    are done are not repeated; hidden states stay in --out.
    """
    from sidelight_lab.bench.second_stage import measure_second_stage

    publish(
        measure_second_stage(runtime.load_transformers(), out=out, **values), out, as_json=as_json
    )


@bench.command(
    "load",
    epilog=options.examples(
        "sidelight bench load --out load",
        "sidelight bench load --clients 8 --minutes 0.5 --round 5",
    ),
)
@click.option("--model", default="smollm2", help="As `sidelight serve` takes it.")
@click.option("--clients", type=options.AT_LEAST_ONE, default=64, help="Clients at once.")
@click.option("--minutes", type=POSITIVE, default=10.0, help="Minutes with probes, in total.")
@click.option(
    "--round", "round_s", type=POSITIVE, default=60.0, help="Seconds of each server in a round."
)
@click.option("--max-tokens", type=AT_LEAST_TWO, default=16, help="Tokens of an answer.")
@click.option("--spans", is_flag=True, help="Two of the three probes label tokens.")
@_record
def bench_load(minutes: float, out: Path | None, as_json: bool, **options: Any) -> None:
    """Let many chat clients ask at once, with blocking policies on prompt and response.

    The right verdicts on each prompt are known beforehand, so a verdict that is lost, comes twice
    or belongs to another request is found: the command then ends with an error. A second server
    without probes is asked in turn, to compare times.
    """
    from sidelight_lab.bench.load import run_load

    with tempfile.TemporaryDirectory() as scratch:
        record = run_load(Path(scratch), seconds=60 * minutes, **options)
    publish(record, out, as_json=as_json)
    if not record.results["is_sound"]:
        raise SidelightError("Some answers were faulty: see the table of faults.")


@bench.command(
    "tools",
    epilog=options.examples(
        "sidelight bench tools guard:injection --data guard:injection:tool_results",
    ),
)
@click.argument("probe", type=options.PATH)
@_data
@_record
@options.dtype
@options.device
def bench_tools(
    probe: Path,
    data: str,
    text: str,
    label: str,
    out: Path | None,
    as_json: bool,
    dtype: "DtypeName",
    device: str,
) -> None:
    """Count which results of tools a rule flags in an agent's chat.

    The rule has turns = "all" or turns = "tool". A column "subset" of the data names
    the kind of each result, which gets a row.
    """
    from sidelight.data.loading import load_examples
    from sidelight.probes.card import read_card

    # Before imports that take seconds: a wrong probe, file or column is refused at once.
    probe = probe_folder(probe)
    examples = load_examples(data, text=text, label=label, task=read_card(probe).task)
    from sidelight.classifier import load
    from sidelight_lab.bench.tools import measure_tools

    classifier = load(probe, dtype=dtype, device=device)
    record = measure_tools(classifier.backbone, classifier.probe, examples)
    publish(record, out, as_json=as_json)


@bench.command(
    "judge",
    epilog=options.examples(
        "sidelight bench judge --out judge", "sidelight bench judge --seconds 0.5 --clients 8"
    ),
)
@click.option("--model", default="smollm2", help="As `sidelight serve` takes it.")
@click.option("--seconds", type=POSITIVE, default=0.2, help="That the judge takes.")
@click.option("--rounds", type=AT_LEAST_TWO, default=20, help="Prompts of one client.")
@click.option("--clients", type=AT_LEAST_TWO, default=64, help="Clients at once, after that.")
@click.option("--max-tokens", type=AT_LEAST_TWO, default=8, help="Tokens of an answer.")
@_record
def bench_judge(model: str, out: Path | None, as_json: bool, **values: Any) -> None:
    """Time the first token of prompts that are deferred to a judge of a fixed speed.

    Each prompt is deferred and passes. It is compared with the slower of both: the first token of a
    server with the same probe and no rule, and the moment at which the judge has answered.
    """
    from sidelight.engines.transformers.backbone import load_backbone
    from sidelight_lab.bench.judge import measure_judge

    with tempfile.TemporaryDirectory() as scratch:
        record = measure_judge(load_backbone(model), Path(scratch), model=model, **values)
    publish(record, out, as_json=as_json)


@bench.command(
    "latency",
    epilog=options.examples(
        "sidelight bench latency --out latency",
        "sidelight bench latency --probe probes/injection --tokens 64,512 --rounds 100",
    ),
)
@click.option(
    "--tokens",
    callback=split_numbers,
    default="16,64,256,512,1024,2048",
    help="Lengths of the prompts.  ",
)
@click.option("--batch-sizes", callback=split_numbers, default="1,16", help="Prompts at once.  ")
@click.option("--rounds", type=options.AT_LEAST_ONE, default=5, help="Rounds of all rows in turn.")
@click.option(
    "--probe",
    "probes",
    multiple=True,
    help="Time a check by these probes over HTTP instead, as `sidelight serve` takes them; each "
    "--probe is a row.",
)
@click.option(
    "--layers",
    callback=split_numbers,
    help="With --probe, also time copies that read the first K hidden states alone.  ",
)
@_record
@options.transformers
def bench_latency(
    runtime: Runtime,
    probes: tuple[str, ...],
    layers: tuple[int, ...],
    tokens: tuple[int, ...],
    batch_sizes: tuple[int, ...],
    rounds: int,
    out: Path | None,
    as_json: bool,
) -> None:
    """Time one new token with every mechanism, with ten probes, and with what they replace.

    That is each mechanism in its dense form on hidden states that are kept, a small encoder before
    the LLM, and a guard of the LLM's own size before it. Then the CPU time of a token of four
    answers, with readouts and with probes of the five ready guards. Prompts and weights of probes
    are random.

    With --probe, time a check instead: one text to /v1/moderations of a server with these probes.
    """
    if layers and not probes:
        raise SidelightError("--layers is for copies of probes. Name some with --probe.")
    backbone = runtime.load_transformers()
    if probes:
        from sidelight_lab.bench.checks import measure_checks

        record = measure_checks(
            backbone, probes, tokens=tokens, rounds=rounds, dtype=runtime.dtype, layers=layers
        )
    else:
        from sidelight_lab.bench.latency import measure_latency

        record = measure_latency(backbone, tokens=tokens, batch_sizes=batch_sizes, rounds=rounds)
    publish(record, out, as_json=as_json)


@bench.command(
    "engines",
    epilog=options.examples(
        "sidelight bench engines --out engines",
        "sidelight bench engines models/Llama-3.2-3B models/Llama-3.2-3B-Q4_K_M.gguf --rounds 3",
    ),
)
@click.argument("models", nargs=-1)
@click.option("--threads", type=options.AT_LEAST_ONE, default=1, help="Of each engine.")
@click.option("--tokens", callback=split_numbers, default="256,1024", help="Of prompts.  ")
@click.option("--written", type=options.AT_LEAST_ONE, default=48, help="Tokens of each text.")
@click.option("--rounds", type=options.AT_LEAST_ONE, default=5, help="Of all models in turn.")
@options.dtype
@_record
def bench_engines(models: tuple[str, ...], out: Path | None, as_json: bool, **options: Any) -> None:
    """Compare transformers and llama.cpp on the CPU: prompts, texts, probes and memory.

    MODELS are as `sidelight serve` takes them; without any, they are the embedded model in both
    engines. The others are compared with the first. Each has a process of its own, and
    the rounds ask them in turn, without probes and with three, one of which reads what is
    written. --dtype is for those that are no GGUF files. After a kill, the same command goes on
    with the next round, if --out names the same folder.
    """
    from sidelight_lab.bench.engines import compare_engines
    from sidelight_llama.files import EMBEDDED_GGUF

    chosen = models or (EMBEDDED_NAME, EMBEDDED_GGUF)
    publish(compare_engines(chosen, **options, out=out), out, as_json=as_json)


@bench.command(
    "serve",
    epilog=options.examples(
        "OMP_NUM_THREADS=1 VLLM_CPU_KVCACHE_SPACE=1 sidelight bench serve",
        "sidelight bench serve --engine-option enforce_eager=true",
    ),
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
    out: Path | None, model: str | None, engine_option: dict[str, Any], **options: Any
) -> None:
    """Do the same work with and without probes in one running vLLM, in paired rounds.

    The probes have random weights: 0, 1, 10 and 100 readout probes, one attention probe, of
    responses a readout and a probe of spans, and those of the five ready guards. What they add is a
    share of the value without probes, with a 95 % interval over rounds. --out is written after
    every round, so a run that is stopped keeps those before.
    """
    from sidelight_lab.bench.serving import measure_costs

    costs: list[dict[str, Any]] = []
    for found in measure_costs(model or "smollm2", options=engine_option, **options):
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
        "sidelight bench gpu --out gpu-check --only train --only vllm",
    ),
)
@options.out
@click.option("--model", help="Model that is checked, small enough for float32. [default: smollm2]")
@click.option("--only", multiple=True, metavar="NAME", help="Sections that begin so; repeatable.")
@options.engine_option
def bench_gpu(out: Path, **options: Any) -> None:
    """Check this machine's GPU: the transformers engine, then probes inside vLLM; 30 minutes.

    Each section runs in a process of its own, so one that fails loses no other, and is given up
    after ten minutes. A second run repeats what has not passed. --out gets gpu.json and gpu.md,
    which can be attached to an issue as they are, and logs. Without a GPU the sections run with
    tiny sizes, to try out the check. The exit code is 1 if a section did not pass.
    """
    from sidelight_lab.bench.gpu import run_check

    passed = run_check(out, **options)
    click.echo(f"The report is {out / 'gpu.md'}.")
    if not passed:
        sys.exit(1)
