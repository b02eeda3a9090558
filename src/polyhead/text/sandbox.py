"""The Jinja sandbox for chat templates, which come with weights from strangers.

Jinja's own sandbox keeps a template from reaching Python. This adds bounds on what it may use:
every loop turn, call and filter counts, every string and list it makes is measured before or as it
is made, and the clock is read in between. A template that outgrows its budget ends with LimitError.
"""

import re
import types
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace

from polyhead.text.budget import (
    CURRENT,
    MAX_WIDTH,
    LimitError,
    accounted,
    check_method,
    check_percent,
    product_size,
)
from polyhead.text.template_filters import FILTERS, OWN_FILTERS


class RefusedError(TemplateError):
    """A template's own `raise_exception(message)`."""


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
        if any(len(n) > 4 or int(n) > MAX_WIDTH for n in re.findall(r"\d+", format_spec)):
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
        self.filters = {name: accounted(self.filters[name]) for name in FILTERS}
        self.filters |= {name: accounted(own) for name, own in OWN_FILTERS.items()}
        self.tests = {name: accounted(test) for name, test in self.tests.items()}
        self.globals["dict"] = _plain_dict
        self.globals["namespace"] = _Namespace
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        del self.globals["lipsum"]

    def concat(self, pieces: Iterable[str]) -> str:  # type: ignore[override]
        """The pieces of a macro or a `set` block as one string."""
        found = list(pieces)
        CURRENT.get().spend(sum(map(len, found)))
        return "".join(found)

    def checked(self, value: Any) -> Any:
        """A list, tuple or dictionary that was just made."""
        return CURRENT.get().checked(value)

    def joined(self, values: tuple[Any, ...]) -> str:
        """`a ~ b`."""
        CURRENT.get().spend(CURRENT.get().weigh(values))
        return "".join(map(str, values))

    @property
    def tick(self) -> None:
        """Read at the top of every loop turn, macro and block."""
        CURRENT.get().spend(1)

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
        budget = CURRENT.get()
        if operator == "%" and isinstance(left, str):
            check_percent(budget, left, right)
        elif operator == "*":
            budget.spend(product_size(budget, left, right))
        elif operator == "**" and (abs(left) > 1_000_000 or abs(right) > 64):
            raise LimitError(f"it computes {left!r:.20} ** {right!r:.20}")
        elif operator == "+" and isinstance(left, str) and isinstance(right, str):
            budget.spend(len(left) + len(right))
            return left + right
        return budget.checked(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """A call in a template: macros, what the globals hold, and harmless methods of data."""
        budget = CURRENT.get()
        budget.spend(1)
        owner = getattr(__obj, "__self__", None)
        if isinstance(__obj, types.BuiltinMethodType) or isinstance(owner, (str, dict, list)):
            check_method(budget, owner, __obj.__name__, args)
        return budget.checked(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format` with bounded fields."""
        if super().wrap_str_format(value) is None:
            return None
        text, by_map = str(value.__self__), value.__name__ == "format_map"

        def formatted(*args: Any, **kwargs: Any) -> str:
            if by_map:
                args, kwargs = (), args[0]
            budget = CURRENT.get()
            budget.spend(text.count("{") * budget.weigh([*args, *kwargs.values()]))
            return _Formatter(self).vformat(text, args, kwargs)

        return formatted


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
