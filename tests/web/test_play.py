"""The page of a server, clicked through in a real browser."""

import gzip
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")

from tests.serve.conftest import Server, Start, folder, start, until
from tests.tasks.test_images import vision
from tests.tasks.test_translate import make as make_pair
from tests.tasks.tiny import make

__all__ = ["folder", "start"]
AXE = Path(__file__).parents[2] / "web/node_modules/axe-core/axe.min.js"
LONG = "once upon a time"


@pytest.fixture(scope="module")
def server(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Server:
    place = tmp_path_factory.mktemp("play")
    make(place / "vectors", "none")
    make(place / "mood", "classify", labels=("bad", "good"))
    make(place / "fills", "lm")
    make(place / "squad", "answer")
    make_pair(place / "t5", "t5")
    vision(place / "vit")
    return start(models=sorted(place.iterdir()))


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens a view in a window of its own; whatever the console says of errors fails the test."""
    errors: list[str] = []
    contexts: list[Any] = []

    def open_view(server: Server, view: str = "chat", **options: Any) -> Any:
        context = browser.new_context(bypass_csp=True, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"{server.url}/#{view}")
        page.wait_for_selector('option:not([value=""])', state="attached")
        return page

    yield open_view
    for context in contexts:
        context.close()
    # What a server refuses is told on the page; the browser's own word on it is no error of ours.
    assert [error for error in errors if "Failed to load resource" not in error] == []


def say(page: Any, text: str) -> None:
    page.get_by_label("Your message").fill(text)
    page.keyboard.press("Enter")


def limit(page: Any, tokens: int, temperature: float = 0) -> None:
    page.get_by_label("Most tokens").fill(str(tokens))
    page.get_by_label("Temperature").fill(str(temperature))
    page.keyboard.press("Tab")


def answers(page: Any) -> list[str]:
    page.wait_for_selector("[aria-busy=true]", state="detached")
    return [each.strip() for each in page.locator("article.assistant .text").all_inner_texts()]


def accessible(page: Any) -> None:
    """Axe finds nothing serious."""
    if not AXE.is_file():
        pytest.skip("axe comes with make web")
    page.add_script_tag(path=str(AXE))
    found = page.evaluate("async () => (await axe.run()).violations")
    serious = [each for each in found if each["impact"] in ("serious", "critical")]
    told = [(each["id"], each["nodes"][0]["html"][:120]) for each in serious]
    assert told == []


def wanted(server: Server, tokens: int, *turns: str) -> str:
    roles = ["user", "assistant"] * len(turns)
    messages = [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)]
    body = {"model": "tiny", "messages": messages, "max_tokens": tokens, "temperature": 0}
    found = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
    return found["choices"][0]["message"]["content"].strip()


def seen(text: str) -> str:
    """As a page shows it: what cannot be seen left out."""
    return re.sub(r"[\s\x00-\x1f\x7f-\x9f]+", "", text)


def test_a_chat_with_a_reload_in_mid_stream(server: Server, visit: Callable[..., Any]) -> None:
    page = visit(server)
    limit(page, 6000)
    say(page, LONG)
    page.wait_for_selector("[aria-busy=true]")
    page.wait_for_timeout(400)
    page.reload()
    page.wait_for_selector("article.assistant")
    (whole,) = answers(page)
    assert seen(whole) == seen(wanted(server, 6000, LONG))
    page.reload()
    assert answers(page) == [whole]
    assert page.get_by_text("cut at the most tokens").count() == 1


def test_stopping_and_the_worker_hears_of_it(server: Server, visit: Callable[..., Any]) -> None:
    page = visit(server)
    limit(page, 30_000)
    say(page, LONG)
    page.get_by_role("button", name="Stop").click()
    assert len(answers(page)) == 1
    assert page.get_by_text("stopped").count() == 1
    held = 'vllm:num_requests_running{model_name="tiny"} 0.0'
    until(lambda: held in httpx.get(f"{server.url}/metrics").text)


def test_branches_search_and_files(
    server: Server, visit: Callable[..., Any], tmp_path: Path
) -> None:
    page = visit(server)
    limit(page, 5)
    say(page, "one")
    first = answers(page)
    assert first == [wanted(server, 5, "one")]
    say(page, "two")
    assert len(answers(page)) == 2
    page.get_by_role("button", name="Edit").first.click()
    page.get_by_label("Edit your message").fill("other")
    page.get_by_role("button", name="Send").first.click()
    page.get_by_text("2 of 2").wait_for()
    assert answers(page) == [wanted(server, 5, "other")]
    page.get_by_role("button", name="The version before").click()
    assert len(answers(page)) == 2
    page.get_by_role("button", name="Write again").last.click()
    page.get_by_text("2 of 2").last.wait_for()
    assert len(answers(page)) == 2
    with page.expect_download() as download:
        page.get_by_role("button", name="Export").click()
    saved = tmp_path / "talk.json"
    download.value.save_as(saved)
    assert len(json.loads(saved.read_text())["messages"]) == 7
    page.get_by_role("button", name="New chat", exact=True).click()
    assert page.locator("article").count() == 0
    page.get_by_label("Import a chat").set_input_files(saved)
    assert len(answers(page)) == 2
    (tmp_path / "bad.json").write_text('{"title": 3}')
    page.get_by_label("Import a chat").set_input_files(tmp_path / "bad.json")
    page.get_by_text("bad.json: This is no exported chat.").wait_for()
    titles = page.locator("aside li .title")
    assert titles.count() == 3
    page.get_by_label("Search chats").fill("OTHER")
    assert titles.count() == 2
    page.get_by_label("Search chats").fill("nothing of the kind")
    assert titles.count() == 0


def test_a_system_prompt_and_a_schema(server: Server, visit: Callable[..., Any]) -> None:
    pytest.importorskip("llguidance")
    page = visit(server)
    limit(page, 300, 1)
    page.get_by_role("button", name="New chat", exact=True).click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_text("JSON schema").click()
    page.get_by_label("Answers are JSON of this schema").fill('{"enum": ["yes", "no"]}')
    say(page, "well?")
    (answer,) = answers(page)
    assert json.loads(answer) in ("yes", "no")
    page.get_by_label("Answers are JSON of this schema").fill('{"type": ')
    say(page, "again")
    page.locator("article.assistant .error").wait_for()


def test_tokens_and_what_else_they_might_have_been(
    server: Server, visit: Callable[..., Any]
) -> None:
    page = visit(server, "complete")
    page.get_by_label("Most tokens").fill("12")
    page.get_by_role("button", name="Write").click()
    page.locator(".token").nth(11).wait_for()
    before = page.locator(".token").all_inner_texts()
    page.locator(".token").nth(2).click()
    others = page.locator("ul li button")
    texts = others.all_inner_texts()
    chosen = next(text for text in texts[1:] if text.isascii() and text.isprintable())
    others.nth(texts.index(chosen)).click()
    page.locator(".token").nth(14).wait_for()
    after = page.locator(".token").all_inner_texts()
    assert after[:2] == before[:2]
    assert after[2] == chosen
    assert len(after) == 15


def test_heads_of_the_live_model(server: Server, visit: Callable[..., Any]) -> None:
    page = visit(server, "inside")
    page.get_by_label("Text").fill("once upon once upon")
    page.get_by_role("button", name="Look", exact=True).click()
    page.locator("polyhead-inside .picker .cell").first.wait_for()
    assert page.locator("polyhead-inside svg").count() > 1
    page.get_by_label("Layers", exact=True).fill("nowhere")
    page.get_by_role("button", name="Look", exact=True).click()
    page.get_by_text("no attention is called 'nowhere'").wait_for()


@pytest.mark.parametrize(
    ("task", "shown"),
    [("Embed and compare", "td.cell"), ("Classify", ".score"), ("Fill", ".chip"),
     ("Answer", "p b"), ("Translate", "table[aria-label^=What]")],
)  # fmt: skip
def test_each_task(task: str, shown: str, server: Server, visit: Callable[..., Any]) -> None:
    page = visit(server, "tasks")
    page.get_by_role("button", name=task, exact=True).click()
    page.get_by_role("button", name="Run").click()
    page.locator(shown).first.wait_for()


def test_models_and_an_adapter_that_is_not_there(server: Server, visit: Callable[..., Any]) -> None:
    page = visit(server, "models")
    assert page.locator("tbody tr").count() == 7
    page.get_by_label("Directory below --adapters").fill("none")
    page.get_by_role("button", name="Load").click()
    page.get_by_text("started without --adapters").wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("view", ["chat", "complete", "inside", "tasks", "models"])
def test_anybody_can_read_it(
    view: str, width: int, scheme: str, server: Server, visit: Callable[..., Any]
) -> None:
    size = {"width": width, "height": 800}
    page = visit(server, view, viewport=size, color_scheme=scheme)
    if view == "chat":
        limit(page, 5)
        say(page, "one")
        answers(page)
    if view == "inside":
        page.get_by_role("button", name="Look", exact=True).click()
        page.locator("polyhead-inside .picker .cell").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    accessible(page)


def test_a_server_that_is_lost(start: Start, visit: Callable[..., Any]) -> None:
    server = start()
    page = visit(server)
    limit(page, 30_000)
    say(page, LONG)
    page.wait_for_selector("[aria-busy=true]")
    os.kill(*server.workers(), signal.SIGKILL)
    page.get_by_text("process ended and is started again").wait_for()
    server.end(signal.SIGKILL)
    page.get_by_text("The server does not answer").wait_for()
    say(page, "still there?")
    page.locator("article.assistant .error").nth(1).wait_for()


def test_a_key_is_asked_for_and_opens_it(start: Start, browser: Any, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("ann sesame\n")
    server = start("--keys", str(tmp_path / "keys"))
    for path in ("/", "/page.js", "/page.css"):
        assert httpx.get(server.url + path).status_code == 401
    asked = httpx.get(server.url, headers={"accept": "text/html"})
    assert asked.headers["www-authenticate"].startswith("Basic")
    basic = httpx.BasicAuth("anything", "sesame")
    assert httpx.get(server.url, auth=basic).status_code == 200
    other = httpx.get(server.url, auth=basic, headers={"sec-fetch-site": "cross-site"})
    assert other.status_code == 401
    context = browser.new_context(http_credentials={"username": "x", "password": "sesame"})
    page = context.new_page()
    page.goto(server.url)
    page.wait_for_selector('option:not([value=""])', state="attached")
    context.close()


def test_it_is_small_and_asks_nobody_else(server: Server, browser: Any) -> None:
    context = browser.new_context()
    page = context.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(server.url)
    page.wait_for_selector("nav")
    page.wait_for_timeout(300)
    context.close()
    local = [url for url in asked if url.startswith((server.url, "data:"))]
    assert local == asked
    files = [httpx.get(url).content for url in asked if url.startswith(server.url)]
    assert sum(len(gzip.compress(body)) for body in files) < 300_000
    page_js = httpx.get(f"{server.url}/page.js")
    again = httpx.get(f"{server.url}/page.js", headers={"if-none-match": page_js.headers["etag"]})
    assert again.status_code == 304
