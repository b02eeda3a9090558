"""Pictures: what is written in them is there, whole, and lies on nothing else."""

import io
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import polyhead as ph

pytest.importorskip("matplotlib")

from polyhead.explain import plots
from polyhead.explain.reduce import Top

WORDS = ("The", " cat", "\n", " a_very_long_word_that_does_not_end", "$x^2$", " é", "\t", "")


def tokens(count: int) -> list[str]:
    return [WORDS[i % len(WORDS)] for i in range(count)]


def weights(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).softmax(-1)


def lens(layers: int, count: int) -> dict[str, Top]:
    values = weights(layers, 1, count, 3).log().sort(-1, descending=True).values
    indices = torch.arange(3).expand(1, count, 3)
    return {f"layers.{i}": Top(values[i], indices) for i in range(layers)}


PICTURES: dict[str, Callable[[int, bool], Any]] = {
    "heatmap": lambda n, dark: plots.heatmap(weights(n, n), tokens(n), title="t", dark=dark),
    "alignment": lambda n, dark: plots.heatmap(
        weights(n, 7), tokens(n), tokens(7), title="source", dark=dark
    ),
    "signed": lambda n, dark: plots.heatmap(weights(n, n) - 0.1, tokens(n), signed=True, dark=dark),
    "head grid": lambda n, dark: plots.head_grid(weights(6, n, n), tokens(n), "l", dark=dark),
    "lens": lambda n, dark: plots.lens_table(
        lens(12, n), tokens(n), lambda i: WORDS[i], title="lens", dark=dark
    ),
    "layer heads": lambda n, dark: plots.layer_heads(weights(n, 9), "induction", dark=dark),
    "by layer": lambda n, dark: plots.by_layer(weights(n, 9), "entropy", "e", dark=dark),
    "projection": lambda n, dark: plots.projection(weights(n, 9), tokens(n), "p", dark=dark),
    "images": lambda n, dark: plots.over_images(
        torch.randn(3, 16, 16), weights(min(n, 30), 4, 4), dark=dark
    ),
}


def boxes(figure: Any) -> dict[Any, Any]:
    """Where each label of the edges is, in pixels, by its text's object."""
    for _ in range(2):  # what is laid out moves ticks, which are laid out again
        figure.draw_without_rendering()
    found = {}
    for axes in figure.axes:
        if axes.get_visible() and axes.axison:
            for label in (*ticks(axes.xaxis), *ticks(axes.yaxis), axes.title):
                if label.get_text().strip():
                    found[label] = label.get_window_extent()
    return found


def ticks(axis: Any) -> list[Any]:
    """The labels that are seen: those of ticks beyond the edges are not."""
    low, high = sorted(axis.get_view_interval())
    every = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    return [label for tick in every for label in (tick.label1, tick.label2) if label.get_visible()]


@pytest.mark.parametrize(("count", "dark"), [(5, False), (30, True), (400, False)])
@pytest.mark.parametrize("name", PICTURES)
def test_nothing_is_cut_and_nothing_lies_on_something_else(
    name: str, count: int, dark: bool
) -> None:
    if (name, count) == ("projection", 400):
        count = 60
    figure = PICTURES[name](count, dark)
    whole = figure.bbox
    found = boxes(figure)
    for label, box in found.items():
        inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= whole.x1 + 1 and box.y1 <= whole.y1 + 1
        assert inside, (label.get_text(), box, whole)
    for axes in figure.axes:
        for labels in (ticks(axes.xaxis), ticks(axes.yaxis)):
            own = [found[label] for label in labels if label in found]
            turned = any(label.get_rotation() == 45 for label in labels)
            for one, other in pairwise(own):
                assert turned or not _overlap(one, other)
    background = sum(figure.get_facecolor()[:3])
    assert background == (0 if dark else 3)
    ink = {label.get_color() for label in found}
    assert ink <= ({"white"} if dark else {"black"})


def _overlap(one: Any, other: Any) -> bool:
    across = min(one.x1, other.x1) - max(one.x0, other.x0)
    along = min(one.y1, other.y1) - max(one.y0, other.y0)
    return across > 0.5 and along > 0.5


def test_tokens_are_told_apart_and_never_read_as_formulas() -> None:
    figure = plots.heatmap(weights(8, 8), tokens(8))
    shown = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert shown == ["The", "·cat", "⏎", "·a_very_long_word…", "$x^2$", "·é", "→", ""]
    assert all(not label.get_parse_math() for label in figure.axes[0].get_yticklabels())


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_kept_as_a_file(kind: str, tmp_path: Any) -> None:
    path = tmp_path / f"map.{kind}"
    plots.heatmap(weights(5, 5), tokens(5)).savefig(path)
    assert path.read_bytes()[:5] in (b"\x89PNG\r", b"<?xml")


def test_the_user_s_own_style_is_left_alone() -> None:
    from matplotlib import rcParams

    before = dict(rcParams)
    plots.heatmap(weights(5, 5), tokens(5), dark=True)
    assert dict(rcParams) == before


def test_values_of_other_tokens_are_refused() -> None:
    with pytest.raises(ph.ConfigError, match=r"values \[5, 5\] do not belong to tokens \[4, 4\]"):
        plots.heatmap(weights(5, 5), tokens(4))


def test_a_title_is_no_formula() -> None:
    words = r"pay $\foo$ now, $x_"
    figures = [
        plots.heatmap(torch.eye(2), ["a", "b"], title=words),
        plots.head_grid(torch.rand(2, 2, 2), ["a", "b"], title=words),
        plots.over_images(torch.rand(3, 4, 4), torch.rand(2, 4, 4), titles=[words]),
    ]
    for figure in figures:
        figure.savefig(io.BytesIO())
