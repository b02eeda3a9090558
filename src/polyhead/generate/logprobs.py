"""How likely what was drawn is. `N` rows, `V` tokens of the vocabulary."""

from torch import Tensor

from polyhead.generate.result import TokenLogprob


def logprobs_of(logits: Tensor, drawn: Tensor, top: int) -> list[TokenLogprob]:
    """By the distribution of logits `[N, V]`: the drawn ids `[N]`, and the `top` most likely."""
    logprobs = logits.float().log_softmax(1)
    chosen = logprobs.gather(1, drawn.clamp(min=0)[:, None])[:, 0].tolist()
    best = logprobs.topk(min(top, logits.shape[1]), dim=1)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    tops = [tuple(zip(ids, values, strict=True)) for ids, values in pairs]
    return [TokenLogprob(*each) for each in zip(drawn.tolist(), chosen, tops, strict=True)]
