"""A file of answers: a line is there as soon as it is known, and stays."""

import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from polyhead.errors import FileError
from polyhead.files.disk import locked
from polyhead.files.journal import Journal
from polyhead.files.jsons import read_json
from polyhead.generate.result import Generation
from polyhead.text.tokenizer import Tokenizer

SUFFIX = ".progress"


class Answers:
    """Answers in a file, by the lines that asked. done: those that are there; failed: how many of
    them are errors. seed: of what is drawn."""

    def __init__(self, path: Path, identity: Mapping[str, Any], force: bool) -> None:
        about = _beside(path)
        seed = identity["seed"]
        if seed is None and not force:
            seed = read_json(about).get("seed")
        self.seed: int = secrets.randbits(32) if seed is None else seed
        identity = {**identity, "seed": self.seed}
        self._journal = Journal(path, about, identity, kind="run", force=force)
        self.done: set[int] = set()
        self.failed = 0
        for record in self._journal:
            self.done.add(self._line(record))
            self.failed += "error" in record

    def add(self, record: Mapping[str, Any]) -> None:
        """Write one more."""
        self._journal.add([record])

    def sort(self) -> None:
        """Put them into the order of the prompts, at once or not at all."""
        self._journal.sort(self._line)

    def _line(self, record: Mapping[str, Any]) -> int:
        if not isinstance(line := record.get("line"), int):
            raise FileError(
                f"{self._journal.path} holds lines without a line number; delete it, or use force"
            )
        return line


@contextmanager
def open_answers(path: Path, identity: Mapping[str, Any], force: bool) -> Iterator[Answers]:
    """The answers of some work, those of an earlier run among them.

    identity: what tells the work from other; a seed of None is that of the earlier run, or drawn.
    force: begin anew. Errors: FileError for a file of other work, unless `force`; for one that
    holds something else; and while another process writes to it.
    """
    if path.is_dir():
        raise FileError(f"{path} is a directory; name a file for the answers")
    if path.exists() and path.stat().st_size and not _beside(path).exists():
        raise FileError(f"{path} is in the way, and no file of answers; choose another place")
    try:
        path.touch()
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror}; choose another place") from None
    with locked(path, "being written"):
        yield Answers(path, identity, force)


def answer_record(
    answers: Sequence[Generation], tokenizer: Tokenizer, several: bool = False
) -> dict[str, Any]:
    """What is said of a prompt's answer; several: of all its answers, the best first."""
    said = [_said(answer, tokenizer) for answer in answers]
    return {"texts": said} if several else said[0]


def _said(answer: Generation, tokenizer: Tokenizer) -> dict[str, Any]:
    found: dict[str, Any] = {
        "text": str(answer),
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "tokens": len(answer.token_ids),
    }
    if answer.score is not None:
        found["score"] = answer.score
    if answer.logprobs is not None:
        found["logprobs"] = [
            {
                "token": tokenizer.decode([row.token_id], skip_special_tokens=False),
                "logprob": row.logprob,
                "top": [[tokenizer.decode([i], skip_special_tokens=False), p] for i, p in row.top],
            }
            for row in answer.logprobs
        ]
    return found


def _beside(path: Path) -> Path:
    return path.with_name(path.name + SUFFIX)
