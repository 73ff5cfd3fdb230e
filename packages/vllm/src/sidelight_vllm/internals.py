"""All undocumented parts of vLLM that are used.

``plugin`` wraps methods of ``AsyncLLM``, ``EngineArgs``, ``BaseModelLoader`` and ``Executor``;
``guard`` wraps one each of ``BeamSearchOnlineMixin`` and ``BaseRenderer``, and replaces three of
each ``AsyncLLM``. Others use ``Scheduler.update_from_output``, ``MultiConnector._connectors`` and
its ``_requests_to_connector`` (``connector``), ``OutputProcessor.process_outputs`` and its
``request_states`` (``outputs``), ``merge_async_iterators`` and ``RequestOutput.add`` (``answers``),
``OutputProcessor.has_unfinished_requests`` and the number of API servers (``engine``),
``ResponsesResponse.from_request`` (``endpoint``), and ``AsyncLLM.shutdown``, ``setup_server`` and
uvloop's ``Loop.add_signal_handler`` (``server``); the rest of the names are here.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from inspect import getattr_static
from itertools import chain
from multiprocessing import parent_process
from threading import Thread
from typing import Any

import torch
from torch import Tensor, nn

from sidelight.errors import SidelightError
from sidelight.probes.probe import Probe
from sidelight_vllm import QUANTISING


def wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Replace a method, also a class's, by ``around(original, self, ...)``, once."""
    found = getattr_static(owner, name)
    original = found.__func__ if isinstance(found, classmethod) else found
    if getattr(original, "wrapped_by", None) == __name__:
        return

    @wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(original, self, *args, **kwargs)

    method.wrapped_by = __name__  # pyright: ignore[reportAttributeAccessIssue]
    setattr(owner, name, classmethod(method) if isinstance(found, classmethod) else method)


def local_layers(model: Any) -> tuple[int, list[nn.Module]]:
    """The decoder layers of this worker, and the index of the first, or 0 for the embedding."""
    from vllm.distributed.parallel_state import get_pp_group
    from vllm.model_executor.models.utils import PPMissingLayer

    # For a multimodal model, the part that reads text.
    text = model.get_language_model() if hasattr(model, "get_language_model") else model
    layers = enumerate(getattr(text, "model", text).layers, 1)
    local = {number: layer for number, layer in layers if not isinstance(layer, PPMissingLayer)}
    return 0 if get_pp_group().is_first_rank else min(local), [*local.values()]


def raise_for_all(refusal: str) -> None:
    """Raise the refusals of this engine's workers, if any, only in the last worker.

    All workers call this. vLLM reads their results one by one up to the first error, and would
    treat the rest as results of its next call.
    """
    from vllm.distributed.parallel_state import get_pp_group, get_tp_group

    groups = (get_tp_group(), get_pp_group())
    refusals = [refusal]
    for group in groups:
        gathered: list[list[str]] = [[]] * group.world_size
        torch.distributed.all_gather_object(gathered, refusals, group=group.cpu_group)
        refusals = [*chain(*gathered)]
    is_last = all(group.rank_in_group == group.world_size - 1 for group in groups)
    if is_last and any(refusals):
        raise SidelightError(" ".join(dict.fromkeys(filter(None, refusals))))


def pass_slots(attention: str) -> Tensor | None:
    """The KV slots of an attention layer for the tokens of the current pass; None if it fills no
    cache.
    """
    from vllm.forward_context import get_forward_context

    mappings = get_forward_context().slot_mapping
    return mappings[attention] if mappings else None


