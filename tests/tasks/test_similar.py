"""Which texts are like another, against cosines computed one by one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tasks.tiny import TEXTS, make

import polyhead as ph
from polyhead.tasks.similar import Similar


def test_it_ranks_by_the_cosine(tmp_path: Path) -> None:
    made = make(tmp_path, "lm")
    queries = ["found a moth", "Engine", *TEXTS]
    found = Similar(*made, TEXTS)(queries, top_k=3)
    for query, matches in zip(queries, found, strict=True):
        vector = ph.embed(*made, query)
        scores = [
            float(torch.cosine_similarity(vector, ph.embed(*made, text), dim=0)) for text in TEXTS
        ]
        best = sorted(range(len(TEXTS)), key=lambda i: -scores[i])[:3]
        assert [one.index for one in matches] == best
        assert [one.score for one in matches] == pytest.approx([scores[i] for i in best], abs=1e-5)
        assert [one.text for one in matches] == [TEXTS[i] for i in best]
    assert [matches[0].index for matches in found[2:]] == list(range(len(TEXTS)))


@pytest.mark.parametrize(
    ("texts", "query", "word"),
    [([], "a", "nothing to search"), ("abc", "a", "list of texts"), ([""], "a", "empty"),
     (["a"], " ", "query 0 is empty")],
)  # fmt: skip
def test_what_cannot_be_ranked(texts: Any, query: str, word: str, tmp_path: Path) -> None:
    made = make(tmp_path, "lm")
    with pytest.raises(ph.DataError, match=word):
        Similar(*made, texts)(query)
