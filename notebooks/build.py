"""Runs the notebooks: `make notebooks`, or `make notebooks ARGS="--check attention"`.

A notebook is a script in jupytext's percent format, and beside it what Jupyter opens, with the
outputs of a run. --check runs them, writes nothing, and fails where the pair does not say the same.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError

HERE = Path(__file__).parent
LONGEST_S = 600  # of one cell; a whole notebook is made to take two minutes on two idle cores


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="some of them, by part of the name; else all")
    parser.add_argument("--check", action="store_true", help="run and compare; write nothing")
    given = parser.parse_args()
    sources = [
        path
        for path in sorted(HERE.glob("[0-9]*.py"))
        if not given.names or any(name in path.stem for name in given.names)
    ]
    if not sources:
        sys.exit(f"no notebook is called {', '.join(given.names)}")
    failed = [path.stem for path in sources if not build(path, given.check)]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def build(path: Path, check: bool) -> bool:
    """Run one; whether it ran and, where that is asked, says what its pair says."""
    notebook = jupytext.read(path)
    notebook.metadata = {
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
        "language_info": {"name": "python"},
    }
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook, timeout=LONGEST_S, kernel_name="python3",
            resources={"metadata": {"path": folder}},
            extra_arguments=["--log-level=ERROR"],
        )  # fmt: skip
        try:
            client.execute()
        except (CellExecutionError, CellTimeoutError) as error:
            print(f"{path.stem}: {error}", file=sys.stderr)
            return False
    print(f"{path.stem}: {time.perf_counter() - began:.0f} s", flush=True)
    pair = path.with_suffix(".ipynb")
    if check:
        return same(notebook, pair)
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not is_progress(output)]
    nbformat.write(notebook, pair)
    return True


def is_progress(output: nbformat.NotebookNode) -> bool:
    """Whether it tells how far something is, which is of no use once it is done."""
    told = output.get("data", {}).get("text/plain", "")
    return output.get("name") == "stderr" or told.startswith("step ")


def same(notebook: nbformat.NotebookNode, pair: Path) -> bool:
    """Whether the pair has the same cells; outputs may differ from machine to machine."""
    if not pair.exists():
        print(f"{pair.name} is missing; run make notebooks", file=sys.stderr)
        return False
    theirs = nbformat.read(pair, as_version=4)
    cells = [[(cell.cell_type, cell.source) for cell in one.cells] for one in (notebook, theirs)]
    if cells[0] != cells[1]:
        print(f"{pair.name} differs from its script; run make notebooks", file=sys.stderr)
    return cells[0] == cells[1]


if __name__ == "__main__":
    sys.exit(main())
