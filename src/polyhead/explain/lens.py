"""What a model would say if it stopped at a layer, and which parts make it say what it says.

B rows, T tokens, L layers, H heads, E the model's width, V vocabulary.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from polyhead.errors import ConfigError
from polyhead.explain.answers import Answers, final_norm, stack_of
from polyhead.explain.capture import capture
from polyhead.explain.inputs import (
    Inputs,
    call,
    check_answers,
    counted_place,
    counted_tokens,
    token_ids,
)
from polyhead.explain.places import blocks
from polyhead.explain.reduce import Top
from polyhead.models.model import TaskModel
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.block import TransformerBlock
from polyhead.nn.head import LanguageHead
from polyhead.nn.norm import RMSNorm


class LogitLens(Answers):
    """The head's answer to the residual stream as a layer leaves it (nostalgebraist 2020).

    The model's last norm comes before it, where it has one. ConfigError for a model without a
    head, and where a layer's states are of another width than the last one's. `capture` of
    "logits" keeps the same whole, by layer.
    """

    def __init__(self, model: TaskModel) -> None:
        super().__init__(model, next(reversed(blocks(model)), ""))

    @torch.no_grad()
    def layers(self, inputs: Inputs, k: int = 5, where: str | None = None) -> dict[str, Top]:
        """The likeliest k answers after each block, by its name: `[B, T, k]` log-probabilities.

        where: as of `capture`; None: the blocks of the stack that the head reads.
        """
        mask = None if isinstance(inputs, Tensor) else inputs.get("attention_mask")

        def read(state: Tensor) -> Top:
            logits = self(state, mask).float().log_softmax(-1)
            return Top(*logits.topk(min(k, logits.shape[-1])))

        where = f"{stack_of(self.last)}*" if where is None else where
        with capture(self.model, where, "residual", read) as seen:
            call(self.model, inputs)
        return seen


@dataclass(frozen=True)
class Attribution:
    """What each part adds to one logit of each row: their sum is the logit.

    embedding, bias `[B]`; heads `[B, L, H]`; attention `[B, L]`, the biases of attention's output;
    ffn `[B, L]`. total `[B]` the logit.
    """

    embedding: Tensor
    heads: Tensor
    attention: Tensor
    ffn: Tensor
    bias: Tensor
    total: Tensor

    @property
    def sum(self) -> Tensor:
        """Of all parts `[B]`."""
        parts = self.heads.sum((1, 2)) + self.attention.sum(1) + self.ffn.sum(1)
        return self.embedding + parts + self.bias


@torch.no_grad()
def direct_logit_attribution(
    model: TaskModel, inputs: Inputs, of: int | Tensor | None = None, at: int = -1
) -> Attribution:
    """What each head and feed-forward layer adds to a logit on the straight way to it.

    of: an id, for all rows or `[B]`; None: the likeliest. at: the token after which, of those that
    are no padding. The last norm
    is taken as the factor that it was (Elhage et al. 2021). Of decoders whose blocks add to the
    stream as they are (pre-norm: GPT-2, LLaMA, experts); others raise ConfigError.
    """
    names = _straight_blocks(model)
    if model.inference_only:
        raise ConfigError("a packed model's weights are laid out; ask the one it was packed from")
    whats = ("heads", "ffn_out", "residual", "residual_in")
    with capture(model, "*", whats) as seen:
        every = call(model, inputs)
    place = counted_place(counted_tokens(inputs), at)

    def of_token(x: Tensor) -> Tensor:
        return x[torch.arange(len(x), device=x.device), place]

    logits = of_token(every)
    first, last = of_token(seen["residual_in"][names[0]]), of_token(seen["residual"][names[-1]])
    chosen = logits.argmax(-1) if of is None else torch.as_tensor(of, device=logits.device)
    check_answers(chosen, logits.shape[-1])
    chosen = chosen.expand(len(token_ids(inputs)))
    direction, bias = _direction(model, last, chosen)
    heads: list[Tensor] = []
    written: list[Tensor] = []
    ffn: list[Tensor] = []
    for name in names:
        part = cast(MultiHeadAttention, model.get_submodule(f"{name}.attention"))
        found = of_token(seen["heads"][f"{name}.attention"].transpose(1, 2))  # [B, H, D]
        weight = part.out.weight.unflatten(1, (part.num_heads, -1))  # [E, H, D]
        heads.append(torch.einsum("bhd,ehd,be->bh", found.float(), weight.float(), direction))
        own: Tensor | None = getattr(part.out, "bias")  # noqa: B009
        written.append(
            direction.new_zeros(len(direction)) if own is None else direction @ own.float()
        )
        ffn.append((of_token(seen["ffn_out"][f"{name}.ffn"]) * direction).sum(-1))
    return Attribution(
        (first * direction).sum(-1), torch.stack(heads, 1), torch.stack(written, 1),
        torch.stack(ffn, 1), bias, logits.gather(1, chosen[:, None])[:, 0],
    )  # fmt: skip


def _straight_blocks(model: TaskModel) -> list[str]:
    names = list(blocks(model))
    parts = [model.get_submodule(name) for name in names]
    is_straight = all(type(p) is TransformerBlock and p.cross is None for p in parts)
    kind = getattr(model.config, "kind", "decoder")
    if kind != "decoder" or not is_straight or not isinstance(model.head, LanguageHead):
        raise ConfigError(
            f"direct attribution is of decoders whose parts add to one stream, such as gpt2 and "
            f"llama; {model.config.model_type} norms the sum, or has more than one"
        )
    return names


def _direction(model: TaskModel, last: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """What the stream `[B, E]` is multiplied with on the way to a logit, and what is added."""
    head, norm = cast(LanguageHead, model.head), final_norm(model, list(blocks(model))[-1])
    direction = head.weight[chosen].float() * head.scale
    bias = direction.new_zeros(len(direction))
    own: Tensor | None = getattr(head, "bias", None)
    if own is not None:
        bias = bias + head.scale * own.flatten()[chosen]
    last = last.float()
    if isinstance(norm, nn.LayerNorm):
        shift: Tensor | None = getattr(norm, "bias")  # noqa: B009
        if shift is not None:
            bias = bias + (direction * shift).sum(-1)
        direction = direction * norm.weight
        direction = direction - direction.mean(-1, keepdim=True)  # what centring takes away
        direction = direction * (last.var(-1, correction=0, keepdim=True) + norm.eps).rsqrt()
    elif norm is not None:
        assert isinstance(norm, RMSNorm)
        scale = (last.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
        direction = direction * norm.weight * scale
    return direction, bias
