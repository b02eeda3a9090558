"""Heads that pool see the mask, wherever a backbone takes it: a padded row is as it is alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import polyhead as ph
from polyhead.models.model import TaskModel

TEXT: dict[str, Any] = dict(
    vocab_size=40, d_model=16, d_ff=20, num_layers=1, num_heads=2, max_seq_len=32, init_std=0.4
)
IMAGE: dict[str, Any] = dict(
    d_model=16, d_ff=20, num_layers=2, num_heads=2, image_size=8, patch_size=4
)
LENGTHS = (9, 6)
IDS = torch.randint(1, 39, (2, 9), generator=torch.Generator().manual_seed(0))
KEEP = (torch.arange(9) < torch.tensor(LENGTHS)[:, None]).long()
SOURCE = IDS.flip(1)[:, :5]

# How each is called with rows, their mask, and which rows they are.
Call = Callable[[TaskModel, Tensor, Any, slice], Tensor]
CASES: dict[str, tuple[str, dict[str, Any], str, Call]] = {
    "bert": ("bert", TEXT, "embed", lambda m, x, k, r: m(x, k)),
    "bert by name": ("bert", TEXT, "embed", lambda m, x, k, r: m(x, attention_mask=k)),
    "gpt2": ("gpt2", dict(TEXT, d_ff=None), "classify", lambda m, x, k, r: m(x, k)),
    "llava": (
        "llava",
        dict(text=TEXT, vision=IMAGE, image_token_id=39),
        "embed",
        lambda m, x, k, r: m(x, None, k),
    ),
    "encoder-decoder": (
        "transformer",
        TEXT,
        "classify",
        lambda m, x, k, r: m(SOURCE[r], x, decoder_attention_mask=k),
    ),
    "encoder-decoder by place": (
        "transformer",
        TEXT,
        "classify",
        # The source's mask, as wide as the source, is none of the answer's.
        lambda m, x, k, r: m(SOURCE[r], x, torch.ones_like(SOURCE[r]), k),
    ),
    "encoder": ("transformer", dict(TEXT, kind="encoder"), "embed", lambda m, x, k, r: m(x, k)),
    "decoder by name": (
        "transformer",
        dict(TEXT, kind="decoder"),
        "classify",
        lambda m, x, k, r: m(x, attention_mask=k),
    ),
    "t5": (
        "t5",
        dict(vocab_size=40, d_model=16, head_dim=8, d_ff=20, num_layers=1, num_heads=2),
        "embed",
        lambda m, x, k, r: m(SOURCE[r], x, None, k),
    ),
}


def made(name: str) -> TaskModel:
    family, fields, head, _ = CASES[name]
    fields = {key: value for key, value in fields.items() if value is not None}
    return ph.build(family, head=head, seed=0, **fields).eval()


@pytest.mark.parametrize("kind", ["tensor", "Mask"])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_padded_row_is_pooled_as_alone(name: str, kind: str) -> None:
    model, call = made(name), CASES[name][3]
    mask = KEEP if kind == "tensor" else ph.Mask(keep=KEEP > 0)
    together = call(model, IDS, mask, slice(0, 2))
    for row, length in enumerate(LENGTHS):
        only = slice(row, row + 1)
        alone = call(model, IDS[only, :length], None, only)
        torch.testing.assert_close(together[only], alone, atol=1e-5, rtol=1e-5)


def test_images_in_second_place_are_no_mask() -> None:
    model = made("llava")
    room = getattr(model.config, "tokens_per_image")  # noqa: B009
    ids = torch.cat([torch.full((2, room), 39), IDS], dim=1)
    keep = torch.cat([torch.ones(2, room, dtype=torch.long), KEEP], dim=1)
    pixels = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        by_place = model(ids, pixels, keep)
        assert torch.equal(by_place, model(ids, pixel_values=pixels, attention_mask=keep))
        assert not torch.allclose(by_place, model(ids, pixels), atol=1e-3)
