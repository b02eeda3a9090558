"""SmolLM2's induction heads, named by where they look, and what reading is without them.

Heads are named on runs of random words written twice. Then they are knocked out on other such runs,
and on passages of prose written twice; beside them as many heads drawn at random, many times. The
loss is of the second writing, which the first foretells; `once` is that of the first. `times` is
the rise without the named heads, over the mean size of a change without others.
"""

import random
import statistics
import time
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from recipes.common import arguments, pairs, tell
from torch import Tensor

import polyhead as ph
from polyhead.explain.heads import head_scores, repeated
from polyhead.models.model import TaskModel

MODEL = "smollm2-135m"


def main() -> None:
    given = arguments(__doc__, "induction", least=0.4, length=50, rows=8, draws=40)
    began = time.perf_counter()
    model, tokenizer = ph.load(MODEL, dtype="float32").eval(), ph.tokenizer(MODEL)
    words = torch.arange(100, 40_000)
    scores = head_scores(model, repeated(words, given.length, given.rows, seed=0, begin=0))
    named = scores.best("induction", least=given.least)
    texts = {
        "random words": repeated(words, given.length, given.rows, seed=1, begin=0),
        "prose": _prose(tokenizer, given.length, given.rows),
    }
    for name, ids in texts.items():
        heads = [(head.layer, head.head) for head in named]
        others = [(layer, head) for layer in range(30) for head in range(9)]
        others = [head for head in others if head not in heads]
        draw = random.Random(0)
        whole, once = _loss(model, ids), _loss(model, ids, second=False)
        rise = _loss(model, ids, heads) - whole
        drawn = [
            _loss(model, ids, draw.sample(others, len(heads))) - whole for _ in range(given.draws)
        ]
        tell(
            f"induction, {name}",
            began,
            heads=[[*head[:2], round(head.value, 2)] for head in named],
            loss=whole,
            once=once,
            rise=rise,
            rise_at_random=statistics.mean(drawn),
            median_at_random=statistics.median(drawn),
            most_at_random=max(drawn),
            size_at_random=statistics.mean(map(abs, drawn)),
            times=rise / statistics.mean(map(abs, drawn)),
            draws=given.draws,
        )


def _prose(tokenizer: ph.Tokenizer, length: int, rows: int) -> Tensor:
    """Passages `[rows, 1 + 2 length]`, each written twice after the token that begins a text."""
    ids = tokenizer.encode("\n".join(row[0] for row in pairs("bible.en-es.tsv")[:4000]))
    passages = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    chosen = passages[:: len(passages) // rows][:rows]
    return torch.cat([chosen.new_zeros(rows, 1), chosen, chosen], 1)


@torch.inference_mode()
def _loss(
    model: TaskModel, ids: Tensor, without: list[tuple[int, int]] | None = None,
    second: bool = True,
) -> float:  # fmt: skip
    length = ids.shape[1] // 2
    with ph.knock_out(model, without) if without else nullcontext():
        logits = model(ids)
    part = slice(length, -1) if second else slice(0, length)
    after = slice(length + 1, None) if second else slice(1, length + 1)
    return F.cross_entropy(logits[:, part].flatten(0, 1), ids[:, after].flatten()).item()


if __name__ == "__main__":
    main()
