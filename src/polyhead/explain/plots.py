"""Pictures of what was seen: each function returns matplotlib's figure; `figure.savefig` keeps it.

T tokens, S source tokens, Q queries, K keys, H heads, L layers. Wants `polyhead[explain]`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, cast

import torch
from torch import Tensor

from polyhead.errors import ConfigError
from polyhead.explain.reduce import Top

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LIGHT, _DARK, _SIGNED = (
    "Blues",
    "cividis",
    "PuOr",
)  # told apart by who sees few colours, and in grey
_LINE = "#3d7dca"
_LABELS = 64  # more are not all written
_WIDE = 18  # letters of a token that are written

_SCRIPTS = (
    "Noto Sans CJK JP", "Noto Sans CJK SC", "WenQuanYi Zen Hei", "Hiragino Sans",
    "Microsoft YaHei", "Malgun Gothic", "Noto Sans Thai", "Noto Sans Devanagari", "Nirmala UI",
    "Leelawadee UI", "Arial Unicode MS", "Noto Emoji", "Unifont",
)  # fmt: skip  # for letters that matplotlib's own font lacks, where they are installed

P = ParamSpec("P")


def _styled(draw: "Callable[P, Figure]") -> "Callable[P, Figure]":
    """Drawn on black where `dark` is asked for, whatever the user's own style is."""

    @wraps(draw)
    def drawn(*args: P.args, **named: P.kwargs) -> "Figure":
        try:
            from matplotlib import font_manager, rc_context, style
        except ImportError:
            raise ConfigError("pictures want matplotlib: pip install polyhead[explain]") from None
        is_dark = bool(named.get("dark", False))
        there = set(font_manager.get_font_names())
        fonts = ["DejaVu Sans", *(name for name in _SCRIPTS if name in there)]
        own = {"image.cmap": _DARK if is_dark else _LIGHT, "font.family": fonts}
        with rc_context(), style.context(["dark_background" if is_dark else "default", own]):
            return draw(*args, **named)

    return drawn


@_styled
def heatmap(
    weights: Tensor,
    queries: Sequence[str],
    keys: Sequence[str] | None = None,
    title: str = "",
    *,
    signed: bool = False,
    dark: bool = False,
) -> "Figure":
    """Weights `[Q, K]` with the tokens that look (rows) and are looked at (columns).

    keys: None is as queries. signed: values about zero, such as attributions.
    """
    keys = queries if keys is None else keys
    _has(weights, 2)
    _check(weights, (len(queries), len(keys)))
    rows, columns = (max(3.0, min(10.0, 0.21 * len(tokens))) for tokens in (queries, keys))
    longest = [0.075 * min(_WIDE, max(map(len, _shown(tokens)))) for tokens in (queries, keys)]
    figure = _figure(columns + longest[0] + 1.2, rows + longest[1] + 0.6)
    axes = figure.add_subplot()
    picture = _draw(axes, weights, "signed" if signed else "shares")
    _ticks(axes.set_yticks, queries, 72 * rows)
    _ticks(axes.set_xticks, keys, 72 * columns, rotation=90)
    axes.set_title(title, parse_math=False)
    axes.set_ylabel("looks")
    axes.set_xlabel("is looked at")
    figure.colorbar(picture, ax=axes, shrink=0.8, pad=0.02)
    return figure


@_styled
def head_grid(
    weights: Tensor, tokens: Sequence[str], title: str = "", *, dark: bool = False
) -> "Figure":
    """Every head of a layer, `[H, Q, K]`, side by side; the first tokens are named on the edges."""
    _has(weights, 3)
    _check(weights[0], (weights.shape[1], len(tokens)))
    columns = min(4, math.ceil(len(weights) ** 0.5))
    rows = math.ceil(len(weights) / columns)
    figure = _figure(2.4 * columns + 1, 2.5 * rows + 0.5)
    every = figure.subplots(rows, columns, squeeze=False)
    for number, axes in enumerate(every.flat):
        if number >= len(weights):
            axes.set_visible(False)
            continue
        _draw(axes, weights[number], "shares")
        axes.set_title(f"head {number}", fontsize=8)
        _ticks(axes.set_yticks, tokens if number % columns == 0 else (), 150)
        _ticks(
            axes.set_xticks, tokens if number + columns >= len(weights) else (), 150, rotation=90
        )
    figure.suptitle(title, parse_math=False)
    return figure


