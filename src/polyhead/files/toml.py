"""TOML files, read."""

import os
import tomllib
from pathlib import Path
from typing import Any

from polyhead.errors import FileError


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a TOML file says. Errors: FileError for one that is not there or is no TOML."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FileError(f"{path} is not TOML: {error}") from None
