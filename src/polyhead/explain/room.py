"""Whether what is to be kept fits the memory that is free."""

from pathlib import Path

import torch

from polyhead.errors import ConfigError

_GROUP = Path("/sys/fs/cgroup")


def require_room(num_bytes: int, device: torch.device, what: str) -> None:
    """Raise ConfigError where so much more does not fit, saying how to need less."""
    free = free_bytes(device)
    if free is not None and num_bytes > free:
        raise ConfigError(
            f"{what} would take {_sized(num_bytes)} and {_sized(free)} are free: name fewer "
            "layers, or keep less of each with reduce='top-5' (of weights also 'entropy', "
            "'received' or 'mean')"
        )


def free_bytes(device: torch.device) -> int | None:
    """What is free where tensors of a device lie; None where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = [own for own in (_of_machine(), _of_group()) if own is not None]
    return min(found, default=None)


def _of_machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    line = next((line for line in lines if line.startswith("MemAvailable:")), None)
    return None if line is None else 1024 * int(line.split()[1])


def _of_group() -> int | None:
    """What a container may still take."""
    try:
        most, now = ((_GROUP / name).read_text() for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (_GROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    # Pages of files are given up when somebody needs them.
    return None if most.strip() == "max" else int(most) - int(now) + int(stat["inactive_file"])


def _sized(num_bytes: int) -> str:
    size, units = float(max(0, num_bytes)), ["KiB", "MiB", "GiB"]
    unit = "B"
    while size >= 1024 and units:
        size, unit = size / 1024, units.pop(0)
    return f"{size:,.1f} {unit}"
