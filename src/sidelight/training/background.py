"""Background traffic: ordinary conversations that training shows as negatives and surroundings.

A set that the embedded model has written is packaged. Those that other models write (``sidelight
background``, of the laboratory) are kept in the cache.
"""

from dataclasses import dataclass
from pathlib import Path

from sidelight.data.loading import load_examples
from sidelight.fingerprint import Fingerprint
from sidelight.prompts import Message
from sidelight.smollm2 import cache_root

Turns = tuple[Message, ...]

PACKAGED = Path(__file__).with_name("background_smollm2.jsonl.gz")


@dataclass(frozen=True)
class Background:
    """Ordinary conversations, each ending by a turn that the assistant would answer.

    Attributes:
        conversations: Their turns; none if training goes without.
        origin: Where they are from, for the manifest and for messages.
        private: How many of them, the first ones, are a user's own, so that no artifact may hold
            their texts.
    """

    conversations: tuple[Turns, ...] = ()
    origin: str = "none"
    private: int = 0


def load_background(name: str | Path) -> Background:
    """The background traffic that a user names.

    Args:
        name: A file with a column ``text`` of texts or chat messages, which the packaged set is
            added to, since few files have every length and kind; ``packaged``, the set of the
            embedded model; or ``none``.

    Raises:
        SidelightError: There is no such file, or no text in it.
    """
    if name == "none":
        return Background()
    if name == "packaged":
        return Background(_read(PACKAGED), "packaged")
    own = _read(Path(name))
    return Background((*own, *_read(PACKAGED)), f"{name}, and packaged", private=len(own))


def default_background(fingerprint: Fingerprint) -> Background:
    """The set that this LLM has written, which is kept in the cache, or else the packaged one."""
    own = own_set(fingerprint)
    return Background(_read(own), str(own)) if own.exists() else load_background("packaged")


def own_set(fingerprint: Fingerprint) -> Path:
    """Where the set that an LLM has written is kept."""
    return cache_root() / "background" / f"{fingerprint.digest}.jsonl"


def _read(path: Path) -> tuple[Turns, ...]:
    return tuple(example.messages for example in load_examples(path, label=None).items)
