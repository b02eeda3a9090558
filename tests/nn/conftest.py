"""The tests of the parts run on the device they find."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def on_the_device_found(device: torch.device) -> Iterator[None]:
    torch.set_default_device(device)
    yield
    torch.set_default_device(None)
