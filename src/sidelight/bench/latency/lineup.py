"""The rows of the table on one backbone."""

from collections.abc import Sequence

from sidelight.backbones import TransformersBackbone
from sidelight.bench.latency.cascades import EncoderFirst, GuardFirst
from sidelight.bench.latency.naive import Naive
from sidelight.bench.latency.served import Served
from sidelight.bench.latency.subjects import Subject
from sidelight.bench.untrained import untrained_probe
from sidelight.mechanisms import mechanism_names, mechanism_spec

BANK_SIZE = 10


def default_subjects(
    backbone: TransformersBackbone,
    *,
    mechanisms: Sequence[str] | None = None,
    cascades: bool = True,
) -> tuple[Subject, ...]:
    """The LLM alone, with each mechanism, with ten probes, and what probes replace.

    Args:
        backbone: The LLM.
        mechanisms: Names; None: all that are registered.
        cascades: Whether to include the two-model cascades.

    Raises:
        SidelightError: An unknown mechanism.
    """
    names = mechanism_names() if mechanisms is None else mechanisms
    probes = [untrained_probe(backbone, name, spec=mechanism_spec(name)) for name in names]
    bank = tuple(untrained_probe(backbone, f"probe {i}", seed=i) for i in range(BANK_SIZE))
    llm = Served("LLM", backbone)
    return (
        llm,
        *(Served(f"+ {probe.name}", backbone, (probe,)) for probe in probes),
        Served(f"+ {BANK_SIZE} probes", backbone, bank),
        *(Naive(f"+ {probe.name}, naive", backbone, probe) for probe in probes),
        *(_cascades(llm, backbone) if cascades else ()),
    )


def _cascades(llm: Subject, backbone: TransformersBackbone) -> tuple[Subject, ...]:
    dtype = backbone.model.dtype
    return (
        EncoderFirst("MiniLM, then LLM", llm, device=backbone.device, dtype=dtype),
        GuardFirst("guard of its size, then LLM", llm, llm),
    )
