"""What one rendering of a chat template may use, and the checks that account for it."""

import re
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

from jinja2.exceptions import SecurityError

MAX_TEMPLATE = 50_000  # characters; the longest published templates have about 30,000
MAX_VALUE = 8_000_000  # characters of any one value, the whole conversation too
_ITEM = 8  # what an entry of a list or dictionary counts, in characters
_MAX_WORK = 128_000_000  # characters and items made in one rendering
_MAX_SECONDS = 0.7  # of this thread's processor time
MAX_WIDTH = 1_000  # columns of padding or indentation


class LimitError(Exception):
    """A template that would take too long or too much memory."""


class Budget:
    """What one rendering may still use."""

    def __init__(self) -> None:
        self.work = 0
        self.steps = 0
        self.deadline = time.thread_time() + _MAX_SECONDS

    def spend(self, size: int) -> None:
        """Account for a step that makes `size` characters or items."""
        if size > MAX_VALUE:
            raise LimitError(f"it makes a value of more than {MAX_VALUE} characters")
        self.work += size
        if self.work > _MAX_WORK:
            raise LimitError(f"it makes more than {_MAX_WORK} characters in all")
        self.steps += 1 + (size >> 10)
        if self.steps >= 64:
            self.steps = 0
            if time.thread_time() > self.deadline:
                raise LimitError(f"it takes longer than {_MAX_SECONDS:g} s")

    def checked(self, value: Any) -> Any:
        """`value`, accounted for; a generator is accounted for as it is read."""
        if isinstance(value, str):
            self.spend(len(value))
        elif isinstance(value, (list, tuple, dict)):
            self.weigh(value)
        elif isinstance(value, types.GeneratorType):
            return self._metered(value)
        else:
            self.spend(1)
        return value

    def weigh(self, value: Any) -> int:
        """The size of a value with all it holds; [x, x] counts x twice.

        Lists that hold lists can be exponentially larger than what made them, so every one is
        weighed where it is made. Only the items are work: nothing is copied.
        """
        waiting, weight, items = [value], 0, 0
        while waiting:
            found = waiting.pop()
            items += 1
            weight += _ITEM + (len(found) if isinstance(found, str) else 0)
            if isinstance(found, (list, tuple)):
                weight += _ITEM * len(found)
                waiting.extend(found if weight <= MAX_VALUE else ())
            elif isinstance(found, dict):
                waiting.extend(found)
                waiting.extend(found.values())
            if weight > MAX_VALUE:
                self.spend(weight)
        self.spend(items)
        return weight

    def _metered(self, values: Iterator[Any]) -> Iterator[Any]:
        total = 0
        for value in values:
            total += self.weigh(value)
            if total > MAX_VALUE:
                self.spend(total)
            yield value


CURRENT: ContextVar[Budget] = ContextVar("budget")
"""The budget of the rendering under way."""


@contextmanager
def budgeted() -> Iterator[Budget]:
    """A fresh budget for what runs inside."""
    token = CURRENT.set(Budget())
    try:
        yield CURRENT.get()
    finally:
        CURRENT.reset(token)


def check_percent(budget: Budget, text: str, values: Any) -> None:
    """`text % values`, with bounded widths and an accounted result."""
    if re.search(r"%[^a-zA-Z%]*(\*|\d{4})", text):
        raise LimitError("it formats with a width without measure")
    budget.spend(text.count("%") * budget.weigh(values) + len(text))


def product_size(budget: Budget, left: Any, right: Any) -> int:
    """How large `left * right` is."""
    if isinstance(right, (str, list, tuple)):
        left, right = right, left
    if isinstance(left, (str, list, tuple)) and isinstance(right, int):
        return max(0, right) * (len(left) if isinstance(left, str) else budget.weigh(left))
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() + right.bit_length()
        if bits > 4096:
            raise LimitError(f"it computes a number of {bits} bits")
    return 1


# What a template may call on the data it sees. Absent are those that make bytes or grow without
# need (encode, expandtabs, translate) and, by Jinja's sandbox, those that change a list or a dict.
_METHODS: dict[type, frozenset[str]] = {
    str: frozenset(
        "capitalize casefold center count endswith find index isalnum isalpha isascii isdecimal "
        "isdigit isidentifier islower isnumeric isprintable isspace istitle isupper join ljust "
        "lower lstrip partition removeprefix removesuffix replace rfind rindex rjust rpartition "
        "rsplit rstrip split splitlines startswith strip swapcase title upper zfill".split()
    ),
    dict: frozenset({"copy", "get", "items", "keys", "values"}),
    list: frozenset({"copy", "count", "index"}),
    tuple: frozenset({"count", "index"}),
}


def check_method(budget: Budget, owner: Any, name: str, args: tuple[Any, ...]) -> None:
    """A method call on data: a known harmless one, with an accounted result."""
    known = next((names for kind, names in _METHODS.items() if isinstance(owner, kind)), ())
    if name not in known:
        raise SecurityError(f"it calls {name!r} of a {type(owner).__name__}")
    if not isinstance(owner, str):
        return
    budget.spend(len(owner))
    if name == "replace" and len(args) >= 2:
        check_replace(budget, owner, args[0], args[1])
    elif name == "join" and args:
        items = args[0] if isinstance(args[0], (str, list, tuple, dict)) else ()
        budget.spend(budget.weigh(args[0]) + len(owner) * len(items))
    elif name in ("center", "ljust", "rjust", "zfill"):
        check_width(args[0] if args else 0)


def check_replace(budget: Budget, text: Any, old: Any, new: Any) -> None:
    """`text.replace(old, new)`, accounted for."""
    if isinstance(text, str) and isinstance(old, str) and isinstance(new, str):
        budget.spend(len(text) + text.count(old) * len(new))


def check_width(width: Any) -> None:
    """A column count, or the filling itself, of a bounded size."""
    if isinstance(width, int) and width > MAX_WIDTH:
        raise LimitError(f"it pads to {width} characters")
    if isinstance(width, str) and len(width) > MAX_WIDTH:
        raise LimitError(f"it pads with {len(width)} characters")


def accounted(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with what it gives accounted for."""

    @wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        budget = CURRENT.get()
        budget.spend(1)
        return budget.checked(function(*args, **kwargs))

    return counted
