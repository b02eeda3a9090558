"""Lines of JSON that outlive a kill, and beside them what they are of."""

import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from polyhead.errors import FileError
from polyhead.files.disk import atomic_file
from polyhead.files.jsons import read_json


class Journal:
    """The records of some work in a file, a line each, that are there as soon as they are added.

    about: a file beside it that says what the work is. Opened for the same work, it goes on after
    its last whole line; what a kill left behind of another is cut off. kind: what errors call the
    work. Errors: FileError where the files are of other work, unless `force`, which begins anew.
    """

    def __init__(
        self, path: Path, about: Path, identity: Mapping[str, Any], *, kind: str, force: bool
    ) -> None:
        self.path = path
        identity = json.loads(json.dumps(identity))
        if about.exists() and not force:
            before = read_json(about)
            if before != identity:
                keys = dict.fromkeys([*identity, *before])
                other = [key for key in keys if identity.get(key) != before.get(key)]
                raise FileError(
                    f"{path} is of another {kind} ({', '.join(other)}); choose another place, or "
                    "use force"
                )
            self._cut_off()
        elif not force and path.exists() and path.stat().st_size:
            raise FileError(f"{path} is in the way; choose another place, or use force")
        else:
            if path.exists():
                path.write_bytes(b"")
            with atomic_file(about) as file:
                file.write(f"{json.dumps(identity, indent=2)}\n".encode())

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The records. Errors: FileError for lines that are none."""
        if self.path.exists():
            with self.path.open("rb") as file:
                yield from map(self._record, file)

    def add(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Write some more."""
        lines = "".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in records)
        try:
            with self.path.open("ab") as file:
                file.write(lines.encode())
        except OSError as error:
            raise FileError(
                f"cannot write {self.path}: {error.strerror}; what is there stays, and the same "
                "run goes on from it"
            ) from None

    def sort(self, key: Callable[[Mapping[str, Any]], int]) -> None:
        """Put the lines in order, at once or not at all."""
        keys, ends = array("q"), array("q", [0])
        with self.path.open("rb") as file:
            for line in file:
                keys.append(key(self._record(line)))
                ends.append(ends[-1] + len(line))
            order = sorted(range(len(keys)), key=keys.__getitem__)
            if order == list(range(len(keys))):
                return
            with atomic_file(self.path) as target:
                for at in order:
                    file.seek(ends[at])
                    target.write(file.read(ends[at + 1] - ends[at]))

    def _record(self, line: bytes) -> dict[str, Any]:
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise FileError(
                f"{self.path} holds lines that are no JSON objects; delete it, or use force"
            )
        return found

    def _cut_off(self) -> None:
        """Remove what stands after the last line break."""
        if not self.path.exists():
            return
        with self.path.open("r+b") as file:
            whole = 0
            for line in file:
                whole += len(line) if line.endswith(b"\n") else 0
            file.truncate(whole)
