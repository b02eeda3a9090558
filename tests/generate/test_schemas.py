"""Figure 11 of docs/reliability.md, of a few hundred schemas."""

import pytest

pytest.importorskip("llguidance")
pytest.importorskip("jsonschema")


def test_what_is_written_by_a_schema_is_valid_by_it():
    from benchmarks.schemas import campaign

    found = campaign(240, seed=7)
    assert found["faults"] == []
    assert found["refused"] == 0
    assert found["ended"] > 220
