"""What the documentation's site is made of. `make docs` builds it, and takes no warning."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
DOCS, SOURCES = ROOT / "docs", ROOT / "src" / "polyhead"
FILE = re.compile(r"`(\w+/[\w/]+(?:\.py|/))`")
ROWS = [
    line
    for line in (DOCS / "terms.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and FILE.search(line)
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip()[:40])
def test_terms_lead_to_what_is_there(row: str) -> None:
    files = [SOURCES / name for name in FILE.findall(row) if name != "src/polyhead"]
    assert files
    assert all(file.exists() for file in files)
    texts = "\n".join(file.read_text(encoding="utf-8") for file in files if file.is_file())
    for match in re.finditer(r"`[\w/]+\.py`: ((?:`\w+`(?:, )?)+)", row):
        for name in re.findall(r"`(\w+)`", match[1]):
            assert re.search(rf"^(class|def) {name}\b", texts, re.MULTILINE), name


@pytest.mark.parametrize("folder", ["families", "parts"])
def test_every_page_is_in_its_table(folder: str) -> None:
    index = (DOCS / folder / "index.md").read_text(encoding="utf-8")
    pages = {path.name for path in (DOCS / folder).glob("*.md")} - {"index.md"}
    assert pages == set(re.findall(r"\]\((\w+\.md)\)", index))


def test_every_notebook_is_told_of() -> None:
    told = (DOCS / "notebooks.md").read_text(encoding="utf-8")
    stems = {path.stem for path in (ROOT / "notebooks").glob("[0-9]*.py")}
    assert stems == {path.stem for path in (ROOT / "notebooks").glob("[0-9]*.ipynb")}
    assert stems == set(re.findall(r"\]\(../notebooks/(\w+)\.ipynb\)", told))


def script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_docstrings_become_what_sphinx_reads() -> None:
    rewritten = script(DOCS / "site" / "docstrings.py").rewritten
    lines = """Attention by `H` heads (*a* | b_).

mask:  which keys
       count
bias:  none
Errors: ConfigError for
a name `x_`.

After that.

    y = x * 2""".splitlines()
    assert [line for line in rewritten(lines) if line] == [
        r"Attention by ``H`` heads (\*a\* \| b\_).",
        "* **mask**: which keys count",
        "* **bias**: none",
        "* **Errors**: ConfigError for a name ``x_``.",
        "After that.",
        "::",
        "       y = x * 2",
    ]


def test_files_that_pages_name_are_links() -> None:
    linked = script(DOCS / "build.py").linked
    text = "See `nn/attention.py`, `nn/no.py` and `polyhead/text/`.\n```text\n`nn/mask.py`\n```\n"
    assert linked(text, 2) == text.replace(
        "`nn/attention.py`", "[`nn/attention.py`](../api/nn.md#polyheadnnattention)"
    )
