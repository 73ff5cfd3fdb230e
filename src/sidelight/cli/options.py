"""Options that several commands share, and what the commands make of them."""

import json
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import click
from pydantic import Field

from sidelight.errors import SidelightError, checked, did_you_mean
from sidelight.gguf_files import EMBEDDED_GGUF, find_gguf, is_gguf
from sidelight.smollm2 import EMBEDDED_NAME, require_model
from sidelight.storage import check_folder

if TYPE_CHECKING:
    from sidelight.backbone import Backbone, DtypeName, TransformersBackbone
    from sidelight.data.examples import LabelledExamples
    from sidelight.engines.base import Engine
    from sidelight.probe import Probe
    from sidelight.prompts.conversation import PromptFormat
    from sidelight.states.extraction import StateSource
    from sidelight.training.classifier import Classifier
    from sidelight.training.settings import FitOptions


Command = Callable[..., Any]
PATH = click.Path(path_type=Path)
AT_LEAST_ONE = click.IntRange(min=1)


def checked_folder(_context: click.Context, _option: Any, folder: Path | None) -> Path | None:
    """Refuses a folder that cannot be written, before the work begins."""
    if folder is not None:
        check_folder(folder)
    return folder


def checked_file(_context: click.Context, option: Any, path: Path | None) -> Path | None:
    """Refuses a file that cannot be written, before the work begins."""
    if path is None:
        return None
    if path.is_dir():
        raise SidelightError(f"{path} is a folder. Name a file in it with {option.opts[0]}.")
    check_folder(path.parent)
    return path


def _assigned(_context: click.Context, option: Any, value: tuple[str, ...]) -> dict[str, str]:
    """``epochs=3`` as ``{"epochs": "3"}``."""
    pairs = [assignment.partition("=") for assignment in value]
    for name, equals, text in pairs:
        if not (name and equals and text):
            raise SidelightError(
                f"Cannot read {option.opts[0]} {name}{equals}{text}. Write NAME=VALUE."
            )
    return {name: text for name, _, text in pairs}


def _assigned_json(*parsed: Any) -> dict[str, Any]:
    """As ``_assigned``; the values are JSON, or texts without quotes."""
    options: dict[str, Any] = {}
    for name, text in _assigned(*parsed).items():
        try:
            options[name] = json.loads(text)
        except ValueError:
            options[name] = text
    return options


