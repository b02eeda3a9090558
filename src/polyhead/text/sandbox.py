"""The Jinja sandbox for chat templates, which come with weights from strangers.

Jinja's own sandbox keeps a template from reaching Python. This adds bounds on what it may use:
every loop turn, call and filter counts, every string and list it makes is measured before or as it
is made, and the clock is read in between. A template that outgrows its budget ends with LimitError.
"""

import json
import re
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from functools import wraps
from typing import Any

import jinja2
from jinja2 import filters, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace

MAX_TEMPLATE = 50_000  # characters; the longest published templates have about 30,000
MAX_VALUE = 8_000_000  # characters of any one value, the whole conversation too
_ITEM = 8  # what an entry of a list or dictionary counts, in characters
_MAX_WORK = 128_000_000  # characters and items made in one rendering
_MAX_SECONDS = 0.7  # of this thread's processor time
_MAX_WIDTH = 1_000  # columns of padding or indentation


class LimitError(Exception):
    """A template that would take too long or too much memory."""


class RefusedError(TemplateError):
    """A template's own `raise_exception(message)`."""


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


_budget: ContextVar[Budget] = ContextVar("budget")


@contextmanager
def budgeted() -> Iterator[Budget]:
    """A fresh budget for what runs inside."""
    token = _budget.set(Budget())
    try:
        yield _budget.get()
    finally:
        _budget.reset(token)


