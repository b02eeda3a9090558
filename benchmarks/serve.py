"""Tokens over HTTP: a closed loop of clients, beside the engine itself in one process.

python -m benchmarks.serve [MODEL] [--clients 1 8 32] [--seconds 20] [--json]

Each client asks again as soon as its answer has ended: a prompt of its own, 48 to 80 tokens drawn
greedily, streamed, so that prompts are read while others write. The clients are one process of
their own, which reads sockets and no more, and shares the machine with the server. The engine does
the same requests with nothing between.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

WORDS = (
    "the with statement wraps the execution of a block with methods defined by a manager ".split()
)


@dataclass(frozen=True)
class Row:
    """What was measured of one number of clients: tokens a second, and milliseconds."""

    what: str
    clients: int
    tokens_per_second: float
    first_p50: float
    first_p99: float
    between_p50: float
    between_p99: float


def prompt_of(number: int) -> str:
    """Some 60 tokens; no two alike from the beginning on."""
    words = [WORDS[(number * 7 + i * (1 + number % 5)) % len(WORDS)] for i in range(48)]
    return f"{number} " + " ".join(words)


def length_of(number: int) -> int:
    """Tokens of an answer."""
    return 48 + 13 * number % 33


def row_of(
    what: str, clients: int, times: Sequence[Sequence[float]], tokens: int, seconds: float
) -> Row:
    """times: of each answer, when it was asked for and when each piece of it came."""
    first = [1000 * (answer[1] - answer[0]) for answer in times if len(answer) > 1]
    between = [1000 * gap for answer in times for gap in np.diff(answer[1:])]
    figures = [np.percentile(of, share) for of in (first, between) for share in (50, 99)]
    return Row(what, clients, tokens / seconds, *map(float, figures))


async def asked(url: str, model: str, number: int) -> list[float]:
    """One answer, read as it comes."""
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({
        "model": model, "prompt": prompt_of(number), "max_tokens": length_of(number),
        "temperature": 0, "stream": True, "ignore_eos": True,
    }).encode()  # fmt: skip
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    times = [began]
    async for line in reader:
        if line.startswith(b"data: {") and b'"finish_reason": null' in line:
            times.append(time.perf_counter())
        elif line.startswith(b"HTTP/1.1") and b" 200 " not in line:
            raise RuntimeError(line.decode())
    writer.close()
    return times


async def loop(
    ask: Callable[[int], Any], clients: int, seconds: float
) -> tuple[list[Any], int, float]:
    """Answers that ended, their tokens, and the seconds that they took together."""
    found: list[Any] = []
    tokens, began = 0, time.perf_counter()

    async def one(client: int) -> None:
        nonlocal tokens
        number = client
        while time.perf_counter() - began < seconds:
            found.append(await ask(number))
            tokens += length_of(number)
            number += clients

    await asyncio.gather(*(one(client) for client in range(clients)))
    return found, tokens, time.perf_counter() - began


def over_http(model: str, counts: Sequence[int], seconds: float) -> list[Row]:
    """Our server, in a process of its own."""
    flags = ["--port", "0", "--max-rows", "32", "--max-waiting", "64", "--cache-tokens", "16384"]
    words = [sys.executable, "-m", "polyhead.cli.main", "serve", f"served={model}", *flags]
    server = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    told = ""
    while "ready: " not in told:
        told += server.stderr.readline() or sys.exit(told)
    url = told.partition("listening at ")[2].partition(";")[0]
    with subprocess.Popen(["cat"], stdin=server.stderr, stdout=subprocess.DEVNULL):
        rows: list[Row] = []
        asyncio.run(loop(lambda n: asked(url, "served", n), max(counts), 2.0))  # warms up
        for clients in counts:
            measured = asyncio.run(loop(lambda n: asked(url, "served", n), clients, seconds))
            rows.append(row_of("http", clients, *measured))
        server.terminate()
        server.wait()
    return rows


def in_process(model: str, counts: Sequence[int], seconds: float) -> list[Row]:
    """The engine alone: an answer that ends is followed by the next."""
    import polyhead as ph
    from polyhead.serve.opening import Opening

    made, words = Opening().open(model, writes=True)
    engine = ph.Engine(made, words, ph.EngineConfig(max_rows=32, cache_tokens=16384))
    rows: list[Row] = []
    for clients, lasts in ((max(counts), 2.0), *((count, seconds) for count in counts)):
        rows.append(row_of("engine", clients, *driven(engine, clients, lasts)))
    return rows[1:]


def driven(engine: Any, clients: int, seconds: float) -> tuple[list[list[float]], int, float]:
    """What `loop` gives, of an engine."""
    import polyhead as ph

    times: list[list[float]] = []
    tokens, at_work, began = 0, 0, time.perf_counter()

    def add() -> None:
        nonlocal tokens, at_work
        own, number = [time.perf_counter()], len(times)
        times.append(own)
        tokens, at_work = tokens + length_of(number), at_work + 1
        most = length_of(number)
        config = ph.GenerationConfig(max_new_tokens=most, temperature=0, ignore_eos=True)
        engine.add(prompt_of(number), config, on_text=lambda _: own.append(time.perf_counter()))

    for _ in range(clients):
        add()
    while at_work:
        for _ in engine.step():
            at_work -= 1
            if time.perf_counter() - began < seconds:
                add()
    return times, tokens, time.perf_counter() - began


def main() -> None:
    """Measure and tell."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    rows = in_process(given.model, given.clients, given.seconds)
    rows += over_http(given.model, given.clients, given.seconds)
    if given.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
        return
    names = ("clients", "tokens/s", "first p50", "p99", "between p50", "p99")
    print(" " * 8 + "".join(f"{name:>12}" for name in names))
    for row in rows:
        what, clients, *figures = asdict(row).values()
        print(f"{what:<8}{clients:>12}" + "".join(f"{figure:>12.2f}" for figure in figures))


if __name__ == "__main__":
    main()
