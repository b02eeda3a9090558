"""A training run on one page: loss curves, comparison, an attention map, samples.

Plain data in, one self-contained HTML file out: inline SVG, no scripts, light and dark.
"""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from polyhead.errors import FileError
from polyhead.files.disk import atomic_file

Point = tuple[float, float]

WIDTH = 520  # of every drawing, in its own units; text stays readable on a phone
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 10, 40
_MOST_POINTS = 400


@dataclass(frozen=True)
class AttentionMap:
    """Weights `[Q][K]` between tokens, and whose they are. Rows look at columns."""

    tokens: Sequence[str]
    weights: Sequence[Sequence[float]]
    caption: str


@dataclass(frozen=True)
class Chart:
    """Curves over one pair of axes: points (step, value) by name. axis: where it is no step."""

    title: str
    curves: Mapping[str, Sequence[Point]]
    caption: str = ""
    axis: str = "step"


@dataclass(frozen=True)
class Report:
    """What the page shows; what is empty is left out.

    curves: points (step, value) by name, and curves_caption what they show. charts: further ones.
    table: rows of texts, the first of them a header. bars: name and bits per byte, of which the
    one numbered `marked` stands out. samples: (step, or whose it is, text). facts: name and value,
    as they shall stand there.
    """

    title: str
    summary: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    curves: Mapping[str, Sequence[Point]] = field(default_factory=dict)
    curves_caption: str = "Bits per byte by step; lower is better."
    charts: Sequence[Chart] = ()
    table: Sequence[Sequence[str]] = ()
    bars: Sequence[tuple[str, float]] = ()
    bars_caption: str = ""
    marked: int = 0
    attention: AttentionMap | None = None
    samples: Sequence[tuple[int | str, str]] = ()


def write_report(path: str | Path, report: Report) -> None:
    """Write the page, atomically. Raises FileError where it cannot be written."""
    try:
        with atomic_file(Path(path)) as file:
            file.write(render(report).encode("utf-8", "replace"))
    except OSError as error:
        raise FileError(
            f"{path} cannot be written ({error}); check space and permissions"
        ) from None


def render(report: Report) -> str:
    """The page as HTML."""
    parts = [f"<h1>{_text(report.title)}</h1>"]
    if report.summary:
        parts.append(f'<p class="lead">{_text(report.summary)}</p>')
    if report.facts:
        rows = "".join(
            f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>"
            for name, value in report.facts.items()
        )
        parts.append(f"<dl>{rows}</dl>")
    if report.table:
        parts.append(_table(report.table))
    for chart in (Chart("Loss", report.curves, report.curves_caption), *report.charts):
        curves = {name: _finite(points) for name, points in chart.curves.items()}
        if any(curves.values()):
            parts.append(_figure(chart.title, line_chart(curves, chart.axis), chart.caption))
    if report.bars:
        parts.append(
            _figure("Comparison", bar_chart(report.bars, report.marked), report.bars_caption)
        )
    if report.attention is not None:
        drawing = heat_map(report.attention.tokens, report.attention.weights)
        parts.append(_figure("Where one head looks", drawing, report.attention.caption))
    if report.samples:
        samples = "".join(
            f"<h3>{_text(f'Step {of}' if isinstance(of, int) else of)}</h3><pre>{_text(text)}</pre>"
            for of, text in report.samples
        )
        parts.append(f"<section><h2>What it writes</h2>{samples}</section>")
    return _PAGE.format(title=_text(report.title), style=_STYLE, body="\n".join(parts))


