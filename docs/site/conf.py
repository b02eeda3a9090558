"""Sphinx's settings; docs/build.py lays out the pages that it reads."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

project = "Polyhead"
extensions = [
    "myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "sphinx_copybutton",
    "diagrams", "docstrings",
]  # fmt: skip
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb"}
exclude_patterns = ["site"]

html_theme = "furo"
html_title = "Polyhead"
html_static_path = ["static"]
html_show_copyright = False
html_copy_source = False

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
myst_fence_as_directive = ["mermaid"]
nb_execution_mode = "off"  # `make notebooks` has run them
nb_merge_streams = True

autodoc_mock_imports = ["lm_eval"]  # an extra that no other page needs
autodoc_inherit_docstrings = False  # torch's are written for torch's site
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
toc_object_entries = False  # each page would copy thousands of them
python_maximum_signature_line_length = 80


def setup(app):
    """Sphinx calls this: modules whose source no page shows are not listed among those."""

    def forget(app):
        found = getattr(app.env, "_viewcode_modules", {})
        for name in [name for name, source in found.items() if not source]:
            del found[name]
        return []

    app.connect("html-collect-pages", forget, priority=100)


copybutton_prompt_text = r"\$ "
