"""How much of prompts a step reads, so that texts at work hardly notice."""

import statistics
from collections import deque

_FIRST, _LEAST, _MOST = 16, 4, 4096
_REMEMBERED = 8
_LOOK_AGAIN = 64
_AIM = 0.4
"""Of the time that reading may take: steps are not all alike."""


class Pace:
    """Tokens of prompts for a step that takes at most `stretch` times one that reads none.

    It is measured: what plain steps took of late, and what a token of prompts added. Now and then
    a step reads no prompt, so that there is something to compare with.
    """

    def __init__(self, stretch: float) -> None:
        self.stretch, self.chunk = stretch, _FIRST
        self._plain: deque[float] = deque(maxlen=_REMEMBERED)
        self._added: deque[float] = deque(maxlen=_REMEMBERED)
        self._since_plain = _LOOK_AGAIN

    def budget(self) -> int:
        """Tokens of prompts that the next step may read beside texts that go on."""
        return 0 if self._since_plain >= _LOOK_AGAIN else self.chunk

    def took(self, seconds: float, num_read: int) -> None:
        """A step in which texts went on took this long and read so many tokens of prompts."""
        if not num_read:
            self._plain.append(seconds)
            self._since_plain = 0
            return
        self._since_plain += 1
        if not self._plain:
            return
        plain = statistics.median(self._plain)
        self._added.append((seconds - plain) / num_read)
        fitting = _AIM * (self.stretch - 1) * plain / max(statistics.median(self._added), 1e-9)
        # What few tokens took says little of many.
        most = self.chunk * 3 // 2 if num_read >= self.chunk else self.chunk
        self.chunk = max(_LEAST, min(int(fitting), most, _MOST))
