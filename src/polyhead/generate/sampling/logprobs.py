"""Log-probabilities of what was chosen, and of what might have been."""

from torch import Tensor

from polyhead.generate.result import TokenLogprob


def token_logprobs(logits: Tensor, chosen: Tensor, top: int) -> list[TokenLogprob]:
    """By the model's own distribution: of the `chosen` ids `[N]`, and of the `top` most likely.

    logits `[N, V]`. Natural logarithms.
    """
    logprobs = logits.float().log_softmax(1)
    own = logprobs.gather(1, chosen.clamp(min=0)[:, None])[:, 0].tolist()
    best = logprobs.topk(min(top, logits.shape[1]), dim=1)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    tops = [tuple(zip(ids, values, strict=True)) for ids, values in pairs]
    return [TokenLogprob(*each) for each in zip(chosen.tolist(), own, tops, strict=True)]
