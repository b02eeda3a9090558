"""Weights that are rounded whenever they are read, while what learns are the floats beneath.

So a model learns in the few bits that it will be kept in (Jacob et al. 2018, section 3).
"""

from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from polyhead.compress.formats import FORMATS, PackedWeight
from polyhead.compress.layers import check_floats
from polyhead.compress.quantize import finer_form
from polyhead.errors import ConfigError
from polyhead.models.model import TaskModel
from polyhead.nn.embedding import TokenEmbedding
from polyhead.nn.head import LanguageHead
from polyhead.nn.moe import Experts

Form = type[PackedWeight]


@contextmanager
def rounded(model: TaskModel, form: str, *, embeddings: str | None = None) -> Generator[None]:
    """While this is entered, `model` answers as `quantize(model, form)` would, and learns.

    form, embeddings: as of `quantize`; the same matrices are rounded by the same rules. Gradients
    pass to the floats as if nothing were rounded (Bengio et al. 2013, straight-through): names,
    parameters and what is saved are those of the floats.
    Errors: ConfigError for another form, and for a model that has adapters or is in few bits.
    """
    finer = embeddings or finer_form(form)
    for name in (form, finer):
        if name not in FORMATS and not name == embeddings == "none":
            raise ConfigError(f"form is {name!r}: choose one of {', '.join(FORMATS)}")
    check_floats(model, "rounded")
    changed = [(part, type(part), FORMATS[form]) for part in model.backbone.modules()
               if type(part) is nn.Linear or isinstance(part, Experts)]  # fmt: skip
    if finer != "none":
        tops = [] if model.head is None else list(model.head.modules())
        fine = [part for part in model.backbone.modules() if type(part) is TokenEmbedding]
        fine += [part for part in tops if isinstance(part, LanguageHead)]
        changed += [(part, type(part), FORMATS[finer]) for part in fine]
    for part, kind, own in changed:
        part.__class__ = _rounding(kind, own)
    try:
        yield
    finally:
        for part, kind, _ in changed:
            part.__class__ = kind


@cache
def _rounding(kind: type[nn.Module], form: Form) -> type[nn.Module]:
    """A class below `kind` that reads its matrices rounded."""
    names = ("gate", "up", "down") if issubclass(kind, Experts) else ("weight",)
    return type(f"Rounded{kind.__name__}", (kind,), {name: _read(name, form) for name in names})


def _read(name: str, form: Form) -> property:
    return property(lambda part: _Rounded.apply(part._parameters[name], form))


class _Rounded(torch.autograd.Function):
    """A matrix, or a stack of them, as a form keeps it; its gradient is taken for the floats'."""

    @staticmethod
    @torch.compiler.disable
    def forward(ctx: Any, weight: Tensor, form: Form) -> Tensor:
        rows = weight.detach().flatten(0, -2)
        return form(rows).unpack().view_as(weight)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, None]:
        return grad, None
