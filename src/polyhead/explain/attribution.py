"""What of its input an answer comes from: by gradients, and by taking parts away.

B rows, T tokens, E the model's width.
"""

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import numpy
import torch
from torch import Tensor, nn

from polyhead.errors import ConfigError
from polyhead.explain.inputs import (
    Inputs,
    Target,
    call,
    check_differentiable,
    counted_place,
    counted_tokens,
    logit,
    mask_of_answers,
    token_ids,
)
from polyhead.models.model import TaskModel
from polyhead.nn.embedding import TokenEmbedding

_POINTS = 8  # of a stretch of the way


@dataclass(frozen=True)
class Attributions:
    """What each token `[B, T]`, or each pixel's channel, adds to an answer beside a baseline's.

    values: the attributions. answer, baseline `[B]`: the target's values there. error `[B]`: how
    far their difference is from the sum, relative to it; below fp32 it is mostly rounding.
    """

    values: Tensor
    answer: Tensor
    baseline: Tensor

    @property
    def error(self) -> Tensor:
        """0 where the attributions are complete."""
        wanted = self.answer - self.baseline
        missing = self.values.flatten(1).sum(1) - wanted
        return missing.abs() / wanted.abs().clamp_min(1e-12)


def integrated_gradients(
    model: TaskModel,
    inputs: Inputs,
    target: Target | None = None,
    baseline: int | None = 0,
    tolerance: float = 0.01,
    most: int = 1024,
) -> Attributions:
    """Gradients along the way from a baseline to the input, times that way (Sundararajan 2017).

    Of texts by token `[B, T]`: embeddings go from those of `baseline`, an id; of images by pixel,
    from zero. target: None is the likeliest answer, held fixed.
    The way is halved where the gradients do not add up to what the answer changes there, until the
    rest is below `tolerance` of the whole, or after `most` gradients. From zero vectors (baseline
    None) norms turn all at once, and where routing to experts changes the answer jumps, which no
    gradient sees: look at `error`.
    """
    check_differentiable(model)
    source = _Source.of(model, inputs)
    with torch.enable_grad():
        whole = source.tensor(model, inputs)
        start = source.start(model, inputs, whole, baseline)
        asked = target or _fixed(source.answer(model, inputs, whole), inputs)

        def answer(points: Tensor) -> Tensor:
            logits = source.answer(model, _times(inputs, len(points)), points.flatten(0, 1))
            return torch.stack([asked(own) for own in logits.unflatten(0, points.shape[:2])])

        found, ends = _integrate(answer, start, whole - start, tolerance, most)
    return Attributions(source.told(((whole - start) * found).detach()), *ends)


@dataclass(frozen=True)
class _Piece:
    """A part of the way: the mean gradient times its length, and what that does not account for."""

    begin: float
    end: float
    ends: tuple[Tensor, Tensor]  # [B] what is asked of the answer there
    gradient: Tensor
    missing: Tensor  # [B]


