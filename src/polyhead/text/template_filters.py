"""The filters that a chat template may use: Jinja's own, or the same with bounds."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jinja2
from jinja2 import filters

from polyhead.text.budget import CURRENT, LimitError, check_percent, check_replace, check_width

# Filters that give at most about as much as they take. Left out: attr, pprint, random, striptags,
# urlize, wordwrap, xmlattr, filesizeformat.
FILTERS = (
    "abs capitalize count d default dictsort e escape first float forceescape groupby int items "
    "last length list lower map max min reject rejectattr reverse safe select selectattr sort "
    "string title trim truncate unique upper urlencode wordcount"
).split()


@jinja2.pass_eval_context
def _join(context: Any, value: Any, d: str = "", attribute: Any = None) -> str:
    items, budget = list(value), CURRENT.get()
    budget.spend(budget.weigh(items) + len(str(d)) * len(items))
    return filters.do_join(context, items, d, attribute)


@jinja2.pass_eval_context
def _replace(context: Any, s: Any, old: str, new: str, count: int | None = None) -> str:
    check_replace(CURRENT.get(), s, old, new)
    return filters.do_replace(context, s, old, new, count)


def _indent(s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    check_width(width)
    columns = width if isinstance(width, int) else len(width)
    CURRENT.get().spend(len(s) + (s.count("\n") + 2) * columns)
    return filters.do_indent(s, width, first, blank)


def _center(value: str, width: int = 80) -> str:
    check_width(width)
    return filters.do_center(value, width)


def _format(value: str, *args: Any, **kwargs: Any) -> str:
    check_percent(CURRENT.get(), str(value), kwargs or args)
    return filters.do_format(value, *args, **kwargs)


def _batch(value: Iterable[Any], linecount: int, fill_with: Any = None) -> Iterator[Any]:
    check_width(linecount)
    return filters.do_batch(value, linecount, fill_with)  # type: ignore[arg-type]


def _slice(value: Iterable[Any], slices: int, fill_with: Any = None) -> Iterator[Any]:
    check_width(slices)
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
        check_width(width)
    CURRENT.get().spend(CURRENT.get().weigh(x))
    return json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


OWN_FILTERS: Mapping[str, Callable[..., Any]] = {
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
