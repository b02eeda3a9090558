"""What the recipes share: where data lies, how long a run may take, and how a figure is told."""

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"


def shared(name: str) -> Path:
    """A file of ../shared/data; where it is missing, the recipe says so and stops."""
    path = SHARED / name
    if not path.exists():
        sys.exit(f"this recipe reads {name}, which lies in ../shared/data beside the checkout")
    return path


def pairs(name: str) -> list[list[str]]:
    """The rows of a tab-separated file of `shared`."""
    lines = shared(name).read_text(encoding="utf-8").splitlines()
    return [line.split("\t") for line in lines if line.strip()]


def arguments(about: str | None, out: str, **more: Any) -> argparse.Namespace:
    """--out, --force and a recipe's own flags (name=default)."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--out", default=f"runs/{out}", help="run directory")
    parser.add_argument("--force", action="store_true", help="begin anew where a run is")
    for name, default in more.items():
        kind = type(default)
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default)
    return parser.parse_args()


def tell(recipe: str, began: float, **figures: Any) -> None:
    """The figures, with what they were measured on, as one line of JSON."""
    figures = {
        name: round(value, 4) if isinstance(value, float) else value
        for name, value in figures.items()
    }
    said = {
        "recipe": recipe,
        **figures,
        "minutes": round((time.perf_counter() - began) / 60, 1),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }
    print(json.dumps(said, ensure_ascii=False))


def best_of(fitted: dict[str, Any]) -> str:
    """The checkpoint to use: the best by the objective's metric, else the last."""
    return str(fitted.get("best") or fitted["checkpoint"])


def without(rows: Sequence[Sequence[str]], held: Sequence[Sequence[str]]) -> list[list[str]]:
    """Rows of which no field stands in a held-out row."""
    seen = {field for row in held for field in row}
    return [list(row) for row in rows if not seen & set(row)]
