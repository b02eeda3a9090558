"""JSON files that came from elsewhere."""

import json
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