def line_chart(curves: Mapping[str, Sequence[Point]], axis: str = "step", height: int = 280) -> str:
    """Curves over one pair of axes, as SVG, each named in a key above."""
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return ""
    right = max(x for x, _ in points) or 1.0
    # The first steps would squeeze all the rest into the lowest tenth.
    ys = sorted(y for _, y in points)
    low, high = ys[0], ys[min(len(ys) - 1, int(0.98 * len(ys)))]
    ticks = _ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    keys = _keys(list(curves))
    height += 18 * int(keys[-1][1])
    top, bottom = _TOP + 20 + 18 * keys[-1][1], height - _BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        share = (min(y, high) - low) / ((high - low) or 1.0)
        return _LEFT + x / right * (WIDTH - _LEFT - _RIGHT), bottom - share * (bottom - top)

    drawn: list[str] = []
    for tick in ticks:
        _, y = at(0, tick)
        drawn.append(
            f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        drawn.append(_label(_LEFT - 6, y + 4, f"{tick:g}", "end"))
    drawn.extend(
        _label(at(tick, low)[0], bottom + 18, f"{tick:g}", "middle")
        for tick in _ticks(0, right)
        if tick <= right
    )
    drawn.append(_label((_LEFT + WIDTH) / 2, height - 4, axis, "middle"))
    for number, (name, curve) in enumerate(curves.items()):
        path = " ".join("{:.1f},{:.1f}".format(*at(x, y)) for x, y in _thinned(curve))
        kind = f"line c{number % 4} d{number // 4 % 3}"
        key, row = keys[number]
        y = 12 + 18 * row
        if len(curve) == 1:  # a line of one point is none
            x, height_at = at(*curve[0])
            drawn.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{height_at:.1f}" r="3"/>')
        drawn.append(f'<polyline class="{kind}" points="{path}"/>')
        drawn.append(f'<line class="{kind}" x1="{key}" x2="{key + 20}" y1="{y}" y2="{y}"/>')
        drawn.append(_label(key + 26, y + 4, name, "start"))
    return _svg(height, drawn, f"Curves by {axis}")


def _keys(names: Sequence[str]) -> list[tuple[float, int]]:
    """Where each curve's name stands: how far to the right, and in which line."""
    found: list[tuple[float, int]] = []
    at, row = float(_LEFT), 0
    for name in names:
        width = 46 + 8 * len(name)
        if at > _LEFT and at + width > WIDTH:
            at, row = float(_LEFT), row + 1
        found.append((at, row))
        at += width
    return found


def bar_chart(bars: Sequence[tuple[str, float]], marked: int = 0, row: int = 46) -> str:
    """Horizontal bars with their values, as SVG; one stands out."""
    most = max((value for _, value in bars if math.isfinite(value)), default=1.0) or 1.0
    drawn: list[str] = []
    for number, (name, value) in enumerate(bars):
        y = number * row
        length = (value / most if math.isfinite(value) else 1.0) * (WIDTH - 80)
        kind = "c0" if number == marked else "other"
        drawn.append(_label(0, y + 14, name, "start"))
        drawn.append(
            f'<rect class="bar {kind}" x="0" y="{y + 20}" width="{length:.1f}" height="16" rx="3"/>'
        )
        drawn.append(_label(length + 8, y + 33, f"{value:.3f}", "start"))
    return _svg(row * len(bars), drawn, "Comparison")


def heat_map(tokens: Sequence[str], weights: Sequence[Sequence[float]]) -> str:
    """A matrix of weights in 0 to 1 with its tokens along both sides, as SVG."""
    side = 16
    cell = (WIDTH - side) / max(1, len(tokens))
    size = max(5.0, min(12.0, cell))
    drawn: list[str] = []
    for index, token in enumerate(tokens):
        middle = side + (index + 0.5) * cell
        shown = _visible(token)
        text = f'class="token" font-size="{size:.1f}" text-anchor="middle"'
        drawn.append(f'<text {text} x="{middle:.1f}" y="{side - 5}">{shown}</text>')
        drawn.append(f'<text {text} x="{side / 2}" y="{middle + size / 3:.1f}">{shown}</text>')
    for q, row in enumerate(weights):
        for k, weight in enumerate(row):
            if math.isfinite(weight) and weight >= 0.005:
                # A square root, for what is weak shall be seen as well.
                drawn.append(
                    f'<rect class="cell" x="{side + k * cell:.1f}" y="{side + q * cell:.1f}" '
                    f'width="{cell:.1f}" height="{cell:.1f}" fill-opacity="{weight**0.5:.2f}"/>'
                )
    inner = WIDTH - side
    drawn.append(f'<rect class="frame" x="{side}" y="{side}" width="{inner}" height="{inner}"/>')
    return _svg(WIDTH, drawn, "Attention weights")


def _svg(height: float, drawn: Sequence[str], name: str) -> str:
    inside = "\n".join(drawn)
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{name}" '
        f'xmlns="http://www.w3.org/2000/svg">\n{inside}\n</svg>'
    )


