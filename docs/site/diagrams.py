"""Fences of Mermaid become pictures in the reader's browser, by the copy of it in static/."""

from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive


class Mermaid(Directive):
    """The text of a diagram as it is."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        text = nodes.Text("\n".join(self.content)).astext()
        for sign, name in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
            text = text.replace(sign, name)
        return [nodes.raw("", f'<pre class="mermaid">{text}</pre>', format="html")]


def setup(app: Any) -> dict[str, bool]:
    """Sphinx calls this."""
    app.add_directive("mermaid", Mermaid)
    app.connect("html-page-context", _load)
    return {"parallel_read_safe": True}


def _load(app: Any, page: str, template: str, context: Any, doctree: nodes.document | None) -> None:
    if doctree is None:
        return
    if any("mermaid" in node.astext() for node in doctree.findall(nodes.raw)):
        app.add_js_file("mermaid.min.js")
        app.add_js_file("diagrams.js")