def keeps_every_token(spec: Any) -> bool:
    """Whether a layer with this specification of its KV cache has a slot for every token."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec

    # Subclasses discard tokens, or store something else.
    return type(spec) in (FullAttentionSpec, MLAAttentionSpec)


def full_group(kv_cache_config: Any) -> int:
    """Index of the group of attention layers whose block tables have a slot for every token.

    Hybrid models have at least one. A prefix is only found in the cache if all groups have it.

    Raises:
        SidelightError: There is none, or this pipeline stage lacks the layers of a group.
    """
    groups = kv_cache_config.kv_cache_groups
    if not all(group.layer_names for group in groups):
        # Another stage or the scheduler could choose a different group.
        raise SidelightError(
            "A pipeline stage lacks layers with one of the model's kinds of attention, so probes "
            "cannot follow its tokens. Use fewer stages (--pipeline-parallel-size)."
        )
    for index, group in enumerate(groups):
        specs = getattr(group.kv_cache_spec, "kv_cache_specs", {"": group.kv_cache_spec})
        if all(map(keeps_every_token, specs.values())):
            return index
    raise SidelightError(
        "Probes inside vLLM need a model with at least one layer that keeps the keys and values "
        "of every token, but all layers of this model discard some. Serve it with the "
        "transformers engine."
    )


def share_of_cache(specs: Mapping[str, Any], bytes_per_token: int) -> float:
    """The share left to a worker's KV cache if each token needs this many additional bytes."""
    # A block holds the keys and values of one kind of layer. The smallest kind bounds its size.
    kinds: dict[Any, int] = defaultdict(int)
    for spec in specs.values():
        kinds[True if keeps_every_token(spec) else spec] += spec.page_size_bytes
    full = next(filter(keeps_every_token, specs.values()), None)
    added = bytes_per_token * full.block_size if full is not None else 0
    return min(kinds.values()) / (min(kinds.values()) + added) if kinds else 1.0


@dataclass(frozen=True)
class Step:
    """One request's share of a forward pass.

    Attributes:
        computed: Number of tokens of the request with keys and values after the pass.
        is_resumed: Whether it begins with this pass, or resumes after preemption.
        blocks: Additions to its block table, or the whole table if it is resumed.
    """

    request_id: str
    computed: int
    is_resumed: bool
    blocks: Sequence[int]


def steps_of(scheduler_output: Any, group: int) -> Iterator[Step]:
    """Each scheduled request's share of a step, with blocks of this group of attention layers."""
    scheduled = scheduler_output.num_scheduled_tokens
    for new in scheduler_output.scheduled_new_reqs:
        computed = new.num_computed_tokens + scheduled[new.req_id]
        yield Step(new.req_id, computed, True, new.block_ids[group])
    cached = scheduler_output.scheduled_cached_reqs
    for request_id, added, before in zip(
        cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
    ):
        # After preemption, all of its blocks are new.
        is_resumed = request_id in cached.resumed_req_ids
        blocks = () if added is None else added[group]
        yield Step(request_id, before + scheduled[request_id], is_resumed, blocks)


def guesses_responses(config: Any, probes: Iterable[Probe]) -> bool:
    """Whether a probe reads responses whose speculative tokens may be rejected."""
    is_guessing = getattr(config.speculative_config, "method", None) is not None
    return is_guessing and any(probe.reads.includes_response for probe in probes)


_CACHES_OF_FLOATS = ("auto", "float", "bfloat")


def quantisation(arguments: Any) -> str:
    """The options by which vLLM quantises what it loads; "" without any."""
    options = {name: getattr(arguments, name) for name in QUANTISING}
    if str(options["kv_cache_dtype"]).startswith(_CACHES_OF_FLOATS):
        del options["kv_cache_dtype"]
    return ", ".join(f"{name}={value}" for name, value in options.items() if value is not None)


def end_with_parent() -> None:
    """End this process when the one that started it is killed, if there is one.

    Otherwise vLLM's engine would wait for requests forever, with the model in memory.
    """
    parent = parent_process()
    if parent is None:
        return

    def wait_for_parent() -> None:
        parent.join()
        # vLLM ends the workers with it.
        os._exit(1)

    Thread(target=wait_for_parent, daemon=True, name="sidelight-end-with-parent").start()
