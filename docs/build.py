"""Builds the documentation as a site: `make docs`, then open build/docs/html/index.html.

The pages of docs/ are taken as they are, the notebooks with what they showed when they were last
run, a page of every verb's --help, and one for each folder of the package from its docstrings.
Where a page names a file of the package, it links to that. A warning is an error.
"""

import contextlib
import importlib.util
import io
import pkgutil
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import polyhead
from polyhead.cli.main import main as run_command

DOCS = Path(__file__).parent
ROOT = DOCS.parent
OUT = ROOT / "build" / "docs"
FLOORS = (
    "nn", "text", "images", "files", "models", "compress", "explain", "export", "adapt", "kernels",
    "generate", "train", "tasks", "serve",
)  # fmt: skip
FENCE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)
FILE = re.compile(rf"(?<!\[)`(?:polyhead/)?((?:{'|'.join(FLOORS)})/[\w/]+)\.py`")


def main() -> int:
    """Lay out the source, and build it; the exit status of Sphinx."""
    source = OUT / "source"
    shutil.rmtree(OUT, ignore_errors=True)
    shutil.copytree(DOCS, source, ignore=shutil.ignore_patterns("build.py", "__pycache__"))
    for name in ("CHANGELOG", "CONTRIBUTING"):
        text = (ROOT / f"{name}.md").read_text(encoding="utf-8")
        write(source / f"{name.lower()}.md", text.replace("](docs/", "]("))
    shutil.copy(ROOT / "build" / "mermaid.min.js", source / "site" / "static")
    for path in source.rglob("*.md"):
        write(path, linked(path.read_text(encoding="utf-8"), len(path.relative_to(source).parts)))
    write_notebooks(source / "notebooks")
    write_commands(source / "commands.md")
    write_api(source / "api")
    words = ["-m", "sphinx", "-b", "html", "-c", str(source / "site"), "-j", "2"]
    words += ["-W", "--keep-going", "-q", str(source), str(OUT / "html")]
    code = subprocess.run([sys.executable, *words], check=False).returncode
    if code == 0:
        print(f"the site: {(OUT / 'html' / 'index.html').relative_to(ROOT)}")
    return code


def write(path: Path, text: str) -> None:
    """The text of a page."""
    path.write_text(text, encoding="utf-8")


def linked(text: str, depth: int) -> str:
    """A page `depth` - 1 folders down, with links from the files that it names to their docs.

    Links to notebooks, which lie beside docs/ in the sources, are to their pages in the site.
    """
    text = text.replace(f"]({'../' * depth}notebooks/", f"]({'../' * (depth - 1)}notebooks/")

    def link(match: re.Match[str]) -> str:
        module = f"polyhead.{match[1].replace('/', '.')}"
        if importlib.util.find_spec(module) is None:
            return match[0]
        page, anchor = match[1].partition("/")[0], module.replace(".", "")
        return f"[{match[0]}]({'../' * (depth - 1)}api/{page}.md#{anchor})"

    parts = FENCE.split(text)
    return "".join(part if part.startswith("```") else FILE.sub(link, part) for part in parts)


def write_notebooks(folder: Path) -> None:
    """Those of notebooks/, whose links to docs/ are to the pages here."""
    folder.mkdir()
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        write(folder / path.name, path.read_text(encoding="utf-8").replace("](../docs/", "](../"))


def write_commands(path: Path) -> None:
    """What `--help` says of every verb."""
    told = helped()
    verbs = re.findall(r"^  (\w+)  ", told[: told.index("examples:")], re.MULTILINE)
    text = ["# Commands", "", "```text", told, "```", ""]
    for verb in verbs:
        text += [f"## polyhead {verb}", "", "```text", helped(verb), "```", ""]
    write(path, "\n".join(text))


def helped(*verb: str) -> str:
    """What a verb, or all of it, says of itself."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.suppress(SystemExit):
        run_command([*verb, "--help"])
    return told.getvalue().strip()


def write_api(folder: Path) -> None:
    """A page for each folder of the package, and one of what `import polyhead as ph` has."""
    folder.mkdir()
    for floor in FLOORS:
        write(folder / f"{floor}.md", page_of(import_module(f"polyhead.{floor}")))
    homes: dict[str, str] = polyhead._HOMES
    rows = [f"| `ph.{name}` | {{py:obj}}`polyhead.{homes[name]}.{name}` |" for name in homes]
    text = ["# The API", "", "What `import polyhead as ph` brings, and where it is:", ""]
    text += [
        "| name | is |",
        "|---|---|",
        *sorted(rows),
        "",
        "```{toctree}",
        ":hidden:",
        *FLOORS,
        "```",
    ]
    write(folder / "index.md", "\n".join(text))


def page_of(package: ModuleType) -> str:
    """Every file of a folder, by its docstrings."""
    found = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    text = [f"# {package.__name__}", "", package.__doc__ or "", ""]
    for name in sorted(module.name for module in found if not module.ispkg):
        text += [f"## {name}", "", "```{eval-rst}", f".. automodule:: {name}", "   :members:"]
        text += ["   :show-inheritance:", "   :ignore-module-all:", "```", ""]
    return "\n".join(text)


if __name__ == "__main__":
    sys.exit(main())
