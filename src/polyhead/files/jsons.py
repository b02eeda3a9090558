"""JSON files that came from elsewhere."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polyhead.errors import FileError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, empty where there is no file."""
    if not path.exists():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is not JSON: {error}; fetch it again") from None
    if not isinstance(data, dict):
        raise FileError(f"{path} holds a {type(data).__name__}, not an object; fetch it again")
    return data


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write an object with its keys sorted; what stands inside a key keeps its order."""
    # That may mean something: the first of several tasks.
    data = {key: data[key] for key in sorted(data)}
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
