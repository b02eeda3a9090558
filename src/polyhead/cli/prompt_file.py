"""`polyhead generate --file`: a file of prompts to a file of answers."""

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from polyhead.cli.common import note
from polyhead.cli.settings import with_own
from polyhead.cli.texts import print_json
from polyhead.cli.watch import Watch
from polyhead.errors import DataError, FileError

if TYPE_CHECKING:
    from polyhead.cli.generate import Args
    from polyhead.generate.config import GenerationConfig
    from polyhead.tasks.prompt_file.reading import PromptFile
    from polyhead.tasks.prompt_file.run import Progress

SOME_FAILED = 1
_EVERY = 10.0  # seconds between lines where there is no terminal


def answer_file(args: "Args", config: "GenerationConfig") -> int:
    """Answer and say how it went."""
    out, state = args.files.out, None
    if args.prompts or args.stream:
        other = "--stream" if args.stream else "prompts on the command line"
        raise DataError(f"--file and {other} do not go together; leave out one of them")
    with _opened(args.files.file, out) as prompts:
        model, tokenizer = args.opening.open(args.model, writes=True)
        from polyhead.kernels import pack
        from polyhead.tasks.prompt_file.run import PromptRun

        if model.device.type == "cpu":
            model = pack(model)
        run = PromptRun(
            model=model, tokenizer=tokenizer, raw=args.raw, system=args.system,
            config=with_own(config, args.given, model.generation), rows=args.files.rows,
        )  # fmt: skip

        def tell(now: "Progress") -> None:
            nonlocal state
            state = now
            speed = f"{now.tokens_per_second:.0f} tokens/s"
            watch(now.done, now.prompts, f"{now.done} of {now.prompts}  {speed}")

        try:
            with Watch("writing", every=_EVERY) as watch:
                if out is None:
                    state = run.stream(prompts, _print, tell)
                else:
                    state = run.to_file(prompts, out, force=args.files.force, tell=tell)
        except KeyboardInterrupt:
            if out is not None and state is not None:
                note(
                    f"stopped; {out} keeps {state.done} of {state.prompts} answers: the same "
                    "command goes on"
                )
            raise
    _sum_up(state, out, args.json)
    return SOME_FAILED if state.failed else 0


@contextmanager
def _opened(name: str, out: Path | None) -> "Iterator[PromptFile]":
    """The prompts; those of standard input are kept aside, for they are read twice."""
    from polyhead.tasks.prompt_file.reading import PromptFile

    if out is not None and out.exists() and Path(name).exists() and out.samefile(name):
        raise FileError(f"--out {out} is the file of prompts; choose another place")
    with tempfile.TemporaryFile() if name == "-" else _file(name) as file:
        if name == "-":
            shutil.copyfileobj(sys.stdin.buffer, file)
        yield PromptFile(file, name)


def _file(name: str) -> BinaryIO:
    try:
        return open(name, "rb")
    except OSError as error:
        raise FileError(f"cannot read {name}: {error.strerror}") from None


def _print(record: Any) -> None:
    print_json([record])
    sys.stdout.flush()


def _sum_up(state: "Progress", out: Path | None, as_json: bool) -> None:
    """What was done, on standard error; with --out and --json as an object on standard output."""
    if out is not None and as_json:
        said = {
            "out": str(out), "prompts": state.prompts, "done": state.done, "failed": state.failed,
            "tokens": state.tokens, "seconds": round(state.seconds, 3),
            "tokens_per_second": round(state.tokens_per_second, 1),
        }  # fmt: skip
        print(json.dumps(said))
        return
    failed = f", {state.failed} of them errors" if state.failed else ""
    where = "" if out is None else f"{out}: "
    speed = f"{state.tokens:,} tokens in {state.seconds:.1f} s, {state.tokens_per_second:.0f}/s"
    note(f"{where}{state.done} answers{failed}; {speed if state.seconds else 'all were there'}")
