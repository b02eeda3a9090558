"""Prompts are read as fast as those who write allow."""

import pytest

from polyhead.generate.pace import Pace


def lived(pace: Pace, steps: int, fixed: float, each: float, plain: float = 1.0) -> float:
    """The longest of the last ten steps that read, on a machine of these costs."""
    took: list[float] = []
    for _ in range(steps):
        read = pace.budget()
        seconds = plain + (fixed + each * read if read else 0.0)
        pace.took(seconds, read)
        if read:
            took.append(seconds)
    return max(took[-10:])


@pytest.mark.parametrize("stretch", [1.5, 2.0, 4.0])
@pytest.mark.parametrize(("fixed", "each"), [(0.0, 0.02), (0.2, 0.01), (0.1, 0.0005)])
def test_a_step_takes_as_long_as_it_may(stretch: float, fixed: float, each: float) -> None:
    longest = lived(Pace(stretch), 200, fixed, each)
    assert 1 + 0.3 * (stretch - 1) < longest < stretch


def test_where_nothing_helps_prompts_still_move() -> None:
    pace = Pace(2.0)
    assert lived(pace, 50, fixed=9.0, each=1.0) > 2
    assert pace.budget() >= 4


def test_a_machine_that_became_slower_is_noticed() -> None:
    pace = Pace(2.0)
    lived(pace, 100, 0.0, 0.01)
    quick = pace.chunk
    lived(pace, 200, 0.0, 0.04)
    assert pace.chunk < quick / 3
    lived(pace, 400, 0.0, 0.01)
    assert pace.chunk > quick / 2


def test_one_step_that_took_long_changes_little() -> None:
    pace = Pace(2.0)
    lived(pace, 60, 0.0, 0.01)
    before = pace.chunk
    pace.took(30.0, pace.chunk)
    assert pace.chunk > before / 2


def test_the_first_step_reads_nothing_so_that_there_is_something_to_compare_with() -> None:
    pace = Pace(2.0)
    assert pace.budget() == 0
    pace.took(1.0, 0)
    assert pace.budget() > 0
