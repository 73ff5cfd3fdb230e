"""Turns sampled tokens into text that can be sent: whole characters, stop strings cut away."""

from collections.abc import Callable, Sequence

# What a decoder writes for bytes that are not yet, or not at all, a character.
UNFINISHED = "\ufffd"


class Detokenizer:
    """Text of a growing list of tokens, one whole character at a time.

    A token may hold part of a character, and its text may depend on the token before it. So each
    step decodes a short window, and sends what the window shows beyond what was sent.
    Characters that stay unfinished at the end are never sent.

    Args:
        decode: Token ids to text, special tokens left out.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self._decode = decode
        self._window: list[int] = []
        self._sent_tokens = 0
        self._sent_text = ""

    def push(self, token: int) -> str:
        """The text that ``token`` completes; may be empty."""
        self._window.append(token)
        text = self._decode(self._window)
        if text.endswith(UNFINISHED) or len(text) <= len(self._sent_text):
            return ""
        new = text[len(self._sent_text) :]
        # The next window begins with the tokens just sent: their text gives the context.
        self._window = self._window[self._sent_tokens :]
        self._sent_tokens = len(self._window)
        self._sent_text = self._decode(self._window)
        return new


class StopGate:
    """Lets text pass up to the stop string that is complete first; holds back what may become one.

    Args:
        stop: Strings that end the text; empty strings do not count.
    """

    def __init__(self, stop: Sequence[str]):
        self._stop = tuple(text for text in stop if text)
        self._held = ""
        self.is_closed = False

    def push(self, text: str) -> str:
        """The part of the text so far that can be sent now."""
        self._held += text
        # The one complete first counts, so that the cut does not depend on the pieces of text.
        ends = [
            (start + len(stop), start)
            for stop in self._stop
            if (start := self._held.find(stop)) >= 0
        ]
        if ends:
            self.is_closed = True
            return self._release(min(ends)[1])
        return self._release(len(self._held) - self._overlap())

    def flush(self) -> str:
        """What is still held back, when no more text comes."""
        return "" if self.is_closed else self._release(len(self._held))

    def _release(self, end: int) -> str:
        passed, self._held = self._held[:end], self._held[end:]
        return passed

    def _overlap(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        lengths = range(min(longest, len(self._held)), 0, -1)
        return next((n for n in lengths if self._begins_stop(self._held[-n:])), 0)

    def _begins_stop(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stop)
