"""Servers as users start them: a process of `polyhead serve` over a tiny model."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import polyhead as ph

for package in ("fastapi", "uvicorn", "openai", "httpx"):
    pytest.importorskip(package)

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@dataclass
class Server:
    """One that runs."""

    process: "subprocess.Popen[str]"
    url: str
    log: Path

    def end(self, sign: int = signal.SIGTERM) -> int:
        self.process.send_signal(sign)
        return self.process.wait(60)

    def workers(self) -> list[int]:
        """The processes that hold its models."""
        found = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [
            int(child)
            for child in found.split()
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()
        ]


Start = Callable[..., Server]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder over bytes that was taught nothing, with a chat template."""
    path = tmp_path_factory.mktemp("served") / "tiny"
    torch.manual_seed(0)
    tokenizer = ph.Tokenizer.train(["once upon a time"], kind="bytes")
    shape: dict[str, Any] = dict(d_model=32, num_layers=2, num_heads=4, max_seq_len=32_768)
    ph.build("gpt2", vocab_size=tokenizer.vocab_size, init_std=0.3, **shape).save(path)
    tokenizer.save(path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.fixture(scope="session")
def start(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts a server with these flags, and waits until it is ready."""
    with contextlib.ExitStack() as stack:

        def begin(*flags: str, models: Sequence[object] = (), waits: bool = True) -> Server:
            log = tmp_path_factory.mktemp("log") / "log.txt"
            words = [sys.executable, "-m", "polyhead.cli.main", "serve", f"tiny={folder}"]
            process = subprocess.Popen(
                [*words, *map(str, models), "--port", "0", *flags], text=True, stderr=log.open("w"),
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            stack.callback(process.wait)
            stack.callback(process.kill)
            told = until(lambda: said(log, "ready: " if waits else "listening"), process)
            return Server(process, told.partition("listening at ")[2].partition(";")[0], log)

        yield begin


def said(log: Path, words: str) -> str:
    """The whole of a log, once it has these words."""
    text = log.read_text()
    return text if words in text else ""


def until(found: Callable[[], Any], process: "subprocess.Popen[str] | None" = None) -> Any:
    """What is found, once there is something."""
    end = time.monotonic() + 90
    while time.monotonic() < end:
        if result := found():
            return result
        assert process is None or process.poll() is None, "the server ended"
        time.sleep(0.02)
    raise AssertionError("nothing came of it")


@pytest.fixture(scope="session")
def server(start: Start) -> Server:
    return start()
