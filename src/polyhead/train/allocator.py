"""How the C library hands out a CPU's memory while a model trains."""

import ctypes
import sys
from functools import cache

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
