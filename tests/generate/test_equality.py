"""A few cases of `benchmarks/equality.py`, and whether it would notice."""

import argparse

import pytest

pytest.importorskip("transformers")

from benchmarks import equality

CASES = ["greedy", "beam 4, penalty 2, stops False"]


def records(monkeypatch: pytest.MonkeyPatch, cases: list[str]) -> list[dict]:
    monkeypatch.setattr(equality, "LENGTHS", (1, 9, 40))
    monkeypatch.setattr(equality, "MOST", 12)
    return equality.campaign(["t5"], cases, equality.texts_of([]), argparse.Namespace(t5=None))


def test_texts_are_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    found = records(monkeypatch, CASES)
    assert [record["same"] for record in found] == [3, 3]
    assert "t5        2        6" in equality.table(found)


def test_a_fault_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = equality.ours_of

    def wrong(*asked):
        answers = right(*asked)
        answers[0] = [((*ids[:-1], 3), score) for ids, score in answers[0]]
        return answers

    monkeypatch.setattr(equality, "ours_of", wrong)
    (found,) = records(monkeypatch, ["greedy"])
    assert (found["same"], found["faults"]) == (2, 1)
