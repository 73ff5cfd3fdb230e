"""The contract of a mechanism, and the registry of mechanisms by name.

The dense form, which defines a mechanism, is its equation over a padded tensor. The streaming form
needs a few numbers per token (``projections``) and keeps a small state (``summarise``, ``finish``);
the states of two adjacent runs of tokens can be merged (``merge``). Training and serving both use
the streaming form. The tests in ``tests/mechanism_contract.py`` check that it equals the dense form
for any chunking, merge order and packing. This module works on hidden states, which the probe may
have standardised, and never on text.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any, TypeVar, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sidelight.errors import SidelightError, did_you_mean
from sidelight.extensions import extension_names, load_extension
from sidelight.probes.mechanisms.shares import Shares, integrated
from sidelight.probes.ragged import Ragged
from sidelight.types import MechanismSpec, OptionValue


@dataclass(frozen=True)
class Geometry:
    """The sizes that a mechanism is built for.

    Attributes:
        layers: Hidden states per token: the embedding output and one per block (L + 1).
        width: Size of a hidden state.
        outputs: Logits of the task.
    """

    layers: int
    width: int
    outputs: int


class Mechanism(nn.Module, ABC):
    """Turns all hidden states of a text into logits.

    Attributes:
        lookahead: Number of following tokens that the logits of a token depend on.
    """

    lookahead: int = 0

    @abstractmethod
    def forward(
        self, hidden: Float[Tensor, "batch layer token width"], mask: Bool[Tensor, "batch token"]
    ) -> Float[Tensor, "batch output"]:
        """The dense form; where the mask is False, ``hidden`` may contain anything, even NaN."""

    @abstractmethod
    def projections(self) -> Float[Tensor, "layer width projection"]:
        """The projection weights, per layer, of the features that the streaming form needs."""

    @abstractmethod
    def summarise(self, tokens: Ragged) -> Ragged:
        """The state of each segment of projected tokens, ``[row, layer, column]``, in float32."""

    def summary_kind(self) -> Hashable | None:
        """Equal for mechanisms that can be summarised and merged in one call.

        Such mechanisms treat every layer's projections alike, regardless of their parameters, so
        the layers of several can be stacked: their states have one row per segment, whose first
        axis is layers. None means that the mechanism must be called separately.
        """
        return None

    @abstractmethod
    def merge(self, left: Ragged, right: Ragged) -> Ragged:
        """The state of each segment after both runs of tokens; ``right`` follows ``left``."""

    @abstractmethod
    def finish(self, state: Ragged) -> Float[Tensor, "segment output"]:
        """The logits of each segment; NaN for a segment without tokens."""

    def votes(self, state: Ragged) -> Float[Tensor, "segment voter output"]:
        """The logits that training compares with the labels; each voter has its own loss."""
        return self.finish(state)[:, None]

    def token_logits(self, state: Ragged) -> Ragged | None:
        """The logits of each token, ``[token, output]``, from which spans are made.

        None, the default, means that the mechanism labels only whole texts. A mechanism that labels
        tokens is registered as a class, keeps every token in its state, and has no
        ``summary_kind``.
        """
        return None

    def layer_parameters(self) -> Sequence[Float[Tensor, "layer width ..."]]:
        """The parameters that multiply standardised hidden states, if each layer has its own.

        Such a mechanism can be trained on compressed states. By default there are none, and the
        mechanism is trained on uncompressed states.
        """
        return ()

    def set_prior(self, logits: Float[Tensor, " output"]) -> None:
        """Initialise the outputs at the log-odds of each token label, before training.

        By default, the drawn parameters are left unchanged.
        """

    def logits(self, tokens: Ragged) -> Float[Tensor, "segment output"]:
        """The logits of segments of projected tokens, as for ``summarise``."""
        return self.finish(self.summarise(tokens))

    def shares(self, tokens: Ragged, targets: Float[Tensor, "segment output"]) -> Shares:
        """The term that each token of each layer adds to a segment's target.

        Args:
            tokens: As for ``summarise``; every segment has a token.
            targets: For each segment, the weights of its logits in the target sum.
        """
        return integrated(self.logits, tokens, targets)


class Aggregator(nn.Module, ABC):
    """Reduces the items of a group to one vector: a stage of the paper's mechanisms.

    In the token stage, groups are layers and items are tokens; in the layer stage there is one
    group, and items are layers. Everything after a stage's weights is linear, so instead of whole
    vectors a stage can *carry* the projections that the next stage needs:
    ``finish(summarise(items @ projections(carry)), carry) == forward(items) @ carry``.
    """

    @abstractmethod
    def forward(
        self, items: Float[Tensor, "batch group item width"], mask: Bool[Tensor, "batch item"]
    ) -> Float[Tensor, "batch group width"]:
        """The dense form; where the mask is False, ``items`` may contain anything, even NaN."""

    @abstractmethod
    def projections(
        self, carry: Float[Tensor, "group width carry"]
    ) -> Float[Tensor, "group width projection"]:
        """The projection weights of the features that the streaming form needs per item."""

    def with_frozen_weights(self, items: Ragged) -> Ragged:
        """The projected items, so that the aggregated vector is linear in them for autograd.

        No gradient passes through features that only weigh items, and no two items share a maximum.
        """
        return items

    @abstractmethod
    def summarise(self, items: Ragged) -> Ragged:
        """The state of each segment of projected items, ``[row, group, column]``, in float32."""

    def summary_kind(self) -> Hashable | None:
        """As ``Mechanism.summary_kind``, with groups in place of layers."""
        return None

    @abstractmethod
    def merge(self, left: Ragged, right: Ragged) -> Ragged:
        """The state of each segment after both runs of items."""

    @abstractmethod
    def finish(
        self, state: Ragged, carry: Float[Tensor, "group width carry"]
    ) -> Float[Tensor, "segment group carry"]:
        """The aggregated vector of each segment, projected by ``carry``."""


def hide(
    items: Float[Tensor, "batch group item width"], mask: Bool[Tensor, "batch item"]
) -> Float[Tensor, "batch group item width"]:
    """The items, with masked ones set to zero."""
    # Filled, not multiplied: padding can contain NaN, and NaN * 0 is NaN.
    return torch.where(mask[:, None, :, None], items, items.new_zeros(()))


Builder = Callable[..., Mechanism]
_Builder = TypeVar("_Builder", bound=Builder)
_BUILDERS: dict[str, Builder] = {}
# Entry points of other packages, each a builder as for ``register``.
_GROUP = "sidelight.mechanisms"


def register(name: str) -> Callable[[_Builder], _Builder]:
    """Register the decorated class, or a function that builds a mechanism.

    The builder is called with a ``Geometry``. Its keyword-only arguments are the options, each with
    a default: positive whole numbers, or a ``Literal`` of names.

    Args:
        name: What users call the mechanism.
    """

    def remember(build: _Builder) -> _Builder:
        _BUILDERS[name] = build
        return build

    return remember


def mechanism_names() -> tuple[str, ...]:
    """All registered names in alphabetical order, excluding entry points."""
    return tuple(sorted(_BUILDERS))


def mechanism_spec(name: str, options: Mapping[str, OptionValue] | None = None) -> MechanismSpec:
    """A checked specification with every option filled in.

    Raises:
        SidelightError: The mechanism or an option is unknown, or a value is not allowed.
    """
    parameters = signature(_registered(name)).parameters.values()
    known = {each.name: each for each in parameters if each.kind is Parameter.KEYWORD_ONLY}
    for option, value in (options or {}).items():
        if option not in known:
            raise SidelightError(
                f"Unknown option '{option}' of mechanism '{name}'.{did_you_mean(option, known)}"
            )
        _check_value(f"{name}.{option}", value, known[option].annotation)
    return MechanismSpec(
        name, {each.name: each.default for each in known.values()} | {**(options or {})}
    )


def labels_tokens(name: str) -> bool:
    """Whether a mechanism implements ``token_logits``."""
    build = _registered(name)
    return isinstance(build, type) and build.token_logits is not Mechanism.token_logits


def build_mechanism(spec: MechanismSpec, geometry: Geometry) -> Mechanism:
    """A mechanism with fresh parameters, drawn with torch's current seed."""
    return _registered(spec.name)(geometry, **spec.options)


def _check_value(option: str, value: OptionValue, kind: Any) -> None:
    """Check that the value is a positive whole number, or one of the option's names."""
    names = get_args(kind)
    if names and value not in names:
        raise SidelightError(
            f"{option} cannot be {value!r}.{did_you_mean(str(value), map(str, names))}"
        )
    if not names and (type(value) is not int or value < 1):
        raise SidelightError(f"{option} cannot be {value!r}. Give a whole number of 1 or more.")


def _registered(name: str) -> Builder:
    if name in _BUILDERS:
        return _BUILDERS[name]
    if build := load_extension(_GROUP, name):
        return build
    known = {*_BUILDERS, *extension_names(_GROUP)}
    raise SidelightError(f"Unknown mechanism '{name}'.{did_you_mean(name, known)}")
