import math
import re
from html.parser import HTMLParser

import pytest

from polyhead.errors import FileError
from polyhead.train.report import (
    AttentionMap,
    Report,
    bar_chart,
    heat_map,
    line_chart,
    render,
    write_report,
)

WEIGHTS = [[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.2, 0.001, 0.8]]
FULL = Report(
    title="A <script>alert(1)</script> run",
    summary='"quotes" & <b>tags</b>',
    facts={"steps": "10", "<x>": "</dl>"},
    curves={"training": [(1, 4.0), (2, 3.0), (3, 2.5)], "held <out>": [(3, 2.7)]},
    bars=[("GPT", 1.5), ("<5-gram>", 1.9)],
    bars_caption="less is <more>",
    attention=AttentionMap(["<", " ", "\n"], WEIGHTS, "look & see"),
    samples=[(1, "x < y\x00\x1b[31m"), (3, "</pre><script>")],
)


class Checker(HTMLParser):
    """Every tag that is opened is closed, in order."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], set()

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check(page):
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    return checker.seen


def test_the_page_is_whole_escaped_and_needs_nothing_else():
    page = render(FULL)
    seen = check(page)
    assert {"h1", "svg", "polyline", "rect", "pre", "figcaption"} <= seen
    assert not {"script", "link", "img", "b", "x"} & seen
    assert not re.search(r"(?:src|href)\s*=|url\(|@import", page)
    assert "x &lt; y" in page
    assert "\x00" not in page
    assert "\x1b" not in page
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page


def test_what_is_empty_is_left_out():
    page = render(Report(title="nothing"))
    check(page)
    assert not any(word in page for word in ("<svg", "<section", "<dl>", "Comparison"))


def numbers(drawing, name):
    return [float(value) for value in re.findall(rf' {name}="([-\d.]+)"', drawing)]


@pytest.mark.parametrize("values", [[2.0], [2.0, 2.0], [1e-9, 1e9], [math.nan, 1.0], [0.0, 0.0]])
def test_curves_of_any_size_stay_inside(values):
    points = [(i + 1, y) for i, y in enumerate(values)]
    page = render(Report(title="t", curves={"c": points}))
    check(page)
    assert "nan" not in page
    for x, y in re.findall(r"([-\d.]+),([-\d.]+)(?=[ \"])", page):
        assert 0 <= float(x) <= 520
        assert 0 <= float(y) <= 280


def test_a_falling_loss_is_drawn_falling():
    drawing = line_chart({"loss": [(1, 3.0), (2, 2.0), (3, 1.0)]})
    path = re.search(r'points="([^"]+)"', drawing)[1].split()
    heights = [float(point.split(",")[1]) for point in path]
    assert heights == sorted(heights)


@pytest.mark.parametrize("value", [1e-3, 0.4, 7.0, 3e8])
def test_a_curve_that_stays_where_it_is_does_not_look_like_zero(value):
    drawing = line_chart({"lr": [(1, value), (2, value)]})
    marks = [float(text) for text in re.findall(r'end">([-\d.e+]+)<', drawing)]
    assert min(marks) > value / 2
    assert min(marks) <= value <= max(marks)


def test_bars_are_in_proportion():
    widths = numbers(bar_chart([("a", 1.0), ("b", 2.0)]), "width")
    assert widths[1] == pytest.approx(2 * widths[0])


def test_cells_stand_where_the_weights_are():
    drawing = heat_map(["a", "b", "c"], WEIGHTS)
    cells = re.findall(r'class="cell" x="([\d.]+)" y="([\d.]+)".*?fill-opacity="([\d.]+)"', drawing)
    # What is nearly nothing is not drawn.
    assert len(cells) == 5
    assert [float(cell[2]) for cell in cells] == pytest.approx(
        [math.sqrt(w) for w in (1, 0.5, 0.5, 0.2, 0.8)], abs=0.01
    )
    assert float(cells[1][1]) == float(cells[2][1]) > float(cells[0][1])


def test_a_long_run_stays_small(tmp_path):
    curve = [(i, 5 - i / 1e5) for i in range(200_000)]
    side = 100
    dense = [[1 / side] * side for _ in range(side)]
    attention = AttentionMap(["x"] * side, dense, "")
    report = Report(title="t", curves={"c": curve}, attention=attention, samples=[(1, "y" * 9999)])
    write_report(tmp_path / "report.html", report)
    assert (tmp_path / "report.html").stat().st_size < 1_000_000


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match=r"file"):
        write_report(tmp_path / "file" / "report.html", Report(title="t"))
