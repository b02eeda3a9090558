"""What this machine reaches now: products of matrices, and reading memory."""

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from benchmarks.abba import product_gflops, seconds_a_call
from benchmarks.peers.job import Job, timed

_WORDS = 1 << 26  # half a gigabyte: more than any cache holds


def versions() -> dict[str, str]:
    """Of what computes here."""
    return {"torch": torch.__version__}


def ceilings() -> Job:
    """GFLOP/s of products in fp32 and bf16, GB/s of reading, each over half a second or more."""
    words = torch.zeros(_WORDS, dtype=torch.int64)
    read = _compiled() or (lambda address, count: words.sum())

    def answer() -> dict[str, float]:
        spent = seconds_a_call(lambda: read(words.data_ptr(), _WORDS), 0.5)
        return {
            "fp32_gflops": product_gflops(torch.float32),
            "bf16_gflops": product_gflops(torch.bfloat16),
            "gbytes": 8 * _WORDS / spent / 1e9,
        }

    return Job(lambda: timed(answer), answer)


def _compiled() -> Callable[[int, int], object] | None:
    """The sum in C: torch's own reads more slowly. None where nothing compiles it."""
    compiler = shutil.which(os.environ.get("CC") or "gcc")
    if compiler is None:
        return None
    source = Path(__file__).with_name("stream.c")
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "stream.so"
        flags = "-O3 -march=native -fopenmp -shared -fPIC".split()
        try:
            subprocess.run([compiler, *flags, str(source), "-o", str(built)], check=True)
            total = ctypes.CDLL(str(built)).total
        except (OSError, subprocess.CalledProcessError):
            return None
    total.argtypes, total.restype = [ctypes.c_void_p, ctypes.c_size_t], ctypes.c_uint64
    return total


JOBS: dict[str, Callable[..., Job]] = {"ceilings": ceilings}