def typed(assigned: Mapping[str, str], kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Values of ``--set``, each of the type that it has in ``kinds``.

    Raises:
        SidelightError: A name is not known, or a value is of another type.
    """
    values: dict[str, Any] = {}
    for name, text in assigned.items():
        if name not in kinds:
            raise SidelightError(
                f"There is no option '{name}'.{did_you_mean(name, {*kinds, *INPUT_SETTINGS})}"
            )
        values[name] = checked(kinds[name], text, f"Cannot read --set {name}={text}")
    return values


def announce(step: str) -> None:
    """Says on standard error what comes next, before imports and models that take seconds."""
    click.echo(f"{step} ...", err=True)


def warn(sentences: Iterable[str]) -> None:
    """Prints warnings on standard error."""
    for sentence in sentences:
        click.echo(f"Warning: {sentence}", err=True)


def examples(*commands: str) -> str:
    """Example commands for the end of a help page, each on its own line."""
    return "\b\nExamples:\n" + "\n".join(f"  {command}" for command in commands)


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """The model that runs, and what runs it: see ``engine`` and ``backbone``.

    Raises:
        SidelightError: Options are given that the engine has not; or there is no such device
            here, or no model in the folder or file that is named.
    """

    model: str | None
    dtype: "DtypeName"
    device: str
    engine: str = "transformers"
    engine_option: Mapping[str, Any] = field(default_factory=dict[str, Any])
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        if self.engine != "vllm" and self.engine_option:
            raise SidelightError(
                "--engine-option is for vLLM: give --engine vllm, or leave it out."
            )
        if self.engine == "vllm" and self.device != "auto":
            raise SidelightError("vLLM chooses its device itself; leave --device out.")
        if self.engine == "llama":
            self._require_no_dtype()
        if self.model is not None:
            self.model_of([])
        if self.device not in ("auto", "cpu"):
            # torch takes seconds, which are lost only if the device is wrong.
            from sidelight.machine import find_device

            find_device(self.device)

    def load_backbone(self, prompt_format: "PromptFormat | None" = None) -> "Backbone":
        """The backbone, for texts that are read."""
        return self._load(self.model_of([]), prompt_format, for_reading=self.engine != "vllm")

    def load_transformers(
        self, prompt_format: "PromptFormat | None" = None
    ) -> "TransformersBackbone":
        """The backbone in transformers, for what needs its weights."""
        from sidelight.backbone import TransformersBackbone

        backbone = self.load_backbone(prompt_format)
        assert isinstance(backbone, TransformersBackbone)
        return backbone

    def load_classifier(self, probe: Path) -> "Classifier":
        """A saved probe on its backbone."""
        from sidelight.artifact import load_probe
        from sidelight.training.classifier import load

        loaded = load_probe(probe)
        name, prompt_format = self.model_of([loaded]), loaded.prompt_format
        return load(probe, model=self._load(name, prompt_format, for_reading=True))

    def model_of(self, probes: "Sequence[Probe]") -> str:
        """The named model, or that of the first probe.

        Raises:
            SidelightError: It is a folder without a model, no file, or not for this engine.
        """
        name = self.model or (probes[0].fingerprint.name if probes else EMBEDDED_NAME)
        if self.engine == "llama" and name == EMBEDDED_NAME:
            name = EMBEDDED_GGUF
        if not is_gguf(name):
            if self.engine == "llama":
                raise SidelightError(
                    f"--engine llama runs GGUF files, and '{name}' is none. Name a .gguf file or "
                    "ollama:NAME, or leave --engine out."
                )
            if self.tokenizer is not None:
                raise SidelightError(
                    f"--tokenizer is for GGUF files; '{name}' has its own. Leave it out."
                )
            require_model(name)
            return name
        if self.engine not in ("auto", "llama"):
            raise SidelightError(
                f"'{name}' is a GGUF file, which only llama.cpp runs (--engine llama), not "
                f"{self.engine}. Name a folder saved by save_pretrained or a hub id here."
            )
        self._require_no_dtype()
        find_gguf(name)
        return name

    def _require_no_dtype(self) -> None:
        for option, value in (("--dtype", self.dtype), ("--device", self.device)):
            if value != "auto":
                raise SidelightError(
                    f"{option} {value} is not for GGUF files: their weights stay as they are, and "
                    "llama.cpp runs them on the CPU. Leave it out."
                )

    def _load(
        self, name: str, prompt_format: "PromptFormat | None", *, for_reading: bool
    ) -> "Backbone":
        if is_gguf(name):
            from sidelight.engines.llama.backbone import LlamaBackbone

            return LlamaBackbone(
                find_gguf(name), name=name, tokenizer=self.tokenizer, prompt_format=prompt_format
            )
        from sidelight.backbone import load_backbone

        return load_backbone(
            name,
            dtype=self.dtype,
            # Beside vLLM it only encodes texts, and gives its dtype.
            device="cpu" if self.engine == "vllm" else self.device,
            prompt_format=prompt_format,
            for_reading=for_reading,
        )

    def load_engine(self, probes: "Sequence[Probe]") -> "Engine":
        """An engine with these probes."""
        name = self.model_of(probes)
        if self.engine == "vllm":
            from sidelight.vllm.engine import load_vllm_engine

            return load_vllm_engine(name, probes, dtype=self.dtype, options=self.engine_option)
        from sidelight.backbone import TransformersBackbone
        from sidelight.probe import common_format

        backbone = self._load(name, common_format(probes), for_reading=False)
        if isinstance(backbone, TransformersBackbone):
            from sidelight.engines.transformers import TransformersEngine

            return TransformersEngine(backbone, probes)
        from sidelight.engines.llama.backbone import LlamaBackbone
        from sidelight.engines.llama.engine import LlamaEngine

        assert isinstance(backbone, LlamaBackbone)
        return LlamaEngine(backbone, probes)

    @contextmanager
    def state_source(self, backbone: "Backbone") -> "Generator[StateSource]":
        """The source of hidden states for training; an engine of vLLM ends with the block."""
        if self.engine == "vllm":
            from sidelight.backbone import TransformersBackbone
            from sidelight.vllm.offline import VllmSource

            assert isinstance(backbone, TransformersBackbone)
            with closing(VllmSource(backbone, options=self.engine_option)) as source:
                yield source
        else:
            from sidelight.states.extraction import BackboneSource

            yield BackboneSource(backbone)


@dataclass(frozen=True, kw_only=True)
class TrainingInputs:
    """The texts to train on, how to read them, and where hidden states go: see ``training``.

    What has a default is given by ``--set``.

    Attributes:
        missing_label: What to do about a row without a label.
        rationale: The column of the words that a text has its label for, where they are known.
        limit: Use so many rows, drawn at random; each class keeps its share.
        max_tokens: Longer texts are cut, and counted; judging never cuts.
        cache: Folder for hidden states; None is the user's cache.
        keep_cache: Whether the hidden states stay for another run.
        memory: The most memory that hidden states may take, above the model, in GiB.
    """

    data: str
    text: str
    label: str
    response: str | None
    positive: str | None
    validation: str | None
    split: str | None = None
    validation_split: str | None = None
    missing_label: Literal["error", "skip"] = "error"
    rationale: str | None = None
    limit: Annotated[int, Field(ge=2)] | None = None
    max_tokens: Annotated[int, Field(ge=8)] = 1024
    cache: Path | None = None
    keep_cache: bool = False
    memory: Annotated[float, Field(ge=0.01, allow_inf_nan=False)] = 1.0

    def load(self, spans: str | None = None) -> "tuple[LabelledExamples, LabelledExamples | None]":
        """Training texts, and validation texts where some are named.

        Args:
            spans: The column of spans; None reads labels.
        """
        from sidelight.data.loading import load_examples

        labels = {"label": self.label, "on_missing_label": self.missing_label}
        read: Callable[..., LabelledExamples] = partial(
            load_examples,
            text=self.text,
            response=self.response,
            **(labels if spans is None else {"spans": spans}),
        )
        if self.validation is None and self.validation_split is not None:
            raise SidelightError(
                "--set validation_split needs --validation. Name the data set, or leave it out."
            )
        if self.cache is not None:
            check_folder(self.cache)
        words = {} if self.rationale is None else {"rationale": self.rationale}
        whole = read(self.data, split=self.split, positive=self.positive, **words)
        rows = whole.draw(self.limit or len(whole), seed=0)
        # Warnings about the file hold for some of its rows too.
        training = replace(whole.select(rows), warnings=whole.warnings)
        if self.validation is None:
            return training, None
        return training, read(self.validation, split=self.validation_split, task=training.task)

    def fit_options(self) -> "FitOptions":
        """The options of how the texts are read, and where their hidden states go."""
        from sidelight.training.settings import READS, FitOptions

        return FitOptions(
            reads=replace(READS, side="response" if self.response else "prompt"),
            max_tokens=self.max_tokens,
            cache_root=self.cache,
            keep_cache=self.keep_cache,
            memory_bytes=int(self.memory * 2**30),
        )


def together(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """These options as one decorator, in their order on the help page."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def _gathered(name: str, kind: type[Any], **defaults: Any) -> Callable[[Command], Command]:
    """Options that are fields of ``kind`` reach the command as one object, named ``name``."""
    names = {field.name for field in fields(kind)}

    def decorate(command: Command) -> Command:
        @wraps(command)
        def gathered(**values: Any) -> Any:
            options = {option: values.pop(option) for option in names & values.keys()}
            return command(**{name: kind(**defaults | options)}, **values)

        return gathered

    return decorate


_data = partial(
    click.option,
    "--data",
    help="JSONL, JSON, CSV, TSV (or .gz), Parquet, hub name, or ready guard (docs/guards.md).",
)
data = _data(required=True)
optional_data = _data()
# A file, or a folder, to write.
new_file = partial(click.option, type=PATH, callback=checked_file)
new_folder = partial(click.option, type=PATH, callback=checked_folder)
out = new_folder("--out", required=True, help="Folder to write.")
json_file = new_file("--out", help="File for the JSON.")
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
text = click.option("--text", default="text", help="Column of the text (or chat messages).")
label = click.option(
    "--label",
    default="label",
    help="Column of the label; several, with commas, make a multi-label task.",
)
response = click.option("--response", help="Column of the assistant's answer.")
split = click.option("--split", help="Split of a hub data set.")
missing_label = click.option(
    "--missing-label",
    type=click.Choice(["error", "skip"]),
    default="error",
    help="What to do about a row without a label.",
)
limit = click.option(
    "--limit",
    type=click.IntRange(min=2),
    help="Use N rows, drawn at random; each class keeps its share.",
)
threshold = partial(
    click.option,
    "--threshold",
    metavar="RULE",
    help="What thresholds are chosen for: f1; fpr=0.01, the most recall with at most this share of "
    "negative texts flagged; recall=0.95, the fewest false alarms with at least this share of "
    "positive texts flagged; cost=10:1, where a miss costs 10 times as much as a false alarm.",
)
positive = click.option("--positive", help="The positive class of a binary task.")
_model = partial(click.option, "--model")
model = _model(
    help="Backbone: smollm2 (embedded), a folder, a hub id, a .gguf file, or ollama:NAME. "
    "[default: smollm2, or the probe's]",
)
tokenizer = click.option(
    "--tokenizer",
    metavar="FOLDER_OR_ID",
    help="Tokenizer of a GGUF file, if the one in it cannot be read.",
)
dtype = click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    help="Dtype of the backbone; auto keeps that of its weights, except where a CPU without "
    "bfloat16 arithmetic reads texts only.",
)
device = click.option("--device", default="auto", help="cpu, cuda, cuda:1, or auto.")
engine_option = click.option(
    "--engine-option",
    multiple=True,
    callback=_assigned_json,
    metavar="NAME=VALUE",
    help="Option of vLLM's engine, such as max_num_seqs=64; may be repeated.",
)
free_port = click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=0,
    show_default=False,
    help="[default: a free one]",
)
# Where a data file has text, label and response.
columns = together(text, label, response, split)
# A probe and labelled texts to measure it on.
measured = together(click.argument("probe", type=PATH), data, columns, missing_label)
# Which engine. With ``backbone``, which gathers these too, the command gets one ``runtime``.
engine = together(
    click.option(
        "--engine",
        type=click.Choice(["auto", "transformers", "vllm", "llama"]),
        default="auto",
        help="What runs the model; auto is llama (docs/gguf.md) for a GGUF file, else "
        "transformers; docs/vllm.md says how to install vLLM.",
    ),
    engine_option,
)
_gather = partial(_gathered, "runtime", Runtime)
backbone = together(model, tokenizer, dtype, device, _gather(engine="auto"))
# Without GGUF files, for what needs weights in transformers.
transformers = together(
    _model(
        help="Backbone: smollm2 (embedded), a folder, or a hub id. [default: smollm2, or the "
        "probe's]",
    ),
    dtype,
    device,
    _gather(),
)
# Options that ``--set`` gives, by name.
INPUT_SETTINGS = {
    field.name: field.type for field in fields(TrainingInputs) if field.default is not MISSING
}


