"""A compiler that is missing or fails is said once, and torch computes instead."""

import warnings

import pytest

from polyhead.kernels import native


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.setattr(native, "home", lambda: tmp_path)
    native._tell.cache_clear()
    yield
    native._tell.cache_clear()


@pytest.mark.parametrize(
    ("compiler", "said"), [("no-such-g++", "no g\\+\\+ is there"), ("false", "could not make them")]
)
def test_a_compiler_that_does_not_serve_is_said_once(monkeypatch, compiler, said):
    monkeypatch.setenv("CXX", compiler)
    with pytest.warns(UserWarning, match=said):
        assert native._compiled.__wrapped__("norm", "") is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native._compiled.__wrapped__("rotate", "") is None
