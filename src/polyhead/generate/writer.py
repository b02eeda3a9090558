"""Ids to text as they come: whole characters, and no part of a stop string."""

from collections.abc import Sequence

from polyhead.text.tokenizer import Tokenizer


class TextWriter:
    """`push(id)` returns text that is certain; what might be the start of a stop string waits.

    from_token: stop strings are looked for in the text from this token on. A token costs its own
    length and that of the stop strings, however long the text before it is.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        from_token: int = 0,
        skip_special_tokens: bool = True,
    ) -> None:
        self.stopped = False
        self._stream = tokenizer.stream(skip_special_tokens)
        self._stop = tuple(stop)
        self._free = from_token
        self._held = ""

    def push(self, token_id: int) -> str:
        """The text that this id makes certain; sets `stopped` at a stop string."""
        text = self._stream.push(token_id)
        if self._free > 0:
            self._free -= 1
            return text
        return self._checked(text) if self._stop else text

    def flush(self) -> str:
        """What still waits, at the end. Nothing after a stop string."""
        if self.stopped:
            return ""
        text = self._checked(self._stream.flush()) if self._stop else self._stream.flush()
        held, self._held = self._held, ""
        return text + held

    def _checked(self, text: str) -> str:
        text = self._held + text
        # The string that is complete first ends the text, however tokens divide it.
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        waits = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - waits :]
        return text[: len(text) - waits]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest start of `stop`, short of all of it, that ends `text`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
