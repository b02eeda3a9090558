"""The component in a real browser: what it shows, how it is steered, and that nothing is cut."""

import re
from typing import Any

import pytest
import torch

from polyhead.explain.packing import bytes_of
from polyhead.explain.page import Finding, Lens, Page, Picture, Side, Stack, page_of

DOT = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGA"
    "WjR9awAAAABJRU5ErkJggg=="
)
WORDS = ["The", " cat", " sat", "\n", " on", " the", " mat", "."]


def weights(queries: int, keys: int, layers: int = 3, heads: int = 4) -> torch.Tensor:
    drawn = torch.randn(layers, heads, queries, keys, generator=torch.Generator().manual_seed(0))
    return (3 * drawn).softmax(-1)


def kept(shares: torch.Tensor) -> torch.Tensor:
    """As a page keeps them."""
    return (bytes_of(shares).float() / 255) ** 2


def tokens(count: int) -> list[str]:
    return [f"{WORDS[i % len(WORDS)]}{i}" if i >= len(WORDS) else WORDS[i] for i in range(count)]


def full_page(count: int = 8) -> Page:
    """Everything that the component knows."""
    own, cross = weights(count, count), weights(5, count)
    patches = weights(5, 5, heads=2)
    sides = [
        Side(tokens(count)), Side(tokens(5)),
        Side(["[CLS]", "r0 c0", "r0 c1", "r1 c0", "r1 c1"], Picture(DOT, 2, 2, 1)),
    ]  # fmt: skip
    names = [f"layers.{i}.attention" for i in range(3)]
    measures = {"first": [[0.1, 0.9, 0.2, 0.3]] * 3, "second": [[0.5, 0.1, None, 0.3]] * 3}
    stacks = [
        Stack("self-attention", 0, 0, names, bytes_of(own), measures=measures),
        Stack("cross-attention", 1, 0, names, bytes_of(cross)),
        Stack("image", 2, 2, names, bytes_of(patches)),
    ]
    lens = Lens(0, ["a", "b"], [[[("yes", 0.9), ("no", 0.05)]] * count, [[("no", 0.4)]] * count])
    findings = [
        Finding("Found", "Look at these.", 0, [(1, 2), (0, 1)], count - 1),
        Finding("Crossed", "And there.", 1, [(2, 0)], 3),
        Finding("Missing", "No head does.", 0),
    ]
    return Page("a model", sides, stacks, findings, lens, {"read": f"{count} tokens"})


def shown(page: Any) -> dict[str, Any]:
    return page.evaluate("document.querySelector('polyhead-inside').shown")


def readout(page: Any) -> str:
    return page.locator(".readout").inner_text()


def strokes(page: Any) -> int:
    return page.locator(".strokes path").count()


