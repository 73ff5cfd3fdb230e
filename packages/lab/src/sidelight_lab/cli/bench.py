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
    """Compare costs side by side in one run. Costs from different runs are not comparable."""


_data = options.together(options.data, options.text, options.label)
_record = options.together(
    click.option(
        "--out",
        type=options.PATH,
        callback=options.checked_folder,
        help="Folder for the results, as JSON and Markdown.",
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
@click.option("--sizes", callback=split_numbers, default="16,64", help="Training texts per class.")
@click.option(
    "--texts", callback=split_numbers, help="Total training texts, in the file's class balance."
)
@click.option(
    "--draws", type=options.AT_LEAST_ONE, default=3, help="Random draws of training texts."
)
@click.option(
    "--held-out", type=options.AT_LEAST_ONE, default=400, help="Test texts, of any class."
)
@click.option(
    "--rivals", callback=names, default="tfidf", help="Baselines to train on the same texts.  "
)
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
    """Measure the default probe of `sidelight train` on held-out texts of a file.

    Compares the default probe with one trained without background (--background none) and with each
    rival (tfidf, sentence_embeddings, attention_probe, encoder, means_all_layers, means_and_lasts,
    last_layer, mean_last_layer), with a 95 % interval of its gain over draws and texts. The last
    four are logistic regressions, trained both without contexts and in the same contexts. The
    report also has the accuracy that training printed, next to the measured one, and the
    false-positive rate on background conversations from held-out sources.
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
@click.option("--harmless", help="File of additional harmless texts, reported in their own row.")
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
    """Measure a probe's false positives on background traffic and its recall of embedded attacks.

    Harmless texts are small talk, agent conversations with tool results, user prompts, and long
    texts. Attacks are positive texts that the probe flags without context. They are embedded in
    padding, placed before questions, and split into turns of four words. The net score is the
    recall minus the false-positive rate on the same texts without the attacks.
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
        harmless_texts[Path(harmless).name] = [tuple(item.messages) for item in texts.items]
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
@options.training("Training options: the optimisation settings of `sidelight train`.")
@click.option("--test", required=True, help="Test texts.")
@click.option("--spans", default="spans", help="Column with the spans.")
@click.option(
    "--seeds", type=options.AT_LEAST_ONE, default=3, help="Seeds for the all-layer probe."
)
@click.option(
    "--rivals",
    callback=names,
    default="last layer,mean of layers,lexicon,window,encoder",
    help="Baselines to compare with.  ",
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
    """Compare a probe that labels spans with baselines trained on the same texts.

    The baselines are the same probe on the last layer and on the mean over layers, the words of
    labelled spans (lexicon), a logistic regression on the TF-IDF of a word and its neighbours
    (window), and a MiniLM fine-tuned to label tokens (encoder). Differences are paired by text.
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
@click.option(
    "--only", callback=names, help="Guards to train. [default: all that classify whole texts]  "
)
@click.option("--rows", type=AT_LEAST_TWO, help="Training texts per guard. [default: all]")
@click.option(
    "--rivals",
    callback=names,
    default="pooling,gate,attention,mean_last_layer,means_all_layers,tfidf,encoder",
    help="Baselines to compare with.  ",
)
@click.option(
    "--draws",
    type=options.AT_LEAST_ONE,
    default=1,
    help="Random draws of --rows texts to average over.",
)
@click.option(
    "--seeds", type=options.AT_LEAST_ONE, default=1, help="Seeds for our probe and the mechanisms."
)
@options.out
@options.as_json
@options.transformers
def bench_guards(
    runtime: Runtime, only: list[str] | None, out: Path, as_json: bool, **options: Any
) -> None:
    """Measure the ready guards and their baselines on public tests.

    Compares the probe of `sidelight train --data guard:NAME` with the paper's mechanisms, linear
    probes on the last layer and on all layers, TF-IDF and a fine-tuned MiniLM, all trained on the
    same texts without background. A quarter of the packaged background, split by source, is held
    out, and every row is measured on it. Each test also lists published results of other guards.
    A second run skips finished guards; hidden states stay in --out until the end.
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
@click.option("--spans", help="Column with labelled spans; replaces --label.")
@click.option("--texts", type=AT_LEAST_TWO, default=400, help="Texts per draw.")
@click.option(
    "--draws",
    type=options.AT_LEAST_ONE,
    default=3,
    help="Random draws, each with a different seed.",
)
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

    The default probe is trained on uncompressed states, then on all, half and a quarter of each
    layer's principal directions, in 8 and in 16 bits. The AUROC of each form on held-out texts is
    compared with that of uncompressed states on the same texts.
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
@click.option(
    "--texts",
    callback=split_numbers,
    default="1000,5000,20000",
    help="Numbers of training texts.  ",
)
@click.option(
    "--states",
    type=click.Choice(["disk", "stream"]),
    multiple=True,
    default=["disk", "stream"],
    help="How to store hidden states, as in --set states=; may be repeated.",
)
@click.option("--words", type=options.AT_LEAST_ONE, default=5, help="Words per text.")
@click.option("--epochs", type=options.AT_LEAST_ONE, default=1, help="Epochs per training run.")
@click.option("--layers", type=options.AT_LEAST_ONE, help="Number of hidden states to read.")
@click.option("--memory", type=float, default=0.25, help="Memory for hidden states, in GiB.")
@click.option("--threads", type=options.AT_LEAST_ONE, default=1, help="Threads per training run.")
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
    """Measure the time, memory and disk space of training, by the number of texts.

    Texts are sequences of words from the packaged background, without contexts. Hidden states
    are stored compressed on disk, or recomputed in each epoch. Each training run has a separate
    process. To resume an interrupted benchmark, repeat the command with the same --out, which
    also gets training.svg.
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
@click.option("--test", required=True, help="Test texts.")
@click.option("--positive", required=True, help="Positive label; all others are negative.")
@click.option("--texts", type=AT_LEAST_TWO, default=400, help="Training texts.")
@click.option("--tested", type=AT_LEAST_TWO, default=400, help="Maximum number of test texts.")
@click.option(
    "--flips",
    callback=split_numbers,
    default="5,10,20",
    help="Shares of labels to flip, in percent.  ",
)
@click.option("--draws", type=options.AT_LEAST_ONE, default=3, help="Random draws of the flips.")
@options.out
@options.as_json
@options.transformers
def bench_flips(runtime: Runtime, data: str, out: Path, as_json: bool, **values: Any) -> None:
    """Measure how a judge's wrong labels affect the probe of `sidelight label --judge`.

    Some of the true labels are flipped in one direction: positives that a judge misses, or
    negatives that it labels as positive. A second probe is trained after the labels that the first
    one doubts are corrected. Finished draws are not repeated.
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
@click.option("--texts", type=AT_LEAST_TWO, default=400, help="Training texts per draw.")
@click.option("--negatives", type=AT_LEAST_TWO, default=800, help="Negative texts from ToxicChat.")
@click.option(
    "--draws", type=options.AT_LEAST_ONE, default=3, help="Random draws of training texts."
)
@options.out
@options.as_json
@options.transformers
def bench_second_stage(runtime: Runtime, out: Path, as_json: bool, **values: Any) -> None:
    """Measure a probe with a second-stage judge, by the share of texts deferred.

    For toxicchat, the judge is a MiniLM fine-tuned on the probe's training texts. For xstest, the
    judge is GPT-4 with its recorded responses, where a refusal means that the prompt is harmful,
    and the probe is trained on the texts of the ready guard harmful. Probes are trained without
    background traffic. Finished draws are not repeated; hidden states stay in --out.
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
@click.option("--model", default="smollm2", help="Backbone, as in `sidelight serve`.")
@click.option("--clients", type=options.AT_LEAST_ONE, default=64, help="Concurrent clients.")
@click.option("--minutes", type=POSITIVE, default=10.0, help="Total minutes with probes.")
@click.option(
    "--round", "round_s", type=POSITIVE, default=60.0, help="Seconds per server in each round."
)
@click.option("--max-tokens", type=AT_LEAST_TWO, default=16, help="Tokens per answer.")
@click.option("--spans", is_flag=True, help="Make two of the three probes label tokens.")
@_record
def bench_load(minutes: float, out: Path | None, as_json: bool, **options: Any) -> None:
    """Run many concurrent chat clients under policies that block prompts and responses.

    The correct verdicts on each prompt are known in advance. The command fails if a verdict is
    lost, duplicated, or belongs to another request. For comparison, a second server without probes
    is measured in alternation.
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
    """Count the tool results that a rule flags in an agent's chat.

    The rule has turns = "all" or turns = "tool". The column "subset" of the data names the kind of
    each result, and each kind gets a row in the table.
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
@click.option("--model", default="smollm2", help="Backbone, as in `sidelight serve`.")
@click.option(
    "--seconds", type=POSITIVE, default=0.2, help="Seconds that the judge takes to answer."
)
@click.option("--rounds", type=AT_LEAST_TWO, default=20, help="Prompts from the single client.")
@click.option(
    "--clients", type=AT_LEAST_TWO, default=64, help="Concurrent clients in the second part."
)
@click.option("--max-tokens", type=AT_LEAST_TWO, default=8, help="Tokens per answer.")
@_record
def bench_judge(model: str, out: Path | None, as_json: bool, **values: Any) -> None:
    """Time the first token of prompts that are deferred to a fixed-speed judge.

    Each prompt is deferred and passes. The time to the first token is compared with the slower of
    the judge's answer and the first token of a server that has the same probe but no rule.
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
    help="Prompt lengths, in tokens.  ",
)
@click.option("--batch-sizes", callback=split_numbers, default="1,16", help="Prompts per batch.  ")
@click.option(
    "--rounds", type=options.AT_LEAST_ONE, default=5, help="Rounds; each times every row once."
)
@click.option(
    "--probe",
    "probes",
    multiple=True,
    help="Time a check by these probes over HTTP instead, named as in `sidelight serve`; each "
    "--probe is a row.",
)
@click.option(
    "--layers",
    callback=split_numbers,
    help="With --probe, also time copies that read only the first K hidden states.  ",
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
    """Time one new token with each mechanism, with ten probes, and with the systems they replace.

    These systems are each mechanism in its dense form on stored hidden states, a small encoder
    before the LLM, and a guard model of the LLM's own size before it. A second table has the CPU
    time per token of four responses, with readouts and with probes of the five ready guards.
    Prompts and probe weights are random.

    With --probe, time a check instead: a single text sent to /v1/moderations of a server with these
    probes.
    """
    if layers and not probes:
        raise SidelightError("--layers applies to copies of probes. Name probes with --probe.")
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
@click.option("--threads", type=options.AT_LEAST_ONE, default=1, help="Threads per engine.")
@click.option(
    "--tokens", callback=split_numbers, default="256,1024", help="Prompt lengths, in tokens.  "
)
@click.option(
    "--written", type=options.AT_LEAST_ONE, default=48, help="Tokens to generate per text."
)
@click.option(
    "--rounds", type=options.AT_LEAST_ONE, default=5, help="Rounds; each times every model once."
)
@options.dtype
@_record
def bench_engines(models: tuple[str, ...], out: Path | None, as_json: bool, **options: Any) -> None:
    """Compare transformers and llama.cpp on the CPU: prompts, texts, probes and memory.

    MODELS are named as in `sidelight serve`. By default, they are the embedded model in both
    engines. The others are compared with the first. Each model runs in a separate process, and
    each round measures them in alternation, without probes and with three probes, one of which
    reads the response. --dtype does not apply to GGUF files. To resume an interrupted run, repeat
    the command with the same --out.
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
    "--tokens",
    type=click.IntRange(min=8),
    default=256,
    help="Approximate prompt length, in tokens.",
)
@click.option("--requests", type=AT_LEAST_TWO, default=8, help="Concurrent requests.")
@click.option("--written", type=AT_LEAST_TWO, default=96, help="Tokens generated per request.")
@options.json_file
@options.model
@options.dtype
@options.engine_option
def bench_serve(
    out: Path | None, model: str | None, engine_option: dict[str, Any], **options: Any
) -> None:
    """Measure vLLM with and without probes on the same work, in paired rounds.

    The probes have random weights: 0, 1, 10 and 100 readout probes, one attention probe, a readout
    and a span probe that read responses, and probes like the five ready guards. Their overhead is
    reported relative to the value without probes, with a 95 % interval over rounds. --out is
    written after every round, so an interrupted run keeps its finished rounds.
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
@click.option("--model", help="Model to check; must fit in float32. [default: smollm2]")
@click.option(
    "--only",
    multiple=True,
    metavar="NAME",
    help="Run sections whose names begin with this; may be repeated.",
)
@options.engine_option
def bench_gpu(out: Path, **options: Any) -> None:
    """Check this machine's GPU with the transformers engine and probes inside vLLM (30 minutes).

    Each section runs in a separate process with a limit of ten minutes, so a failure does not
    affect the others. A second run repeats only sections that have not passed. --out gets logs,
    gpu.json and gpu.md, which you can attach to an issue. Without a GPU, the sections run with tiny
    sizes, as a dry run of the check. The exit code is 1 if a section did not pass.
    """
    from sidelight_lab.bench.gpu import run_check

    passed = run_check(out, **options)
    click.echo(f"The report is {out / 'gpu.md'}.")
    if not passed:
        sys.exit(1)
