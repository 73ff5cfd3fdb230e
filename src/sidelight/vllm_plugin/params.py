"""What a request says of its tokens, and what comes back: both as vLLM's ``kv_transfer_params``."""

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from itertools import chain, groupby, repeat
from typing import Any

from sidelight.errors import SidelightError
from sidelight.prompts import EncodedPrompt, Part

KEY = "sidelight"


def request_params(prompt: EncodedPrompt) -> dict[str, Any]:
    """For ``SamplingParams(extra_args={"kv_transfer_params": ...})`` or a request's field.

    Args:
        prompt: The tokens that the request carries.
    """
    runs = [[int(part), len(list(same))] for part, same in groupby(prompt.parts)]
    return {KEY: {"parts": runs, "tokens": token_hash(prompt.token_ids)}}


def parts_of(params: Mapping[str, Any] | None, token_ids: Sequence[int] | None) -> bytes:
    """One ``Part`` per token of a request's prompt.

    Args:
        params: The request's ``kv_transfer_params``.
        token_ids: The tokens that the engine runs.

    Raises:
        SidelightError: The request does not say, or it speaks of other tokens.
    """
    given = (params or {}).get(KEY)
    if given is None or token_ids is None:
        raise SidelightError(
            "The request does not say what its tokens belong to. Send it through Sidelight's "
            f"server or endpoint, or give kv_transfer_params['{KEY}'] (see docs/vllm.md)."
        )
    try:
        parts = bytes(chain.from_iterable(repeat(Part(p), int(n)) for p, n in given["parts"]))
        matches = given["tokens"] == token_hash(token_ids) and len(parts) == len(token_ids)
    except (KeyError, TypeError, ValueError) as error:
        raise SidelightError(f"kv_transfer_params['{KEY}'] is malformed.") from error
    if not matches:
        raise SidelightError(
            f"kv_transfer_params['{KEY}'] describes other tokens than the engine reads. Encode the "
            "messages with the served model's tokenizer and chat template."
        )
    return parts


def token_hash(token_ids: Sequence[int]) -> str:
    """Names a list of token ids."""
    return hashlib.blake2b(array("q", token_ids).tobytes(), digest_size=8).hexdigest()
