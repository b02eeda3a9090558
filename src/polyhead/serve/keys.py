"""API keys from a file, and what each may ask for."""

import hmac
import logging
import os
import time
from dataclasses import dataclass, fields
from pathlib import Path

from polyhead.errors import FileError
from polyhead.serve.errors import ApiError

_LOG = logging.getLogger("polyhead.serve")


@dataclass(frozen=True)
class Key:
    """A key's name, and its limits: requests a minute, and at once; None: as many as you like."""

    name: str
    requests: int | None = None
    at_once: int | None = None


class Keys:
    """API keys from a file, one a line: `[NAME] KEY [requests=60] [at_once=4]`.

    The file is read again when it changes, so that keys are rotated by writing it.
    Errors: FileError where it cannot be read at first, says what it cannot, or holds no key.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._seen, self._keys = path, (0, 0), dict[str, Key]()
        try:
            self._look()
        except (OSError, UnicodeDecodeError) as error:
            raise FileError(f"cannot read the keys in {path}: {error}") from None
        if not self._keys:
            raise FileError(f"{path} holds no key; write one a line")

    def owner(self, given: str) -> Key | None:
        """Whose key it is; None for one that is not there. Every key is compared, in equal time."""
        try:
            self._look()
        except (OSError, UnicodeDecodeError, FileError) as error:
            _LOG.warning("the keys of before hold: %s", error)
        found = None
        for own, key in self._keys.items():
            if hmac.compare_digest(own.encode(), given.encode()):
                found = key
        return found

    def _look(self) -> None:
        stat = os.stat(self._path)
        if (stat.st_mtime_ns, stat.st_size) == self._seen:
            return
        self._seen = stat.st_mtime_ns, stat.st_size
        keys: dict[str, Key] = {}
        for number, line in enumerate(self._path.read_text(encoding="utf-8").splitlines(), 1):
            words = line.partition("#")[0].split()
            limits: dict[str, int] = {}
            while words and (limit := self._limit(words[-1], number)):
                limits |= limit
                words.pop()
            if words:
                keys[words[-1]] = Key(words[0] if len(words) > 1 else f"key {number}", **limits)
        self._keys = keys

    def _limit(self, word: str, number: int) -> dict[str, int]:
        """What a word limits, if anything: a key may have an = in it, too."""
        name, _, value = word.partition("=")
        if name not in {field.name for field in fields(Key)[1:]}:
            return {}
        if not value.isdecimal() or int(value) < 1:
            raise FileError(f"line {number} of {self._path} says {name}={value}; write 1 or more")
        return {name: int(value)}


class Allowance:
    """What the keys have asked for. Used in one event loop."""

    def __init__(self) -> None:
        self._left: dict[str, tuple[float, float]] = {}
        self._at_work: dict[str, int] = {}

    def enter(self, key: Key) -> None:
        """One request more. Errors: ApiError 429 for more than the key may ask."""
        at_work = self._at_work.get(key.name, 0)
        if key.at_once is not None and at_work >= key.at_once:
            raise _too_many(f"{at_work} requests of this key are at work; it may have no more", 1)
        if key.requests is not None:
            self._take(key.name, key.requests)
        self._at_work[key.name] = at_work + 1

    def leave(self, key: Key) -> None:
        """It is done."""
        self._at_work[key.name] -= 1

    def _take(self, name: str, most: int) -> None:
        """From a bucket that holds a minute's requests, and fills as fast."""
        now = time.monotonic()
        left, seen = self._left.get(name, (float(most), now))
        left = min(float(most), left + (now - seen) * most / 60)
        self._left[name] = left, now
        if left < 1:
            said = f"this key may ask {most} requests a minute"
            raise _too_many(said, max(1, round((1 - left) * 60 / most)))
        self._left[name] = left - 1, now


def _too_many(said: str, seconds: int) -> ApiError:
    return ApiError(
        429, f"{said}; try again later", code="rate_limit_exceeded",
        headers={"Retry-After": str(seconds)},
    )  # fmt: skip
