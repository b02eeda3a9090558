"""Which words of a source those of its translation come from, by cross-attention.

B pairs, S source and T target tokens, H heads.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from polyhead.errors import ConfigError
from polyhead.explain.capture import capture
from polyhead.explain.inputs import call
from polyhead.models.model import TaskModel

Links = set[tuple[int, int]]
"""Source and target places, counted from 0."""


@torch.no_grad()
def alignment(
    model: TaskModel,
    input_ids: Tensor,
    decoder_input_ids: Tensor,
    attention_mask: Tensor | None = None,
    where: str = "cross",
    heads: Sequence[int] | None = None,
) -> Tensor:
    """What each step of a translation looks at, `[B, T, S]`: the mean of what is named.

    A step reads `decoder_input_ids[:, t]` and writes what follows it. where: as of `capture`.
    ConfigError for a model without cross-attention.
    """

    def mean(weights: Tensor) -> Tensor:
        if heads is not None and not (heads and all(0 <= h < weights.shape[1] for h in heads)):
            raise ConfigError(
                f"heads are {list(heads)} of {weights.shape[1]}; name one or more, from 0"
            )
        return weights.float()[:, slice(None) if heads is None else list(heads)].mean(1)

    given = {"input_ids": input_ids, "decoder_input_ids": decoder_input_ids}
    if attention_mask is not None:
        given["attention_mask"] = attention_mask
    with capture(model, where, reduce=mean) as seen:
        call(model, given)
    sizes = decoder_input_ids.shape[1], input_ids.shape[1]
    found = [weights for weights in seen.values() if tuple(weights.shape[1:]) == sizes]
    if not found:
        raise ConfigError(f"{where!r} means no cross-attention of this model; leave it out")
    return torch.stack(found).mean(0)


def hard_alignment(weights: Tensor, both_ways: bool = False, least: float = 0.0) -> Links:
    """Links of one pair `[T, S]`: for each target place its heaviest source place.

    both_ways: only where the target place is also the heaviest of the source place's. least: of
    weight.
    """
    best, back = weights.argmax(1).tolist(), weights.argmax(0).tolist()
    return {
        (source, target)
        for target, source in enumerate(best)
        if float(weights[target, source]) >= least and (not both_ways or back[source] == target)
    }


def of_words(links: Links, source: Sequence[int | None], target: Sequence[int | None]) -> Links:
    """Links of tokens as links of words: the word that each token is of, or None."""
    pairs = ((source[s], target[t]) for s, t in links)
    return {(s, t) for s, t in pairs if s is not None and t is not None}


def alignment_error_rate(
    found: Iterable[Links], sure: Iterable[Links], possible: Iterable[Links] | None = None
) -> float:
    """`1 - (|A ∩ S| + |A ∩ P|) / (|A| + |S|)` over all pairs; 0 is best (Och and Ney 2003).

    possible: links that are no error; None: the sure ones alone.
    """
    found, sure = list(found), list(sure)
    allowed = sure if possible is None else [s | p for s, p in zip(sure, possible, strict=True)]
    hits = sum(len(a & s) + len(a & p) for a, s, p in zip(found, sure, allowed, strict=True))
    total = sum(len(a) + len(s) for a, s in zip(found, sure, strict=True))
    return 1 - hits / total if total else 0.0