def view(page: Any, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def test_lines_are_the_weights(opened: Any) -> None:
    own = kept(weights(6, 6))
    page = opened(page_of(own, tokens(6)).html())
    drawn = int((own[0, 0] >= 0.02).sum())
    assert strokes(page) == drawn
    page.locator("[data-role=query][data-token='2']").hover()
    best = own[0, 0, 2].topk(5)
    said = re.findall(r"(\d+) “[^”]*” ([\d.]+) %", readout(page))
    assert readout(page).startswith("2 “·sat” looks at")
    assert [int(index) for index, _ in said] == best.indices.tolist()[: len(said)]
    assert [float(share) for _, share in said] == pytest.approx(
        [100 * w for w in best.values.tolist()][: len(said)], abs=0.5
    )
    assert strokes(page) == int((own[0, 0, 2] >= 0.02).sum())
    page.locator("[data-role=key][data-token='4']").hover()
    assert "is looked at by" in readout(page)
    assert strokes(page) == int((own[0, 0, :, 4] >= 0.02).sum())
    page.locator("h1").hover()
    assert readout(page) == ""
    assert strokes(page) == drawn


def test_a_heatmap_is_the_weights(opened: Any) -> None:
    own = weights(6, 6)
    page = opened(page_of(own, tokens(6)).html())
    view(page, "Heatmap")
    page.locator("[data-key=head-2-3]").click()
    cell = page.locator("rect[data-query='1'][data-key-token='5']")
    expected = float(own[2, 3, 1, 5])
    assert float(cell.get_attribute("fill-opacity")) == pytest.approx(expected**0.6, abs=0.01)
    cell.hover()
    said = re.search(r"1 “·cat” gives 5 “·the” ([\d.]+) %", readout(page))
    assert said
    assert float(said[1]) == pytest.approx(100 * expected, abs=0.6)


def test_heads_are_chosen_by_mouse_and_keyboard(opened: Any) -> None:
    page = opened(full_page().html())
    assert shown(page)["heads"] == [[1, 2]]  # the first finding's
    page.locator("[data-key=head-0-0]").click()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    assert shown(page)["heads"] == [[1, 1]]
    page.keyboard.press("Shift+ArrowRight")
    assert shown(page)["heads"] == [[1, 1], [1, 2]]
    page.locator("[data-key=head-1-1]").click(modifiers=["Shift"])
    assert shown(page)["heads"] == [[1, 2]]
    page.keyboard.press("]")
    page.keyboard.press("}")
    assert shown(page)["heads"] == [[2, 3]]
    page.keyboard.press("]")
    page.keyboard.press("{")
    assert shown(page)["heads"] == [[0, 2]]
    page.locator(".picker svg text[role=rowheader]").nth(1).click()
    assert shown(page)["heads"] == [[1, 0], [1, 1], [1, 2], [1, 3]]
    page.get_by_label("shaded by").select_option("second")
    assert "0.50" in page.locator("[data-key=head-0-0]").get_attribute("aria-label")
    # A head that has no such value says none.
    assert page.locator("[data-key=head-0-2]").get_attribute("aria-label").endswith("head 2")


def test_what_to_look_for_leads_there(opened: Any) -> None:
    page = opened(full_page(80).html())
    assert page.get_by_text("No head does.").is_visible()
    page.get_by_role("button", name="0.1", exact=True).click()
    state = shown(page)
    assert (state["stack"], state["heads"], state["pinned"]) == (
        0,
        [[0, 1]],
        {"role": "query", "index": 79},
    )
    assert page.locator("[data-role=query][data-token='79']").is_visible()
    best = int(weights(80, 80)[0, 1, 79].argmax())
    assert page.locator(f"[data-role=key][data-token='{best}']").is_visible()
    page.get_by_role("button", name="2.0", exact=True).click()
    page.wait_for_function("document.querySelector('polyhead-inside').shown.stack === 1")
    page.locator(".lines").wait_for()
    assert readout(page).startswith("3 “⏎”")


def test_a_token_is_held_and_let_go(opened: Any) -> None:
    page = opened(page_of(weights(8, 8), WORDS).html())
    page.locator("[data-role=query][data-token='5']").click()
    page.locator("h1").hover()
    assert readout(page).startswith("5 “·the” looks at")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert shown(page)["pinned"] == {"role": "query", "index": 6}
    page.keyboard.press("Escape")
    assert shown(page)["pinned"] is None


def test_search_finds_and_goes_on(opened: Any) -> None:
    page = opened(page_of(weights(120, 120, 1, 1), tokens(120)).html())
    page.keyboard.press("Tab")
    page.locator("[data-key=head-0-0]").focus()
    page.keyboard.press("/")
    page.keyboard.type("MAT")
    expected = [i for i, token in enumerate(tokens(120)) if "mat" in token]
    assert page.get_by_text(f"{len(expected)} found").is_visible()
    for index, key in ((0, "Enter"), (1, "Enter"), (2, "Enter"), (1, "Shift+Enter"), (2, "Enter")):
        page.keyboard.press(key)
        assert shown(page)["pinned"] == {"role": "query", "index": expected[index]}
        assert page.locator(f"[data-role=query][data-token='{expected[index]}']").is_visible()
    for _ in expected[3:]:
        page.keyboard.press("Enter")
    assert page.locator(f"[data-role=query][data-token='{expected[-1]}']").is_visible()
    page.keyboard.press("Enter")
    assert shown(page)["pinned"]["index"] == expected[0]
    assert page.locator(".token.found").count() > 0


def test_long_texts_come_by_window(opened: Any) -> None:
    page = opened(page_of(weights(300, 300, 2, 2), tokens(300)).html())
    first = lambda: shown(page)["first"]  # noqa: E731
    assert page.locator(".lines [data-role=query]").count() == 32
    slider = page.get_by_role("slider")
    slider.focus()
    page.keyboard.press("End")
    assert first() == {"query": 268, "key": 268}
    assert page.locator("[data-role=key][data-token='299']").is_visible()
    page.keyboard.press("PageUp")
    page.keyboard.press("ArrowRight")
    assert first()["key"] == 237
    box = slider.bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + 5)
    assert abs(first()["key"] + 16 - 150) <= 2
    # What lies beyond the window is told, and leads there.
    page.locator("[data-role=query][data-token='150']").click()
    further = page.locator(".further")
    shares = weights(300, 300, 2, 2)[0, 0, 150]
    begin = first()["key"]
    expected = float(shares[:begin].sum() + shares[begin + 32 :].sum())
    said = [float(share.split(" %")[0]) for share in further.all_text_contents()]
    assert sum(said) == pytest.approx(100 * expected, abs=1.5)
    page.get_by_label("both sides move together").uncheck()
    assert page.get_by_role("slider").count() == 2
    page.get_by_role("slider").first.focus()
    page.keyboard.press("Home")
    assert first()["query"] == 0
    assert first()["key"] == begin