def _inputs(command: Command) -> Command:
    """What ``--set`` says of the texts goes to ``inputs``; the rest stays in ``assigned``.

    Of a ready guard, the card says whether answers are read.
    """

    gathered = _gathered("inputs", TrainingInputs)(command)

    @wraps(command)
    def divided(*, assigned: Mapping[str, str], **values: Any) -> Any:
        settings = {name: text for name, text in assigned.items() if name in INPUT_SETTINGS}
        rest = {name: text for name, text in assigned.items() if name not in settings}
        from sidelight.data.guards import guard_of

        if (guard := guard_of(values["data"])) is not None:
            values["response"] = values["response"] or guard.card.columns["response"]
        return gathered(assigned=rest, **values, **typed(settings, INPUT_SETTINGS))

    return divided


_ABOUT_INPUTS = f"Any other option; may be repeated. Of the texts: {', '.join(INPUT_SETTINGS)}."


def training(more: str = "") -> Callable[[Command], Command]:
    """The options of a training: ``inputs``, ``out``, and ``assigned``, the rest of --set.

    Args:
        more: What ``--set`` takes beside ``INPUT_SETTINGS``, for its help.
    """
    return together(
        data,
        out,
        text,
        label,
        response,
        positive,
        click.option("--validation", help="Validation data. [default: held out of --data]"),
        click.option(
            "--set",
            "assigned",
            multiple=True,
            callback=_assigned,
            metavar="NAME=VALUE",
            help=f"{_ABOUT_INPUTS} {more}".strip(),
        ),
        _inputs,
    )
