"""What the interactive component shows, as plain data, and the page that holds it.

L layers, H heads, Q queries, K keys, T tokens.
"""

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from polyhead.errors import ConfigError, FileError
from polyhead.explain.packing import bytes_of, packed
from polyhead.files.disk import atomic_file

Place = tuple[int, int]
"""A layer of a stack and one of its heads."""
_GROUND = """
:root { color-scheme: light dark; }
body { margin: 0 auto; max-width: 1180px; padding: 20px 16px 48px; background: #fff; color: #1c2330;
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 22px; margin: 8px 0; } h2 { font-size: 17px; margin: 24px 0 6px; }
p { max-width: 78ch; } table { border-collapse: collapse; margin: 8px 0; }
td, th { padding: 2px 14px 2px 0; text-align: left; vertical-align: top; font-weight: 400; }
th { color: #5a6475; } td { overflow-wrap: anywhere; }
@media (prefers-color-scheme: dark) {
  body { background: #0f1319; color: #e8ebf0; } th { color: #a3adbd; } }
"""


@dataclass(frozen=True)
class Picture:
    """An image that tokens are patches of. src: a data URI. first: the token of the first patch."""

    src: str
    rows: int
    columns: int
    first: int


@dataclass(frozen=True)
class Side:
    """The tokens, of which some may be an image's patches, that look or are looked at."""

    tokens: Sequence[str]
    picture: Picture | None = None


@dataclass(frozen=True)
class Stack:
    """Layers whose heads look from one side at another, numbered among a page's sides.

    weights: bytes `[L, H, Q, K]` as of `packing.bytes_of`, or, of windows, `[L, H, n, M², M²]`
    with, for each layer, the place in them where each token stands. measures: `[L][H]` by name.
    numbers: of the layers among all of their kind, where some were left out.
    """

    name: str
    queries: int
    keys: int
    layers: Sequence[str]
    weights: Tensor
    places: Sequence[Sequence[int]] | None = None
    measures: Mapping[str, Sequence[Sequence[float | None]]] = field(default_factory=dict)
    numbers: Sequence[int] = ()

    def number(self, layer: int) -> int:
        """What readers call a layer."""
        return self.numbers[layer] if self.numbers else layer


@dataclass(frozen=True)
class Finding:
    """Something to look for: heads of a stack that show it, and a query at which they do.

    names: of the heads' layers in the model, and values by which they were found.
    """

    title: str
    text: str
    stack: int
    heads: Sequence[Place] = ()
    token: int | None = None
    names: Sequence[str] = ()
    values: Sequence[float] = ()


@dataclass(frozen=True)
class Lens:
    """What layers would answer: `answers[layer][token]`, (answer, probability), likeliest first."""

    side: int
    layers: Sequence[str]
    answers: Sequence[Sequence[Sequence[tuple[str, float]]]]


@dataclass(frozen=True)
class Page:
    """Attention to walk through: shows itself in a notebook, and saves itself as one HTML file.

    facts: name and value, as they shall stand above.
    """

    title: str
    sides: Sequence[Side]
    stacks: Sequence[Stack] = ()
    findings: Sequence[Finding] = ()
    lens: Lens | None = None
    facts: Mapping[str, str] = field(default_factory=dict)

    def data(self) -> dict[str, Any]:
        """What the component reads (web/inside/src/data.ts), as JSON knows it."""
        weights, least = packed([stack.weights for stack in self.stacks])
        return {
            "title": self.title,
            "sides": [_bare(side) for side in self.sides],
            "stacks": [
                {
                    "name": stack.name,
                    "queries": stack.queries,
                    "keys": stack.keys,
                    "layers": list(stack.layers),
                    "numbers": [stack.number(layer) for layer in range(len(stack.layers))],
                    "heads": stack.weights.shape[1],
                    "weights": text,
                    "least": least,
                    "measures": stack.measures,
                }
                | _windows(stack)
                for stack, text in zip(self.stacks, weights, strict=True)
            ],
            "findings": [_bare(finding) for finding in self.findings],
            "lens": None if self.lens is None else asdict(self.lens),
        }

    def fragment(self, **change: Any) -> str:
        """The component and its data as HTML that any page may take in; nothing is fetched.

        change: of the data, such as another title.
        """
        name = f"polyhead-{uuid4().hex}"
        # What ends a script would end it within a string, too.
        data = json.dumps({**self.data(), **change}, ensure_ascii=False, allow_nan=False)
        data = data.replace("<", "\\u003c")
        return (
            f'<polyhead-inside id="{name}"></polyhead-inside>\n'
            f"<script>{component()}</script>\n"
            f'<script>document.getElementById("{name}").data = {data};</script>\n'
        )

    def _repr_html_(self) -> str:
        return self.fragment()

    def html(self) -> str:
        """The whole page: facts, the component, and how to read it."""
        facts = "".join(
            f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
            for name, value in self.facts.items()
        )
        title = html.escape(self.title)
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{title}</title><style>{_GROUND}</style></head>\n"
            f"<body><main><h1>{title}</h1>\n<table>{facts}</table>\n{self.fragment(title='')}"
            f"{_guide(self)}</main></body></html>\n"
        )

    def save(self, path: str | Path, force: bool = False) -> Path:
        """Write the page; FileError for a file in the way, unless `force`."""
        path = Path(path)
        if path.exists() and not force:
            raise FileError(f"{path} is there; pass --force (force=True) to write over it")
        if path.exists() and not path.is_file():
            raise FileError(f"{path} is no file; name another")
        try:
            with atomic_file(path) as file:
                file.write(self.html().encode("utf-8", "replace"))
        except OSError as error:
            raise FileError(f"{path} cannot be written ({error.strerror}); name another") from None
        return path


