"""A real browser: Debian's chromium, or what POLYHEAD_CHROMIUM names."""

import os
import shutil
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


@pytest.fixture(scope="session")
def browser() -> Generator[Any]:
    path = os.environ.get("POLYHEAD_CHROMIUM") or shutil.which("chromium")
    if path is None:
        pytest.skip("there is no chromium on this machine; POLYHEAD_CHROMIUM names another")
    playwright = pytest.importorskip("playwright.sync_api").sync_playwright().start()
    launched = playwright.chromium.launch(executable_path=path, args=FLAGS)
    yield launched
    launched.close()
    playwright.stop()


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Opens a page's HTML in a window; whatever the console says of errors fails the test."""
    errors: list[str] = []
    contexts: list[Any] = []

    def open_page(html: str, width: int = 1200, height: int = 1000, **options: Any) -> Any:
        path = tmp_path / f"page{len(contexts)}.html"
        path.write_text(html, "utf-8")
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda said: said.type == "error" and errors.append(said.text))
        page.goto(path.as_uri())
        page.locator("polyhead-inside main").first.wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert errors == []
