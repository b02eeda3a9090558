"""Jobs that are done one after the other, so that each has all cores."""

import threading
from collections.abc import Callable, Mapping
from queue import SimpleQueue
from typing import Any

from polyhead.errors import ConfigError
from polyhead.serve.messages import Done, Piece, failure

Say = Callable[[Any], None]
Work = Callable[[Mapping[str, Any]], Mapping[str, Any]]


class Line:
    """A thread that does works by name. A job that is let go of before its turn is left out.

    flush: sends what was said. Those who have a line give its `works`, and say what they are not.
    """

    is_not = "this model does nothing of the kind"

    def __init__(self, flush: Callable[[], None]) -> None:
        self._flush = flush
        self._jobs: SimpleQueue[tuple[int, Work, Mapping[str, Any], Say] | None] = SimpleQueue()
        self._wanted: set[int] = set()
        self._thread = threading.Thread(target=self._run, name="polyhead-line", daemon=True)
        self._thread.start()

    def works(self) -> Mapping[str, Work]:
        """What it does, by name."""
        raise NotImplementedError

    def do(self, number: int, what: str, given: Mapping[str, Any], say: Say) -> None:
        """Put one of the works in the line. Errors: ConfigError for one that is none."""
        work = self.works().get(what)
        if work is None:
            raise ConfigError(self.is_not)
        self._wanted.add(number)
        self._jobs.put((number, work, given, say))

    def cancel(self, number: int) -> None:
        """Leave it out, if its turn has not come."""
        self._wanted.discard(number)

    def close(self) -> None:
        """End after the job at hand."""
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            number, work, given, say = job
            if number not in self._wanted:
                continue
            self._wanted.discard(number)
            try:
                result = work(given)
                # A text that was not drawn token by token comes in one piece.
                for choice, each in enumerate(result.get("choices", ())):
                    if given["stream"]:
                        say(Piece(number, choice, each["text"]))
                say(Done(number, result))
            # Whatever a model raises is for the one who asked.
            except Exception as error:
                say(failure(number, error))
            self._flush()
