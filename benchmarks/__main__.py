"""Polyhead beside its peers, in warm processes that take turns.

    python -m benchmarks all
    python -m benchmarks all --peers llama.cpp,transformers --only 'decode-*' --pairs 9
    python -m benchmarks all --json docs/benchmarks.jsonl --write docs/benchmarks.md
    python -m benchmarks all --from docs/benchmarks.jsonl --write docs/benchmarks.md

Peers live in an environment of their own, which `make bench-peers` makes; any may be absent, and is
then a word in its row. The other benchmarks stand beside this one: python -m benchmarks.train, ...
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.peers.client import ROOT, AbsentError, FailedError
from benchmarks.peers.report import lines, machine, marked, read, write
from benchmarks.peers.rows import ROWS, chosen
from benchmarks.peers.worker import MODULES

PEERS = [name for name in MODULES if name not in ("machine", "polyhead")]


def main() -> int:
    """Measure rows, or tell of those measured before."""
    given = _arguments()
    try:
        rows = chosen(given.only)
        unknown = [peer for peer in given.peers if peer not in PEERS]
        if unknown:
            raise ValueError(f"no peer is called {unknown[0]!r}; there are {', '.join(PEERS)}")
        if given.write:
            marked(given.write)  # before an hour is spent
        records = read(given.recorded) if given.recorded else _measured(given, rows)
        if given.recorded:
            print("\n".join(line for record in records for line in lines(record)))
        if given.write:
            write(given.write, read(given.json) if given.json else records)
    except (ValueError, OSError) as error:
        _say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        _say("stopped; rows that were done are in --json")
        return 130
    return 0 if given.recorded or len(records) == len(rows) else 1


def _measured(given: argparse.Namespace, rows: list[Any]) -> list[dict[str, Any]]:
    """Rows one after the other, each kept and told when it is done."""
    from benchmarks.peers.inputs import Inputs
    from benchmarks.peers.measure import Settings, measure

    from polyhead.errors import PolyheadError

    settings = Settings(
        tuple(given.peers), given.pairs, given.seconds, given.threads,
        os.path.abspath(given.python), Inputs(given.folder.absolute()),
    )  # fmt: skip
    records: list[dict[str, Any]] = []
    began = time.monotonic()
    for number, row in enumerate(rows):
        left = (time.monotonic() - began) / number * (len(rows) - number) if number else None
        _say(
            f"row {number + 1} of {len(rows)}"
            + (f", about {left / 60:.0f} min left" if left else "")
        )
        try:
            found = machine() | measure(row, settings, _say)
        except (AbsentError, FailedError, PolyheadError) as error:
            _say(f"{row.name} is left out: {error}")
            continue
        records.append(found)
        if given.json:
            with given.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")
        print("\n".join(lines(found)), flush=True)
    return records


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("what", choices=["all"], help="all rows, or those of --only")
    own = ROOT / ".peers" / "bin" / "python"
    parser.add_argument(
        "--peers", type=_names, default=PEERS, help=f"of {', '.join(PEERS)} (default: all)"
    )
    parser.add_argument(
        "--only", type=_names, default=["*"],
        help=f"rows, by names or patterns: {', '.join(row.name for row in ROWS)}",
    )  # fmt: skip
    parser.add_argument("--pairs", type=int, default=9, help="of slices (default 9)")
    parser.add_argument("--seconds", type=float, default=2.0, help="least length of a slice")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each process")
    parser.add_argument(
        "--json", type=Path, help="append a line for each row here; --write tells of its last ones"
    )
    parser.add_argument("--write", type=Path, help="a Markdown file whose tables are replaced")
    parser.add_argument(
        "--from", dest="recorded", type=Path, help="measure nothing; rows are those of this --json"
    )
    parser.add_argument(
        "--python",
        default=str(own) if own.exists() else sys.executable,
        help="of the peers' environment (default: .peers, or this one)",
    )
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "runs" / "peers", help="for converted models"
    )
    given = parser.parse_args()
    if given.pairs < 1 or given.threads < 1 or given.seconds < 0:
        parser.error("--pairs and --threads are 1 or more, --seconds 0 or more")
    return given


def _names(given: str) -> list[str]:
    return [name.strip() for name in given.split(",") if name.strip()]


if __name__ == "__main__":
    sys.exit(main())
