"""A few of the random lives of `benchmarks/schedules.py`."""

import pytest
from benchmarks.schedules import schedule


@pytest.mark.parametrize("tens", range(9))
def test_random_lives_leave_nothing_behind(tens: int) -> None:
    lived = [schedule(seed) for seed in range(10 * tens, 10 * tens + 10)]
    assert sum(happened["compared"] for happened in lived) > 20
