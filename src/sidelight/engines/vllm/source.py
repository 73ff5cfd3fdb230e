# pyright: reportMissingImports=false
"""Hidden states for training from vLLM, so that a probe is trained on what it will be served."""

import json
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from sidelight.backbones import TransformersBackbone
from sidelight.cache import ActivationCache, Shard
from sidelight.engines.vllm.loading import require_vllm
from sidelight.engines.vllm.offline import Offline, OfflineRequest
from sidelight.errors import SidelightError
from sidelight.progress import Progress
from sidelight.prompts import EncodedPrompt, Reads
from sidelight.vllm_plugin.capturing import capture_params
from sidelight.vllm_plugin.settings import CAPTURE, Captured
from sidelight.vllm_plugin.spool import Spool, SpoolPlace, SpoolShape


class VllmSource:
    """A ``StateSource``; close it at the end. vLLM starts with the first missing shard.

    Texts of several shards run together: what vLLM batches is limited by its own options alone.
    Prefix caching is off, since a cached token has no hidden states; what texts begin with is run
    for each of them.

    Args:
        backbone: Says which weights and texts; its own forward pass is not used.
        options: Fields of vLLM's ``EngineArgs``.

    Raises:
        SidelightError: vLLM is not installed.
    """

    def __init__(self, backbone: TransformersBackbone, *, options: Mapping[str, Any] | None = None):
        require_vllm()
        self._backbone = backbone
        self._options = dict(options or {})
        self._llm: Offline | None = None

    @property
    def engine(self) -> str:
        """VLLM, its version, and the options, some of which change the states."""
        from vllm import __version__

        given = json.dumps(self._options, sort_keys=True) if self._options else ""
        return f"vllm {__version__} {given}".strip()

    @property
    def max_tokens(self) -> int:
        """The longest text: the context, but for the token that vLLM always writes."""
        most = self._backbone.encoder.max_tokens
        return min(most, int(self._options.get("max_model_len", most))) - 1

    def shards(
        self, cache: ActivationCache, indices: Sequence[int], shown: Progress
    ) -> Generator[tuple[int, Shard]]:
        """Computes these shards; see ``StateSource``."""
        work = _Work(self._backbone, cache, indices)
        for request, _ in self.running().run(work.requests()):
            shown.advance(len(request.prompt))
            yield from work.finish(request)

    def close(self) -> None:
        """Ends vLLM, if it runs."""
        if self._llm is not None:
            self._llm.close()
            self._llm = None

    def running(self) -> Offline:
        """VLLM, which starts now unless it runs already."""
        if self._llm is None:
            who = self._backbone.fingerprint
            config = {CAPTURE: Captured(who.layers, who.width).to_json()}
            options = {"enable_prefix_caching": False, **self._options}
            self._llm = Offline.start(self._backbone, config, options)
        return self._llm


class _Work:
    """The shards that are being computed, each in a spool of its own.

    Args:
        backbone: Whose states.
        cache: What the shards are for.
        indices: Of the shards.
    """

    def __init__(
        self, backbone: TransformersBackbone, cache: ActivationCache, indices: Sequence[int]
    ):
        self._sizes = backbone.fingerprint
        self._cache = cache
        self._coming = deque(indices)
        self._spools: dict[int, Spool] = {}
        self._left: dict[int, int] = {}
        self._shard_of: dict[int, int] = {}

    def requests(self) -> Iterator[OfflineRequest]:
        """Every text of every shard; a shard's spool is made when its first text is taken."""
        for index in [*self._coming]:
            rows = self._cache.plan.rows[index]
            shape = SpoolShape(
                self._sizes.layers, self._cache.plan.tokens[index], self._sizes.width, len(rows)
            )
            self._spools[index] = Spool.create(self._cache.directory, shape)
            self._left[index] = len(rows)
            prompts = [self._cache.prompts[row] for row in rows]
            for row, request in zip(
                rows, spool_requests(self._spools[index], prompts, self._cache.reads), strict=True
            ):
                self._shard_of[row] = index
                yield OfflineRequest(row, request.prompt, request.params)

    def finish(self, request: OfflineRequest) -> Iterator[tuple[int, Shard]]:
        """Takes note of a text that has been run; gives the shards that are whole, in order."""
        self._left[self._shard_of.pop(request.index)] -= 1
        while self._coming and self._left.get(self._coming[0]) == 0:
            index = self._coming.popleft()
            yield index, self._shard(index, self._spools.pop(index))

    def _shard(self, index: int, spool: Spool) -> Shard:
        rows = self._cache.plan.rows[index]
        require_whole(spool, [self._cache.prompts[row] for row in rows])
        # The states stay mapped until the shard is written.
        spool.remove()
        lengths = torch.tensor([self._cache.lengths[row] for row in rows])
        return Shard(spool.hidden, lengths, torch.tensor(rows))


def spool_requests(
    spool: Spool, prompts: Sequence[EncodedPrompt], reads: Reads
) -> list[OfflineRequest]:
    """Requests that fill a spool, text after text.

    Args:
        spool: Made for these texts.
        prompts: The texts.
        reads: The tokens that are kept.
    """
    lengths = torch.tensor([int(prompt.mask(reads).sum()) for prompt in prompts])
    starts: Int[Tensor, " text"] = lengths.cumsum(0) - lengths
    places = [
        SpoolPlace(str(spool.path.absolute()), spool.shape, text, int(start))
        for text, start in enumerate(starts)
    ]
    return [
        OfflineRequest(text, prompt, capture_params(prompt, reads, places[text]))
        for text, prompt in enumerate(prompts)
    ]


def require_whole(spool: Spool, prompts: Sequence[EncodedPrompt]) -> None:
    """Checks that every token of these texts has been through every layer.

    Raises:
        SidelightError: Some have not, so the states are worthless.
    """
    if not spool.is_whole(torch.tensor([len(prompt) for prompt in prompts])):
        raise SidelightError(
            f"vLLM has run these texts, but hidden states are missing in {spool.path.parent}. Name "
            "a folder that all of its workers see with --cache, or use --engine transformers."
        )