def page_of(
    weights: Tensor | Mapping[str, Tensor],
    queries: Sequence[str],
    keys: Sequence[str] | None = None,
    title: str = "attention",
) -> Page:
    """A page of weights of one's own: `[Q, K]`, `[H, Q, K]` or `[L, H, Q, K]`, or a layer's
    `[H, Q, K]` or `[1, H, Q, K]` by its name, as `capture` gives them.

    keys: None is as queries. ConfigError for shapes that are not those of the tokens.
    """
    if isinstance(weights, Mapping):
        names = list(weights)
        found = [w[0] if w.dim() == 4 and len(w) == 1 else w for w in weights.values()]
        shapes = {tuple(w.shape) for w in found}
        if len(shapes) != 1 or any(w.dim() != 3 for w in found):
            raise ConfigError(
                f"weights have the shapes {sorted(shapes)}; one page shows layers of one shape "
                "[heads, queries, keys]: name fewer, or one row of the batch"
            )
        each = [bytes_of(w) for w in found]
    else:
        if not 2 <= weights.dim() <= 4:
            raise ConfigError(f"weights are of {weights.dim()} dimensions; [layers, heads, Q, K]")
        whole = weights[(None,) * (4 - weights.dim())]
        names, each = [str(layer) for layer in range(len(whole))], [bytes_of(w) for w in whole]
    expected = len(queries), len(queries if keys is None else keys)
    if tuple(each[0].shape[1:]) != expected:
        raise ConfigError(
            f"weights are of {tuple(each[0].shape[1:])} queries and keys, and the tokens "
            f"{expected}; give a name to each"
        )
    sides = [Side(list(queries)), *([] if keys is None else [Side(list(keys))])]
    return Page(title, sides, [Stack("attention", 0, len(sides) - 1, names, torch.stack(each))])


@cache
def component() -> str:
    """The compiled component, from web/inside."""
    return (files("polyhead.explain") / "assets" / "inside.js").read_text("utf-8").strip()


def _windows(stack: Stack) -> dict[str, Any]:
    if stack.places is None:
        return {}
    return {"windows": {"area": stack.weights.shape[-1], "places": stack.places}}


def _bare(value: Side | Finding) -> dict[str, Any]:
    return {key: item for key, item in asdict(value).items() if key != "picture" or item}


def _guide(page: Page) -> str:
    parts = [
        "<h2>How to read this</h2><p>Every head of every layer gives each token shares of its "
        "attention, which sum to one. Choose a head on the left, or one that <em>What to look "
        "for</em> names; hold a token to see its shares alone. A share says what a head reads, not "
        "what the answer stands on: to know that, take the head out (<code>ph.knock_out</code>) or "
        "put in another run's states (<code>patching_grid</code>).</p>"
    ]
    if page.lens is not None:
        parts.append(
            "<p><em>Lens</em> reads each layer's states as if it were the last one: the table "
            "shows from which layer on the answer stands, and how sure it is.</p>"
        )
    return "".join(parts)