def test_the_keyboard_walks_a_heatmap_over_its_edge(opened: Any) -> None:
    page = opened(page_of(weights(90, 90, 1, 1), tokens(90)).html())
    view(page, "Heatmap")
    page.locator("svg.heatmap").focus()
    for _ in range(60):
        page.keyboard.press("ArrowDown")
    assert readout(page).startswith("60 “")
    assert page.locator("rect[data-query='60']").count() > 0


def test_pictures_take_the_weights_of_patches(opened: Any) -> None:
    page = opened(full_page().html())
    page.get_by_role("button", name="image").click()
    view(page, "Text")
    page.locator(".picture").wait_for()
    own = weights(5, 5, heads=2)[0, 0]
    page.locator(".patch[data-token='2']").hover()
    shares = own[2] / own[2].max()
    for index in range(1, 5):
        opacity = float(page.locator(f".patch[data-token='{index}']").get_attribute("fill-opacity"))
        assert opacity == pytest.approx(0.85 * float(shares[index]), abs=0.02)
    page.locator(".flow[data-token='0']").hover()
    assert readout(page).startswith("0 “[CLS]” looks at")


def test_the_lens_says_how_sure_a_layer_is(opened: Any) -> None:
    page = opened(full_page().html())
    view(page, "Lens")
    rows = page.locator(".lens .answer").all_text_contents()
    assert rows == ["no"] * 8 + ["yes"] * 8  # the last layer on top
    page.locator(".answer[data-layer='0'][data-place='2']").hover()
    assert readout(page) == "layer 0, after 2 “·sat”: “yes” 90 %, “no” 5.0 %"
    page.locator("svg.lens").focus()
    page.keyboard.press("ArrowRight")
    assert "after 3" in readout(page)


def test_a_page_without_attention_and_one_without_a_lens(opened: Any) -> None:
    full = full_page()
    only = opened(Page("lens", full.sides, lens=full.lens).html())
    assert only.locator(".lens").is_visible()
    assert opened(page_of(weights(4, 4), WORDS[:4]).html()).get_by_text("Lens").count() == 0


