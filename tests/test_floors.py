"""The house holds: a file imports only from its own folder and from lower floors."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "polyhead"
FLOORS = {
    "errors": -1,
    "__version__": -1,
    "nn": 0,
    "text": 0,
    "files": 0,
    "images": 0,
    "models": 1,
    "adapt": 3,
    "compress": 2,
    "explain": 2,
    "export": 2,
    "kernels": 3,
    "generate": 4,
    "train": 5,
    "tasks": 5,
    "serve": 6,
    "cli": 7,
}
FACADE = 6  # `import polyhead` reaches everything below the command line, which alone may use it
WITHOUT_TORCH = ("polyhead", "polyhead.generate.config", "polyhead.train.config")
LONGEST = {"models": 250, "nn": 250}
SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE)


def imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Modules that any import statement below `tree` names, with the names taken from them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: -(node.level - 1) or None] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def folder(module: str) -> str:
    """The part of the house that a module of Polyhead's lies in."""
    return module.split(".")[1] if "." in module else ""


def complaints(source: str, place: str) -> list[str]:
    """What a file of the folder `place` imports that it may not."""
    wrong: list[str] = []
    for name in imports(ast.parse(source), f"polyhead.{place}"):
        root = name.split(".")[0]
        if root == "polyhead":
            there = folder(name)
            if there != place and FLOORS.get(there, FACADE) >= FLOORS[place]:
                wrong.append(name)
            if place == "nn" and there != "nn":
                wrong.append(name)
        elif place == "nn" and root != "torch" and root not in sys.stdlib_module_names:
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_from_lower_floors(path: Path) -> None:
    place = path.relative_to(PACKAGE).parts[0]
    assert place in FLOORS, f"{place} stands on no floor: give it one in FLOORS"
    assert complaints(path.read_text(), place) == []


@pytest.mark.parametrize(
    ("source", "place", "wrong"),
    [
        ("import torch\nimport math\nfrom polyhead.nn.mask import Mask", "nn", []),
        ("import numpy", "nn", ["numpy"]),
        ("from polyhead.errors import ConfigError", "nn", ["polyhead.errors.ConfigError"]),
        ("from polyhead.errors import ConfigError", "text", []),
        ("from polyhead.nn.mask import Mask", "text", ["polyhead.nn.mask.Mask"]),
        ("from polyhead.files.hub import resolve", "models", []),
        ("from polyhead.generate import config", "models", ["polyhead.generate.config"]),
        ("def f():\n    import polyhead.train.loop", "generate", ["polyhead.train.loop"]),
        ("from ..train import loop", "tasks", ["polyhead.train.loop"]),
        ("from .loop import Trainer", "train", []),
        ("from ..generate.config import X", "cli", []),
        ("from polyhead import cli", "cli", []),
        ("from polyhead import load", "serve", ["polyhead.load"]),
        ("import polyhead as ph", "train", ["polyhead"]),
        ("import polyhead as ph\nfrom polyhead import __version__, load", "cli", []),
        ("from polyhead.unheard.of import thing", "serve", ["polyhead.unheard.of.thing"]),
    ],
)
def test_the_check_sees(source: str, place: str, wrong: list[str]) -> None:
    assert complaints(source, place) == wrong


def needed(module: str) -> Iterator[tuple[str, str]]:
    """Everything from outside the standard library that importing `module` runs, and who asks."""
    waiting, met = [module], set[str]()
    while waiting:
        name = waiting.pop()
        parents = [name.rsplit(".", depth)[0] for depth in range(name.count(".") + 1)]
        for one in parents:
            path = PACKAGE.parent / Path(*one.split("."))
            source = next(
                (p for p in (path.with_suffix(".py"), path / "__init__.py") if p.exists()), None
            )
            if one in met or source is None:
                continue
            met.add(one)
            # What stands in a function is imported when it is called, not before.
            for statement in at_import(ast.parse(source.read_text()).body):
                for found in imports(statement, one):
                    root = found.split(".")[0]
                    if root == "polyhead":
                        waiting.append(found)
                    elif root not in sys.stdlib_module_names:
                        yield root, one


def at_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The import statements that run when a module is imported."""
    for statement in body:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            yield statement
        elif isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
            yield from at_import(statement.orelse)
        elif not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            inner = (getattr(statement, name, []) for name in ("body", "orelse", "finalbody"))
            for block in inner:
                yield from at_import(block)


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_what_help_needs_is_the_standard_library_alone(module: str) -> None:
    assert list(needed(module)) == []


def test_the_closure_reaches_torch_where_it_is_needed() -> None:
    assert ("torch", "polyhead.nn.attend") in needed("polyhead.models.llama")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_are_short(path: Path) -> None:
    limit = LONGEST.get(path.relative_to(PACKAGE).parts[0], 400)
    assert len(path.read_text().splitlines()) <= limit
