import ctypes
import sys

import pytest
import torch

from polyhead.train import allocator
from polyhead.train.log import peak_memory


@pytest.fixture(autouse=True)
def anew():
    allocator.keep_freed_memory.cache_clear()
    yield
    allocator.keep_freed_memory.cache_clear()


def test_freed_memory_is_asked_for_once_and_only_of_glibc(monkeypatch):
    asked = []
    monkeypatch.setattr(
        ctypes,
        "CDLL",
        lambda name: type("C", (), {"mallopt": lambda *args: asked.append(args[-2:])})(),
    )
    monkeypatch.setattr(allocator.sys, "platform", "linux")
    allocator.keep_freed_memory()
    allocator.keep_freed_memory()
    assert asked == [(-1, 2**31 - 1), (-4, 0)]


@pytest.mark.parametrize("platform", ["darwin", "linux"])
def test_another_c_library_is_left_alone(platform, monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    monkeypatch.setattr(allocator.sys, "platform", platform)
    allocator.keep_freed_memory()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep a process's peak")
def test_a_peak_begins_anew():
    cpu = torch.device("cpu")
    allocator.forget_peak()
    large = torch.ones(64 << 20)
    before = peak_memory(cpu)
    del large
    allocator.forget_peak()
    assert peak_memory(cpu) < before - (128 << 20)