class _Generator(CodeGenerator):
    """Python code in which every literal container and every `~` is accounted for."""

    def visit_List(self, node: nodes.List, frame: Frame) -> None:  # noqa: N802
        self._inside("checked", super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:  # noqa: N802
        self._inside("checked", super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:  # noqa: N802
        if node.ctx == "load":
            self._inside("checked", super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        self._inside("joined", super().visit_Tuple, nodes.Tuple(node.nodes, "load"), frame)

    def _inside(self, name: str, visit: Callable[..., None], node: Any, frame: Frame) -> None:
        self.write(f"environment.{name}(")
        visit(node, frame)
        self.write(")")


class _Generation(Extension):
    """{% generation %} marks an assistant's words for training; here it only has its own scope."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        """The body, in a scope."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Namespace(Namespace):
    """Jinja's, without names that start with an underscore, and short to print."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, args = args[0], args[1:]
        values = dict(*args, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"the namespace attribute {name!r} starts with an underscore")


class _Formatter(SandboxedFormatter):
    def format_field(self, value: Any, format_spec: str) -> Any:
        """A field, unless its width or precision is out of all measure."""
        if any(len(n) > 4 or int(n) > _MAX_WIDTH for n in re.findall(r"\d+", format_spec)):
            raise LimitError(f"it formats with {format_spec[:20]!r}")
        return super().format_field(value, format_spec)


class Environment(ImmutableSandboxedEnvironment):
    """The one environment all chat templates run in, with the settings transformers uses."""

    code_generator_class = _Generator
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            loader=jinja2.FunctionLoader(_load),
        )
        self.filters = {name: _accounted(self.filters[name]) for name in _FILTERS}
        self.filters |= {name: _accounted(own) for name, own in _OWN_FILTERS.items()}
        self.tests = {name: _accounted(test) for name, test in self.tests.items()}
        self.globals["dict"] = _plain_dict
        self.globals["namespace"] = _Namespace
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        del self.globals["lipsum"]

    def concat(self, pieces: Iterable[str]) -> str:  # type: ignore[override]
        """The pieces of a macro or a `set` block as one string."""
        found = list(pieces)
        _budget.get().spend(sum(map(len, found)))
        return "".join(found)

    def checked(self, value: Any) -> Any:
        """A list, tuple or dictionary that was just made."""
        return _budget.get().checked(value)

    def joined(self, values: tuple[Any, ...]) -> str:
        """`a ~ b`."""
        _budget.get().spend(_budget.get().weigh(values))
        return "".join(map(str, values))

    @property
    def tick(self) -> None:
        """Read at the top of every loop turn, macro and block."""
        _budget.get().spend(1)

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        repeated = (nodes.For, nodes.Macro, nodes.CallBlock, nodes.Block)
        for node in list(source.find_all(repeated)):
            turn = nodes.ExprStmt(nodes.EnvironmentAttribute("tick")).set_lineno(node.lineno)
            turn.set_environment(self)
            node.body.insert(0, turn)
        return super()._generate(source, *args, **kwargs)

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        """What the sandbox hides is an error at once, not an empty value."""
        raise SecurityError(f"it reads {attribute!r} of a {type(obj).__name__}")

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """+ * ** %, whose results can be far larger than what goes in."""
        budget = _budget.get()
        if operator == "%" and isinstance(left, str):
            _check_percent(budget, left, right)
        elif operator == "*":
            budget.spend(_product_size(budget, left, right))
        elif operator == "**" and (abs(left) > 1_000_000 or abs(right) > 64):
            raise LimitError(f"it computes {left!r:.20} ** {right!r:.20}")
        elif operator == "+" and isinstance(left, str) and isinstance(right, str):
            budget.spend(len(left) + len(right))
            return left + right
        return budget.checked(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """A call in a template: macros, what the globals hold, and harmless methods of data."""
        budget = _budget.get()
        budget.spend(1)
        owner = getattr(__obj, "__self__", None)
        if isinstance(__obj, types.BuiltinMethodType) or isinstance(owner, (str, dict, list)):
            _check_method(budget, owner, __obj.__name__, args)
        return budget.checked(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format` with bounded fields."""
        if super().wrap_str_format(value) is None:
            return None
        text, by_map = str(value.__self__), value.__name__ == "format_map"

        def formatted(*args: Any, **kwargs: Any) -> str:
            if by_map:
                args, kwargs = (), args[0]
            budget = _budget.get()
            budget.spend(text.count("{") * budget.weigh([*args, *kwargs.values()]))
            return _Formatter(self).vformat(text, args, kwargs)

        return formatted


def _check_percent(budget: Budget, text: str, values: Any) -> None:
    if re.search(r"%[^a-zA-Z%]*(\*|\d{4})", text):
        raise LimitError("it formats with a width without measure")
    budget.spend(text.count("%") * budget.weigh(values) + len(text))


def _product_size(budget: Budget, left: Any, right: Any) -> int:
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


def _check_method(budget: Budget, owner: Any, name: str, args: tuple[Any, ...]) -> None:
    known = next((names for kind, names in _METHODS.items() if isinstance(owner, kind)), ())
    if name not in known:
        raise SecurityError(f"it calls {name!r} of a {type(owner).__name__}")
    if not isinstance(owner, str):
        return
    budget.spend(len(owner))
    if name == "replace" and len(args) >= 2:
        _check_replace(budget, owner, args[0], args[1])
    elif name == "join" and args:
        items = args[0] if isinstance(args[0], (str, list, tuple, dict)) else ()
        budget.spend(budget.weigh(args[0]) + len(owner) * len(items))
    elif name in ("center", "ljust", "rjust", "zfill"):
        _check_width(args[0] if args else 0)


def _check_replace(budget: Budget, text: Any, old: Any, new: Any) -> None:
    if isinstance(text, str) and isinstance(old, str) and isinstance(new, str):
        budget.spend(len(text) + text.count(old) * len(new))


def _check_width(width: Any) -> None:
    if isinstance(width, int) and width > _MAX_WIDTH:
        raise LimitError(f"it pads to {width} characters")
    if isinstance(width, str) and len(width) > _MAX_WIDTH:
        raise LimitError(f"it pads with {len(width)} characters")


def _accounted(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        budget = _budget.get()
        budget.spend(1)
        return budget.checked(function(*args, **kwargs))

    return counted


# Filters that give at most about as much as they take. Left out: attr, pprint, random, striptags,
# urlize, wordwrap, xmlattr, filesizeformat.
_FILTERS = (
    "abs capitalize count d default dictsort e escape first float forceescape groupby int items "
    "last length list lower map max min reject rejectattr reverse safe select selectattr sort "
    "string title trim truncate unique upper urlencode wordcount"
).split()


@jinja2.pass_eval_context
def _join(context: Any, value: Any, d: str = "", attribute: Any = None) -> str:
    items, budget = list(value), _budget.get()
    budget.spend(budget.weigh(items) + len(str(d)) * len(items))
    return filters.do_join(context, items, d, attribute)


@jinja2.pass_eval_context
def _replace(context: Any, s: Any, old: str, new: str, count: int | None = None) -> str:
    _check_replace(_budget.get(), s, old, new)
    return filters.do_replace(context, s, old, new, count)


def _indent(s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    _check_width(width)
    columns = width if isinstance(width, int) else len(width)
    _budget.get().spend(len(s) + (s.count("\n") + 2) * columns)
    return filters.do_indent(s, width, first, blank)


def _center(value: str, width: int = 80) -> str:
    _check_width(width)
    return filters.do_center(value, width)


def _format(value: str, *args: Any, **kwargs: Any) -> str:
    _check_percent(_budget.get(), str(value), kwargs or args)
    return filters.do_format(value, *args, **kwargs)


def _batch(value: Iterable[Any], linecount: int, fill_with: Any = None) -> Iterator[Any]:
    _check_width(linecount)
    return filters.do_batch(value, linecount, fill_with)  # type: ignore[arg-type]


def _slice(value: Iterable[Any], slices: int, fill_with: Any = None) -> Iterator[Any]:
    _check_width(slices)
    return filters.sync_do_slice(value, slices, fill_with)  # type: ignore[arg-type]


def _round(value: float, precision: int = 0, method: Any = "common") -> float:
    if not -20 <= precision <= 20:
        raise LimitError(f"it rounds to {precision!r:.20} places")
    return filters.do_round(value, precision, method)


@jinja2.pass_environment
def _sum(environment: Any, iterable: Any, attribute: Any = None, start: Any = 0) -> Any:
    total = start
    if attribute is not None:
        get = filters.make_attrgetter(environment, attribute)
        iterable = map(get, iterable)
    for value in iterable:
        if not isinstance(value, (int, float)):
            raise LimitError(f"it sums a {type(value).__name__}")
        total += value
    return total


def _tojson(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # transformers' own: Jinja's escapes HTML
    for width in (indent, *(separators or ())):
        _check_width(width)
    _budget.get().spend(_budget.get().weigh(x))
    return json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


_OWN_FILTERS: Mapping[str, Callable[..., Any]] = {
    "batch": _batch,
    "center": _center,
    "format": _format,
    "indent": _indent,
    "join": _join,
    "replace": _replace,
    "round": _round,
    "slice": _slice,
    "sum": _sum,
    "tojson": _tojson,
}


def _load(name: str) -> str:
    raise SecurityError(f"it loads another template, {name[:40]!r}")


def _plain_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _raise_exception(message: Any) -> None:
    raise RefusedError(str(message))


def _strftime_now(format: str) -> str:
    # The C library pads as far as it is told to: "%999999999d"
    if not isinstance(format, str) or len(format) > 100 or re.search(r"%[^a-zA-Z%]{2}", format):
        raise LimitError("it asks for the date in a format without measure")
    return datetime.now().strftime(format)
