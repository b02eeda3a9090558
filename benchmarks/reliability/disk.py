"""Runs on a disk that fills up, and the same runs once there is room."""

import contextlib
import random
import shutil
import subprocess
from collections.abc import Generator
from pathlib import Path
from typing import Any

from benchmarks.reliability.child import TEXT
from benchmarks.reliability.runs import Progress, command, inside_a_write, left

from polyhead.train import checkpoint

SETTINGS = (
    *("--set", "d_model=32", "num_layers=2", "num_heads=2", "dropout=0.1"),
    *("--steps", 40, "--batch-size", 2, "--accumulate", 2, "--context", 32, "--warmup", 10),
    *("--log-every", 1, "--validate-every", 10, "--validate-batches", 2),
    *("--checkpoint-every", 7, "--sample-every", 0, "--device", "cpu"),
)
SIZE = 8 << 20


@contextlib.contextmanager
def small_disk(folder: Path) -> Generator[Path]:
    """A file system of SIZE bytes in memory: only a real one is full as a real one is."""
    folder.mkdir()
    made = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    done = subprocess.run(made, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{done.stderr.strip()}: start it as `unshare -Urm make reliability`")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def filled(folder: Path, rounds: int, world: int = 1) -> dict[str, Any]:
    """The disk has so many bytes left, drawn from none to all that a run takes."""
    text = folder / "text.txt"
    text.write_text(TEXT)
    words = ("train", text, *SETTINGS)
    said = folder / "said"
    assert command((*words, "--out", folder / "whole"), said, world).wait() == 0
    whole = left(folder / "whole")
    takes = sum(p.stat().st_size for p in (folder / "whole").rglob("*") if p.is_file())
    draw, codes, lines = random.Random(0), list[int](), set[str]()
    progress, faults = Progress(f"full disk on {world}", rounds), list[str]()
    with small_disk(folder / "disk") as disk:
        for number in range(rounds):
            run = disk / "run"
            fill(disk / "ballast", draw.randrange(int(1.4 * takes)))
            codes.append(command((*words, "--out", run), said, world).wait())
            last_line = Path(f"{said}.0").read_text().strip().splitlines()[-1]
            if codes[-1]:
                lines.add(last_line.replace(str(folder), ""))
            faults += [f"round {number}: {what}" for what in wrong(run, codes[-1], last_line)]
            (disk / "ballast").unlink()
            again = ("--out", run, "--resume")
            start = again if (run / "run.json").exists() else (*words[1:], *again)
            if command(("train", *start), said, world).wait() or left(run) != whole:
                faults.append(f"round {number}: {Path(f'{said}.0').read_text()[-300:]}")
            shutil.rmtree(run)
            progress(number + 1)
    return {
        "ok": not faults, "rounds": rounds, "disks_that_filled": sum(map(bool, codes)),
        "exit_codes": sorted(set(codes)), "faults": faults, "said": sorted(lines)[:40],
    }  # fmt: skip


def fill(ballast: Path, spare: int) -> None:
    """Leave so many bytes of the disk."""
    free = shutil.disk_usage(ballast.parent).free
    with open(ballast, "wb") as file:
        file.write(bytes(max(0, free - spare)))


def wrong(run: Path, code: int, said: str) -> list[str]:
    """What is not as it should be after a disk was full: the exit code, a half-written thing."""
    found = [] if code in (0, 2) else [f"exit code {code}: {said}"]
    if code and not said.startswith("polyhead: "):
        found.append(f"said {said!r}")
    if inside_a_write(run):
        found.append("half a checkpoint")
    last = checkpoint.latest(run)
    if last is not None:
        checkpoint.verify(last)
    return found
