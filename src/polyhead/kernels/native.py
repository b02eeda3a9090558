"""C++ beside this file, compiled for the machine at hand when it is first asked for."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import forward_ad

from polyhead.errors import SlowerWarning
from polyhead.files.hub import home

TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
"""What the kernels take, and how the names of their functions end."""

_PLAIN = (Tensor, torch.nn.Parameter)
_FLAGS = "-O3 -fno-math-errno -fno-trapping-math -std=c++17 -fopenmp -shared -fPIC -w"


def library(name: str, machine: str = "") -> ctypes.CDLL | None:
    """The functions of `name`.cpp; None where nothing can compile it.

    machine: the compiler's flags for what instructions it may use; else $POLYHEAD_MACHINE's, or
    those of the machine at hand. What was compiled once is kept in polyhead's cache. Needs Linux
    and g++, or the compiler that $CXX names.
    """
    return _compiled(name, machine or os.environ.get("POLYHEAD_MACHINE") or "-march=native")


@cache
def _compiled(name: str, machine: str) -> ctypes.CDLL | None:
    named = os.environ.get("CXX") or "g++"
    compiler = shutil.which(named)
    if sys.platform != "linux" or compiler is None:
        _tell(f"no {named} is there (install g++ on Linux, or name a compiler by $CXX)")
        return None
    source = Path(__file__).with_name(f"{name}.cpp")
    # -march=native means another machine's instructions where the cache is shared.
    flags = f"{_FLAGS} {machine}"
    sources = (source, *sorted(source.parent.glob("*.h")))
    texts = [file.read_text(encoding="utf-8") for file in sources]
    try:
        made_of = *texts, flags, compiler, _machine(), torch.__version__
        key = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:16]
        built = home() / "kernels" / f"{name}-{key}.so"
        if not built.exists():
            _compile([compiler, *flags.split(), str(source)], built)
        return ctypes.CDLL(str(built))
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip().splitlines()
        complaint = next((line for line in said if "error" in line), said[0] if said else "")
        _tell(f"{compiler} failed with code {error.returncode} {complaint}".strip())
    except (OSError, RuntimeError) as error:  # the latter without a home
        _tell(f"they cannot be kept ({error}; $POLYHEAD_HOME names another folder)")
    return None


@cache
def _tell(why: str) -> None:
    line = f"no kernels of our own: {why}; torch computes instead, slower"
    warnings.warn(line, SlowerWarning, stacklevel=3)


def takes(*tensors: Tensor | None) -> bool:
    """Whether these are what a kernel may read: of one of TYPES, plain, and on the CPU."""
    kind = None
    for x in tensors:
        if x is None:
            continue
        kind = x.dtype if kind is None else kind
        # Subclasses, as of sharded weights, keep their numbers elsewhere.
        if x.dtype != kind or type(x) not in _PLAIN or not x.is_cpu or x.is_neg():
            return False
    return kind in TYPES and not (torch.compiler.is_compiling() or _is_transformed())


def learns(*tensors: Tensor | None) -> bool:
    """Whether gradients of any of these are wanted: the calls that autograd must know of."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _is_transformed() -> bool:
    """Whether tensors may stand for others, as under vmap, or carry derivatives with them."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def address(x: Tensor | None) -> ctypes.c_void_p:
    """Where a tensor's numbers begin, as C takes it."""
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def _compile(command: list[str], built: Path) -> None:
    built.parent.mkdir(parents=True, exist_ok=True)
    # Under its own name once it is whole: another process may compile the same.
    with tempfile.TemporaryDirectory(dir=built.parent) as folder:
        fresh = Path(folder) / built.name
        subprocess.run([*command, "-o", str(fresh)], check=True, capture_output=True)
        fresh.replace(built)


def _machine() -> str:
    """What tells instruction sets apart."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    of_first = {line.split(":")[0].strip(): line for line in reversed(lines) if ":" in line}
    return platform.machine() + of_first.get("flags", of_first.get("Features", ""))
