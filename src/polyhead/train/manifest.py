"""What makes a directory a checkpoint: files on disk for good, a manifest, then the name."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polyhead.errors import FileError
from polyhead.files.disk import atomic_file, sync_directory
from polyhead.train.ranks import Ranks

MANIFEST, FORMAT = "manifest.json", 2
ALONE = Ranks()


def name_checkpoint(temp: Path, final: Path, files: Mapping[str, Any]) -> None:
    """Give what is written its name, and `latest` that of it, each durable before the next."""
    for folder in [*(path for path in temp.rglob("*") if path.is_dir()), temp]:
        sync_directory(folder)
    said = json.dumps({"format": FORMAT, "files": dict(sorted(files.items()))}, indent=1)
    with atomic_file(temp / MANIFEST) as file:
        file.write(said.encode())
    if final.exists():  # an undone write after `latest` was turned back, or a rerun
        shutil.rmtree(final)
    temp.rename(final)
    sync_directory(final.parent)
    with atomic_file(final.parent / "latest") as file:
        file.write(final.name.encode())


def sync_files(folder: Path, mine: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Flush files to disk, and what the manifest says of them."""
    for name in mine:
        with open(folder / name, "rb+") as file:
            os.fsync(file.fileno())
    return hashes(folder, mine)


def verify(checkpoint: Path, ranks: Ranks = ALONE) -> None:
    """FileError unless every file is as the manifest says; of several ranks each reads some."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        version, files = int(manifest["format"]), dict(manifest["files"])
        mine = sorted(files)[ranks.rank :: ranks.world]
        found = hashes(checkpoint, [name for name in mine if (checkpoint / name).is_file()])
    except (OSError, ValueError, KeyError, TypeError):
        raise FileError(f"{checkpoint}: no checkpoint (its manifest cannot be read)") from None
    if version > FORMAT:
        raise FileError(
            f"{checkpoint}: has format {version}, and this polyhead reads up to {FORMAT}: use the "
            "one that wrote it, or a newer one"
        )
    for name in mine:
        if found.get(name) != files[name]:
            fault = "was altered" if name in found else "is missing"
            raise FileError(f"{checkpoint}: {name} {fault}: remove this checkpoint, use an older")


def files_below(folder: Path) -> set[str]:
    """Every file below a folder but the manifest, by its path there."""
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.name != MANIFEST
    }


def hashes(folder: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of files."""
    entries = {}
    for name in names:
        with open(folder / name, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        entries[name] = {"size": (folder / name).stat().st_size, "sha256": digest}
    return entries
