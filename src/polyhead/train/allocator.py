"""How the C library hands out a CPU's memory while a model trains."""

import contextlib
import ctypes
import sys
from functools import cache
from pathlib import Path

import torch

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's malloc.h


@cache
def keep_freed_memory() -> None:
    """Let this process keep what it frees, for what it asks for next.

    A step frees and asks for the same large tensors again and again; handing each back to the
    system, and taking a page fault for every 4 KiB of the next, is a tenth of its time. Does
    nothing where the C library is not glibc.
    """
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_MMAP_MAX, 0)


def forget_peak() -> None:
    """Hand what is free back to the system, and let the peak of memory begin from here.

    So runs of one process can be told apart. Does nothing to a CPU's peak where the system is not
    Linux with glibc.
    """
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