def _integrate(
    answer: Callable[[Tensor], Tensor], start: Tensor, way: Tensor, tolerance: float, most: int
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The integral of the gradient over `start + point * way`, and the answers at both ends.

    answer: of points `[P, B, ...]` it makes `[P, B]`.
    """

    def piece(begin: float, end: float, ends: tuple[Tensor, Tensor]) -> _Piece:
        points, weights = (x.to(way).view(-1, *[1] * way.dim()) for x in _gauss(begin, end))
        at = (start + points * way).requires_grad_()
        (gradient,) = torch.autograd.grad(answer(at).sum(), at)
        total = (weights * gradient).sum(0)
        made = (way * total).flatten(1).sum(1)
        return _Piece(begin, end, ends, total, (ends[1] - ends[0] - made).abs())

    def value(point: float) -> Tensor:
        with torch.no_grad():
            return answer((start + point * way)[None])[0]

    ends = value(1.0), value(0.0)
    scale = (ends[0] - ends[1]).abs().clamp_min(1e-6)
    pieces = [piece(0.0, 1.0, (ends[1], ends[0]))]
    while len(pieces) * _POINTS * 2 < most:
        if (sum(part.missing for part in pieces) <= tolerance / 2 * scale).all():
            break
        worst = max(pieces, key=lambda part: float((part.missing / scale).max()))
        pieces.remove(worst)
        middle = (worst.begin + worst.end) / 2
        between = value(middle)
        pieces.append(piece(worst.begin, middle, (worst.ends[0], between)))
        pieces.append(piece(middle, worst.end, (between, worst.ends[1])))
    return torch.stack([part.gradient for part in pieces]).sum(0), ends


@torch.no_grad()
def occlusion(
    model: TaskModel,
    inputs: Inputs,
    target: Target | None = None,
    by: int | float = 0,
    patch: int | None = None,
) -> Tensor:
    """How much the answer falls without each token `[B, T]`, or each patch `[B, rows, columns]`.

    by: the id that takes a token's place, such as that of [MASK]; the value of a patch. patch: its
    edge in pixels. target: None is the likeliest answer, held fixed (Zeiler and Fergus 2014).
    """
    logits = call(model, inputs)
    target = target or _fixed(logits, inputs)
    whole = target(logits)
    key = "pixel_values" if _is_images(inputs) else "input_ids"
    x = inputs if isinstance(inputs, Tensor) else inputs[key]
    falls: list[Tensor] = []
    for hidden in _hidden(x, by, patch):
        given = hidden if isinstance(inputs, Tensor) else {**inputs, key: hidden}
        falls.append(whole - target(call(model, given)))
    found = torch.stack(falls, 1)
    if key == "input_ids":
        return found * counted_tokens(inputs)
    edge = cast(int, patch)
    return found.unflatten(1, (-(-x.shape[2] // edge), -1))


def _hidden(x: Tensor, by: int | float, patch: int | None) -> Iterable[Tensor]:
    if not x.is_floating_point():
        for at in range(x.shape[1]):
            yield x.index_fill(1, torch.tensor([at], device=x.device), int(by))
        return
    if patch is None or patch < 1:
        raise ConfigError(
            f"patch is {patch}; name the edge, in pixels, of what to hide of an image"
        )
    for top in range(0, x.shape[2], patch):
        for left in range(0, x.shape[3], patch):
            found = x.clone()
            found[:, :, top : top + patch, left : left + patch] = by
            yield found


class _Source:
    """What gradients are asked of: embedded tokens of texts, or pixels."""

    def __init__(self, embedding: str | None) -> None:
        self.embedding = embedding

    @staticmethod
    def of(model: TaskModel, inputs: Inputs) -> "_Source":
        return _Source(None if _is_images(inputs) else _embedding(model))

    def tensor(self, model: TaskModel, inputs: Inputs) -> Tensor:
        """The pixels, or the embeddings `[B, T, E]`."""
        if self.embedding is None:
            return inputs if isinstance(inputs, Tensor) else inputs["pixel_values"]
        with torch.no_grad():
            return model.get_submodule(self.embedding)(token_ids(inputs))

    def start(
        self, model: TaskModel, inputs: Inputs, whole: Tensor, baseline: int | None
    ) -> Tensor:
        """Where the way begins."""
        if self.embedding is None or baseline is None:
            return torch.zeros_like(whole)
        ids = torch.full_like(token_ids(inputs), baseline)
        with torch.no_grad():
            return model.get_submodule(self.embedding)(ids)

    def answer(self, model: TaskModel, inputs: Inputs, x: Tensor) -> Tensor:
        """The model's answer with `x` in the place of what it reads."""
        if self.embedding is None:
            return call(model, x if isinstance(inputs, Tensor) else {**inputs, "pixel_values": x})
        with _first_answer(model.get_submodule(self.embedding), lambda _: x):
            return call(model, inputs)

    def told(self, values: Tensor) -> Tensor:
        return values if self.embedding is None else values.sum(-1)


def _is_images(inputs: Inputs) -> bool:
    if isinstance(inputs, Tensor):
        return inputs.is_floating_point()
    return "input_ids" not in inputs


def _embedding(model: TaskModel) -> str:
    """The name of the embedding that reads `input_ids`."""
    names = [n for n, part in model.named_modules() if isinstance(part, TokenEmbedding)]
    if not names:
        raise ConfigError(f"{model.config.model_type} embeds no tokens; give it images")
    return next((name for name in names if "source" in name), names[0])


@contextmanager
def _first_answer(part: nn.Module, change: Callable[[Tensor], Tensor]) -> Generator[None]:
    """Let the first answer of a module be another; a decoder reads the same embedding later."""
    done = False

    def see(_: nn.Module, __: object, answer: Tensor) -> Tensor | None:
        nonlocal done
        if done:
            return None
        done = True
        return change(answer)

    hook = part.register_forward_hook(see)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def learned_embeddings(model: TaskModel) -> Generator[None]:
    """Within it gradients reach whatever follows an embedding, though no parameter may learn."""

    def see(_: nn.Module, __: object, answer: Tensor) -> Tensor:
        return answer.detach().requires_grad_()

    parts = [part for part in model.modules() if isinstance(part, TokenEmbedding | nn.Conv2d)]
    hooks = [part.register_forward_hook(see) for part in parts]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _fixed(logits: Tensor, inputs: Inputs) -> Target:
    """The likeliest answer of these logits, after the last token that counts, held fixed."""
    mask = mask_of_answers(inputs)
    if logits.dim() == 3:
        keep = torch.ones(logits.shape[:2], device=logits.device) if mask is None else mask
        logits = logits[torch.arange(len(logits)), counted_place(keep.bool(), -1)]
    return logit(logits.detach().argmax(-1), attention_mask=mask)


def _gauss(begin: float, end: float) -> tuple[Tensor, Tensor]:
    """Points of a stretch and their weights (Gauss and Legendre)."""
    points, weights = map(torch.from_numpy, numpy.polynomial.legendre.leggauss(_POINTS))
    half = (end - begin) / 2
    return begin + half * (points + 1), half * weights


def _times(inputs: Inputs, count: int) -> Inputs:
    """The same rows so many times."""
    if isinstance(inputs, Tensor):
        return inputs.repeat(count, *[1] * (inputs.dim() - 1))
    return {name: x.repeat(count, *[1] * (x.dim() - 1)) for name, x in inputs.items()}
