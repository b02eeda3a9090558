"""What all tests share."""

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # What a table of `compress` says of speed is no test's concern.
    monkeypatch.setattr("polyhead.cli.compress_table._LONG_ENOUGH_S", 0.001)


@pytest.fixture(scope="session", autouse=True)
def one_thread_a_worker() -> None:
    # Several workers share the machine; more threads each only fight.
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real SmolLM2-135M-Instruct GGUF file, or a skip where it cannot be had."""
    from polyhead.errors import PolyheadError
    from polyhead.files.hub import resolve

    try:
        return resolve("smollm2-135m")
    except PolyheadError as error:
        pytest.skip(f"no SmolLM2 weights here: {error}")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The real all-MiniLM-L6-v2 directory, or a skip where it cannot be had."""
    from polyhead.errors import PolyheadError
    from polyhead.files.hub import resolve

    try:
        return resolve("minilm-l6")
    except PolyheadError as error:
        pytest.skip(f"no MiniLM weights here: {error}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