CUT = """(root) => [...root.querySelectorAll('svg')].flatMap((svg) => {
  const frame = svg.getBoundingClientRect();
  return [...svg.querySelectorAll('text')].filter((text) => text.textContent.trim()).map((text) => {
    const box = text.getBoundingClientRect();
    const out = Math.max(
      frame.left - box.left, frame.top - box.top,
      box.right - frame.right, box.bottom - frame.bottom);
    return [text.textContent, out];
  }).filter(([, out]) => out > 1.5);
})"""
OVERLAP = """(root) => {
  const boxes = [...root.querySelectorAll('svg.lines text, svg.heatmap text, svg.lens text')]
    .filter((text) => text.textContent.trim())
    .map((text) => [text.textContent, text.getBoundingClientRect()]);
  const found = [];
  for (let i = 0; i < boxes.length; i++) for (let j = 0; j < i; j++) {
    const [[one, a], [other, b]] = [boxes[i], boxes[j]];
    const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const tall = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    if (wide > 1.5 && tall > 4) found.push([one, other, wide, tall]);
  }
  return found;
}"""


@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("count", [5, 40, 400])
@pytest.mark.parametrize("width", [390, 1200])
def test_nothing_is_cut_or_overlaps(
    opened: Any, scale: int, theme: str, count: int, width: int
) -> None:
    names = [
        f" averylongtokenindeed{i}" if i % 3 == 0 else token
        for i, token in enumerate(tokens(count))
    ]
    full = full_page(count)
    made = Page(full.title, [Side(names), *full.sides[1:]], full.stacks, full.findings, full.lens)
    page = opened(made.html(), width, color_scheme=theme, device_scale_factor=scale)
    root = page.locator("polyhead-inside").evaluate_handle("(element) => element.shadowRoot")
    assert page.locator("polyhead-inside").get_attribute("theme") == theme
    for name in ("Lines", "Heatmap", "Text", "Lens"):
        view(page, name)
        if name == "Lines":
            page.locator("[data-role=query]").first.hover()
        assert root.evaluate(CUT) == []
        assert root.evaluate(OVERLAP) == []
        page_width = page.evaluate("document.documentElement.scrollWidth")
        assert page_width <= width, f"{name} makes the page {page_width} wide"


def test_contrast_of_words(opened: Any) -> None:
    """Of what is written on the page's ground, by WCAG: 4.5 to 1."""
    script = """(root) => {
      const light = (colour) => {
        const part = colour.match(/[\\d.]+/g).slice(0, 3).map((value) => {
          const share = value / 255;
          return share <= 0.03928 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
        });
        return 0.2126 * part[0] + 0.7152 * part[1] + 0.0722 * part[2];
      };
      const ground = light(getComputedStyle(root.host).backgroundColor);
      const words = '.hint, .lines text, summary, h3, .readout, .findings li';
      return [...root.querySelectorAll(words)].map((element) => {
        const style = getComputedStyle(element);
        const ink = light(element instanceof SVGElement ? style.fill : style.color);
        return [element.className, (Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05)];
      }).filter(([, ratio]) => ratio < 4.5);
    }"""
    for theme in ("light", "dark"):
        page = opened(full_page().html(), color_scheme=theme)
        root = page.locator("polyhead-inside").evaluate_handle("(element) => element.shadowRoot")
        assert root.evaluate(script) == []


def test_two_in_one_notebook(opened: Any) -> None:
    """Each output brings the component along; dark pages are seen as such."""
    one, other = page_of(weights(4, 4), WORDS[:4]), page_of(weights(6, 6), tokens(6))
    body = f"<body style='background: #111'>{one._repr_html_()}{other._repr_html_()}</body>"
    page = opened(f"<!doctype html><meta charset=utf-8>{body}")
    found = page.locator("polyhead-inside")
    assert found.count() == 2
    assert [found.nth(i).get_attribute("theme") for i in (0, 1)] == ["dark", "dark"]
    assert page.locator("polyhead-inside >> nth=1").locator("[data-role=query]").count() == 6
