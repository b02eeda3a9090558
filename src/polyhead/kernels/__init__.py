"""Faster doubles of parts for one machine: removable, each tested against the part."""

from polyhead.kernels.packing import PackedLinear, pack

__all__ = ["PackedLinear", "pack"]
