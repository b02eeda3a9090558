"""Docstrings are written to be read in the source; this makes reStructuredText of them."""

import re
from collections import deque
from typing import Any

LITERAL = re.compile(r"(`[^`]+`)")
NAMED = re.compile(r"^(\w[\w, ]*|[`\w*]+):( {2,}| )(\S.*)$")


def setup(app: Any) -> dict[str, bool]:
    """Sphinx calls this."""
    app.connect("autodoc-process-docstring", _rewrite)
    return {"parallel_read_safe": True}


def _rewrite(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    if (what, name) == ("module", name) or lines:
        lines[:] = rewritten(lines)


def rewritten(lines: list[str]) -> list[str]:
    """Paragraphs stay, `name: text` and what hangs below it is a list, deeper lines stay so."""
    found: list[str] = []
    rest = deque(lines)
    while rest:
        line = rest.popleft()
        named = NAMED.match(line) if found else None
        if named:
            found += ["", _item(named, rest)]
        elif line.startswith("  ") and line.strip():
            found += ["", "::", "", *_as_it_is(line, rest), ""]
        else:
            after_item = bool(found) and found[-1].startswith("* ") and bool(line.strip())
            found += [*([""] if after_item else []), _inline(line)]
    return [*found, ""]


def _item(named: re.Match[str], rest: deque[str]) -> str:
    """One of a list. Columns (`name:    text`) end where lines are not indented any more."""
    name, gap, text = named.groups()
    in_columns = len(gap) > 1
    while rest and rest[0].strip() and (rest[0].startswith("    ") or not in_columns):
        if NAMED.match(rest[0]):
            break
        text += f" {rest.popleft().strip()}"
    return f"* **{_inline(name)}**: {_inline(text)}"


def _as_it_is(line: str, rest: deque[str]) -> list[str]:
    """Lines that are indented, and blank ones between them."""
    found = [f"   {line}"]
    while rest and (rest[0].startswith("  ") or not rest[0].strip()):
        found.append(f"   {rest.popleft()}")
    return found


def _inline(text: str) -> str:
    """Backticks are code; what means something to reStructuredText elsewhere does not."""
    parts = LITERAL.split(text)
    return "".join(
        f"`{part}`" if LITERAL.fullmatch(part) else re.sub(r"([*|\\])|_(?!\w)", _escaped, part)
        for part in parts
    )


def _escaped(match: re.Match[str]) -> str:
    return f"\\{match[0]}"
