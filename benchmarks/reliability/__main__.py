"""The figures of docs/reliability.md that concern training.

Each campaign trains tiny models in processes of its own and compares what they leave, bit for bit,
with what a run left that nobody disturbed: every file of the checkpoint, and the log but for its
times. Exit code 1 where one of them is not as it should be.

    python -m benchmarks.reliability                     the CI tier of all, minutes
    python -m benchmarks.reliability all --long --json   the long tier, as records
    python -m benchmarks.reliability kill --rounds 50
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from benchmarks.reliability.disk import filled
from benchmarks.reliability.notfinite import injected
from benchmarks.reliability.repeated import repeated
from benchmarks.reliability.reshaped import reshaped
from benchmarks.reliability.stopped import killed, killed_in_writes, terminated


@dataclass(frozen=True)
class Campaign:
    """A figure, what measures it, and how many rounds each tier has."""

    figure: int
    run: Callable[[Path, int], dict[str, Any]]
    few: int
    many: int


CAMPAIGNS: Mapping[str, Campaign] = {
    "kill": Campaign(2, killed, 10, 200),
    "kill-in-writes": Campaign(2, killed_in_writes, 10, 200),
    "kill-two-ranks": Campaign(2, lambda f, n: killed(f, n, 2), 4, 200),
    "kill-in-writes-two-ranks": Campaign(2, lambda f, n: killed_in_writes(f, n, 2), 4, 100),
    "full-disk": Campaign(2, filled, 10, 200),
    "full-disk-two-ranks": Campaign(2, lambda f, n: filled(f, n, 2), 4, 50),
    "resharding": Campaign(3, reshaped, 2, 6),
    "terminate": Campaign(4, terminated, 5, 50),
    "not-finite": Campaign(5, injected, 1, 4),
    "repeat": Campaign(13, repeated, 3, 20),
}


def measured(name: str, rounds: int, tier: str) -> dict[str, Any]:
    """The record of a campaign."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found = CAMPAIGNS[name].run(Path(folder), rounds)
    return {
        "campaign": name, "figure": CAMPAIGNS[name].figure, "tier": tier, **found,
        "minutes": round((time.perf_counter() - began) / 60, 1), "date": date.today().isoformat(),
        "cores": os.cpu_count(), "system": platform.platform(terse=True),
        "python": platform.python_version(), "torch": torch.__version__,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reliability", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "campaigns", nargs="*", default=["all"], help=f"all, {', '.join(CAMPAIGNS)}"
    )
    parser.add_argument("--long", action="store_true", help="the rounds of the long tier")
    parser.add_argument("--rounds", type=int, help="so many rounds of each, in place of the tier's")
    parser.add_argument("--json", action="store_true", help="a JSON record a line")
    given = parser.parse_args()
    names = list(CAMPAIGNS) if "all" in given.campaigns else given.campaigns
    if unknown := sorted(set(names) - set(CAMPAIGNS)):
        parser.error(f"there is no campaign {unknown[0]!r}; there are all, {', '.join(CAMPAIGNS)}")
    warnings.filterwarnings("ignore")
    os.environ |= {"PYTHONWARNINGS": "ignore", "TORCH_CPP_LOG_LEVEL": "ERROR"}  # of the children
    tier, ok = "long" if given.long else "ci", True
    for name in names:
        campaign = CAMPAIGNS[name]
        rounds = given.rounds or (campaign.many if given.long else campaign.few)
        found = measured(name, rounds, f"{given.rounds} rounds" if given.rounds else tier)
        ok = ok and found["ok"]
        if given.json:
            print(json.dumps(found), flush=True)
            continue
        figures = "  ".join(f"{key} {value}" for key, value in found.items() if key != "campaign")
        print(f"{name}  {figures}", flush=True)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