def _figure(title: str, drawing: str, caption: str) -> str:
    under = f"<figcaption>{_text(caption)}</figcaption>" if caption else ""
    return f"<section><h2>{_text(title)}</h2><figure>{drawing}{under}</figure></section>"


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    top = "".join(f"<th>{_text(cell)}</th>" for cell in head)
    lines = "".join(
        "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in body
    )
    return f'<div class="wide"><table><tr>{top}</tr>{lines}</table></div>'


def _label(x: float, y: float, text: str, anchor: str) -> str:
    return (
        f'<text class="label" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{_text(text)}</text>'
    )


def _text(text: str) -> str:
    """Escaped, and without the control characters that HTML has no place for."""
    return html.escape("".join(c for c in text if c in "\n\t" or c.isprintable()))


def _visible(token: str) -> str:
    return html.escape({"\n": "⏎", " ": "·", "\t": "⇥"}.get(token, token[:3]))


def _finite(points: Sequence[Point]) -> list[Point]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _thinned(curve: Sequence[Point]) -> Sequence[Point]:
    """At most _MOST_POINTS of them, the last among them; each the mean of its neighbourhood."""
    group = math.ceil(len(curve) / _MOST_POINTS)
    if group <= 1:
        return curve
    parts = [curve[i : i + group] for i in range(0, len(curve), group)]
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in parts]


def _ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`."""
    span = (high - low) or abs(high) or 1.0
    base = 10 ** math.floor(math.log10(span / about))
    step = next(base * m for m in (1, 2, 5, 10) if span / (base * m) <= about)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, max(last, first + 1) + 1)]


_STYLE = """
:root { color-scheme: light dark; --paper: #fcfcfb; --ink: #1c2024; --soft: #5f6770;
  --rule: #dfe2e5; --c0: #0b6bcb; --c1: #d9541e; --c2: #2a8a4a; --c3: #8250c4; --panel: #f1f3f4; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171a; --ink: #e6e9ec; --soft: #9aa4ae;
  --rule: #30363c; --c0: #5aa9f8; --c1: #ff8e5e; --c2: #62c583; --c3: #b795f0; --panel: #1d2226; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 46rem; padding: 1.5rem 1rem 4rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: .9rem; color: var(--soft); margin: 1.1rem 0 .3rem; font-weight: 600; }
.lead { color: var(--soft); margin: 0 0 1rem; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .6rem;
  margin: 1rem 0; }
dl div { background: var(--panel); border-radius: .5rem; padding: .5rem .7rem; }
dt { color: var(--soft); font-size: .8rem; } dd { margin: 0; font-weight: 600; }
figure { margin: 0; } figcaption { color: var(--soft); font-size: .9rem; margin-top: .5rem; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
pre { background: var(--panel); border-radius: .5rem; padding: .8rem; margin: 0; font-size: .85rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.label { fill: var(--soft); font-size: 13px; } .token { fill: var(--ink); font-family: monospace; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: right; padding: .25rem .7rem; border-bottom: 1px solid var(--rule); }
th:first-child, td:first-child { text-align: left; padding-left: 0; color: var(--soft); }
.d1 { stroke-dasharray: 6 3; } .d2 { stroke-dasharray: 2 3; }
.grid { stroke: var(--rule); } .line { fill: none; stroke-width: 2; }
.line.c0 { stroke: var(--c0); } .line.c1 { stroke: var(--c1); } .line.c2 { stroke: var(--c2); }
.line.c3 { stroke: var(--c3); } .bar.c0, .cell { fill: var(--c0); }
.bar.other { fill: var(--soft); }
.frame { fill: none; stroke: var(--rule); }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
