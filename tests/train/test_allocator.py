import ctypes

import pytest

from polyhead.train import allocator


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