@_styled
def layer_heads(
    table: Tensor, title: str = "", *, signed: bool = False, dark: bool = False
) -> "Figure":
    """A number for each head of each layer, `[L, H]`; cells that are no head stay empty."""
    layers, heads = _has(table, 2).shape
    figure = _figure(max(4.0, 0.42 * heads + 1.8), max(3.0, 0.26 * layers + 1.2))
    axes = figure.add_subplot()
    picture = _draw(axes, table, "signed" if signed else "linear")
    axes.set_xticks(range(heads))
    axes.set_yticks(range(0, layers, max(1, layers // 24)))
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.set_title(title, parse_math=False)
    if heads <= 16:
        _write(axes, picture, table)
    figure.colorbar(picture, ax=axes, pad=0.02)
    return figure


@_styled
def lens_table(
    tops: Mapping[str, Top],
    tokens: Sequence[str],
    decode: Callable[[int], str],
    row: int = 0,
    title: str = "",
    *,
    dark: bool = False,
) -> "Figure":
    """What each layer would say after each token, the last on top: what `LogitLens.layers` gave.

    decode: an id to its text. row: of the batch. Colours are the probability.
    """
    layers = list(tops.values())[::-1]
    if not layers or not 0 <= row < len(layers[0].values):
        count = len(layers[0].values) if layers else 0
        raise ConfigError(f"row {row} of {count} in {len(layers)} layers; count from 0")
    values = torch.stack([top.values[row, :, 0].exp() for top in layers])
    _check(values, (len(layers), len(tokens)))
    shown = min(len(tokens), 24)
    values = values[:, -shown:]
    figure = _figure(0.78 * shown + 1.8, 0.26 * len(layers) + 1.3)
    axes = figure.add_subplot()
    picture = _draw(axes, values, vmin=0.0, vmax=1.0)
    said = [[decode(int(i)) for i in top.indices[row, -shown:, 0]] for top in layers]
    _write(axes, picture, values, [_shown(line, 9) for line in said])
    axes.set_xticks(
        range(shown), _shown(tokens[-shown:]), rotation=45, ha="right", parse_math=False
    )
    numbers = [str(len(layers) - 1 - number) for number in range(len(layers))]
    axes.set_yticks(range(len(layers)), numbers, fontsize=7)
    axes.set_ylabel("after layer")
    axes.set_title(title, parse_math=False)
    figure.colorbar(picture, ax=axes, pad=0.01, label="probability")
    return figure


@_styled
def by_layer(table: Tensor, name: str, title: str = "", *, dark: bool = False) -> "Figure":
    """A number of every head `[L, H]` as a dot over its layer, and the mean of each as a line."""
    figure = _figure(max(5.0, 0.22 * len(_has(table, 2)) + 2), 3.4)
    axes = figure.add_subplot()
    layers = torch.arange(len(table))[:, None].expand_as(table)
    axes.scatter(
        layers.flatten(), table.flatten().cpu(), s=12, alpha=0.6, color=_LINE, linewidths=0
    )
    axes.plot(range(len(table)), table.nanmean(1).cpu(), color=_LINE, linewidth=2)
    axes.set_xlabel("layer")
    axes.set_ylabel(name)
    axes.set_title(title, parse_math=False)
    axes.set_ylim(bottom=min(0.0, float(table.nan_to_num().min())))
    axes.locator_params(axis="x", integer=True)
    return figure


@_styled
def over_images(
    image: Tensor, maps: Tensor, titles: Sequence[str] = (), *, dark: bool = False
) -> "Figure":
    """Maps `[n, h, w]` over an image `[C, height, width]` of any range: beside it, one each."""
    shown = _has(image, 3).float().cpu()
    shown = (shown - shown.min()) / (shown.max() - shown.min()).clamp_min(1e-9)
    shown = shown.mean(0) if shown.shape[0] != 3 else shown.permute(1, 2, 0)
    columns = min(5, len(_has(maps, 3)) + 1)
    rows = math.ceil((len(maps) + 1) / columns)
    figure = _figure(2.2 * columns, 2.4 * rows)
    every = figure.subplots(rows, columns, squeeze=False).flat
    edges = (-0.5, image.shape[2] - 0.5, image.shape[1] - 0.5, -0.5)
    for number, axes in enumerate(every):
        axes.set_axis_off()
        if number > len(maps):
            continue
        axes.imshow(cast(Any, shown.numpy()), cmap="gray", vmin=0, vmax=1, extent=edges)
        if number:
            found = maps[number - 1].float().cpu()
            axes.imshow(
                cast(Any, found.numpy()),
                cmap=_DARK,
                alpha=0.65,
                extent=edges,
                interpolation="bilinear",
            )
            axes.set_title(
                titles[number - 1] if number <= len(titles) else f"{number - 1}",
                fontsize=8,
                parse_math=False,
            )
        axes.set_xlim(edges[:2])
        axes.set_ylim(edges[2:])
    return figure


@_styled
def projection(
    vectors: Tensor, labels: Sequence[str], title: str = "", *, dark: bool = False
) -> "Figure":
    """Vectors `[n, E]` on the two directions in which they differ most, each with its label."""
    _check(_has(vectors, 2)[:, :1], (len(labels), 1))
    centred = vectors.float().cpu() - vectors.float().cpu().mean(0)
    left, sizes, _ = torch.linalg.svd(centred, full_matrices=False)
    at = torch.cat([left[:, :2] * sizes[:2], torch.zeros(len(labels), 1)], 1)[:, :2]
    share = (sizes[:2].square().sum() / sizes.square().sum().clamp_min(1e-12)).item()
    figure = _figure(6.5, 5.0)
    axes = figure.add_subplot()
    axes.scatter(at[:, 0].tolist(), at[:, 1].tolist(), s=14, color=_LINE)
    axes.margins(0.12)
    _label(axes, at, _shown(labels, 24))
    axes.set_title(title, parse_math=False)
    axes.set_xlabel(f"the two directions hold {share:.0%} of the differences")
    return figure


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure((width, height), dpi=100, layout="constrained")


def _draw(axes: "Axes", values: Tensor, kind: str = "linear", **options: Any) -> Any:
    """kind: linear; signed, about zero; or shares, of which small ones are to be seen as well."""
    from matplotlib.colors import Normalize, PowerNorm

    values = values.detach().float().cpu()
    scale: Normalize | None = None
    if kind == "signed":
        most = float(values.nan_to_num().abs().max()) or 1.0
        scale, options["cmap"] = Normalize(-most, most), _SIGNED
    elif kind == "shares":
        scale = PowerNorm(0.5, 0.0, float(values.nan_to_num().max()) or 1.0)
    axes.tick_params(length=2, labelsize=7)
    return axes.imshow(
        cast(Any, values.numpy()), norm=scale, aspect="auto", interpolation="nearest", **options
    )


def _ticks(place: Callable[..., Any], tokens: Sequence[str], points: float, **options: Any) -> None:
    """Tokens along an edge so many points long; of many, every second or third."""
    most = max(1, min(_LABELS, int(points / 7)))
    step = max(1, math.ceil(len(tokens) / most))
    size = max(5.0, min(8.0, 0.8 * points * step / max(1, len(tokens))))
    shown = _shown(tokens[::step])
    place(range(0, len(tokens), step), shown, fontsize=size, parse_math=False, **options)


def _write(
    axes: "Axes", picture: Any, values: Tensor, texts: Sequence[Sequence[str]] | None = None
) -> None:
    """What is in each cell, light on dark and dark on light."""
    for row, line in enumerate(values.tolist()):
        for column, value in enumerate(line):
            if math.isnan(value):
                continue
            red, green, blue, _ = picture.cmap(picture.norm(value))
            ink = "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white"
            text = f"{value:.2f}".replace("0.", ".", 1) if texts is None else texts[row][column]
            how: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 6.5}
            axes.text(column, row, text, color=ink, parse_math=False, **how)


def _label(axes: "Axes", at: Tensor, labels: Sequence[str]) -> None:
    """A label beside each point, above or below it, where it lies on no other if that can be."""
    span = (at.amax(0) - at.amin(0)).clamp_min(1e-9)
    points = ((at - at.amin(0)) / span * torch.tensor([6.0, 4.4]) * 72 / 1.24).tolist()
    taken: list[tuple[float, float, float, float]] = []
    for (x, y), (left, low), label in zip(at.tolist(), points, labels, strict=True):
        width = 4.4 * len(label)
        offsets = [(4, 3), (4, -9), (-4 - width, 3), (-4 - width, -9), (4, 11), (4, -17)]
        boxes = [(left + dx, low + dy, left + dx + width, low + dy + 8) for dx, dy in offsets]
        free = [not any(_meet(box, other) for other in taken) for box in boxes]
        best = free.index(True) if True in free else 0
        taken.append(boxes[best])
        note = axes.annotate(label, (x, y), offsets[best], textcoords="offset points", fontsize=7)
        note.set_parse_math(False)


def _meet(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return all(one[i] < other[i + 2] and other[i] < one[i + 2] for i in (0, 1))


def _shown(tokens: Sequence[str], longest: int = 18) -> list[str]:
    """Tokens as a reader can tell them: spaces and line ends made visible, long ones cut."""
    marks = str.maketrans({" ": "·", "\n": "⏎", "\t": "→", "\r": "␍"})
    found = [token.translate(marks) for token in tokens]
    return [token if len(token) <= longest else token[: longest - 1] + "…" for token in found]


def _has(values: Tensor, dims: int) -> Tensor:
    """These, if they are of so many dimensions and there is something to draw."""
    if values.dim() != dims or not values.numel():
        raise ConfigError(
            f"values {list(values.shape)} cannot be drawn; this picture is of {dims} dimensions, "
            "none of them empty"
        )
    return values


def _check(values: Tensor, shape: tuple[int, int]) -> None:
    if tuple(values.shape) != shape:
        raise ConfigError(
            f"values {list(values.shape)} do not belong to tokens {list(shape)}; give those of one "
            "text and one head, and a token for each row and column"
        )
