"""What the encoder-decoders' tests ask of a tiny random model, beside every family's checks."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tests.models.family_oracle import CLOSE, FamilyCase, Inputs, difference

import polyhead as ph

SOURCES, TARGETS = (13, 5, 8), (9, 3, 6)


def pairs(config: Any, seed: int) -> Inputs:
    """Three ragged sources with their mask, and targets of one length."""
    generator = torch.Generator().manual_seed(seed)
    targets = getattr(config, "decoder_vocab_size", None) or config.vocab_size
    keep = torch.arange(13) < torch.tensor(SOURCES)[:, None]
    return {
        "input_ids": torch.randint(config.vocab_size, (3, 13), generator=generator),
        "attention_mask": keep.long(),
        "decoder_input_ids": torch.randint(targets, (3, 9), generator=generator),
    }


def check_padding(case: FamilyCase, folder: Path) -> None:
    """A pair alone equals the pair in a batch that is padded on both sides, here and there."""
    theirs = case.save(folder)
    ours = ph.load(folder)
    inputs = pairs(theirs.config, 5)
    masked = torch.arange(9) < torch.tensor(TARGETS)[:, None]
    batch = case.call(ours, {**inputs, "decoder_attention_mask": masked.long()})
    for row, (source, target) in enumerate(zip(SOURCES, TARGETS, strict=True)):
        alone = {
            "input_ids": inputs["input_ids"][row : row + 1, :source],
            "decoder_input_ids": inputs["decoder_input_ids"][row : row + 1, :target],
        }
        expected = case.expected(theirs, alone)
        bound = CLOSE * max(1.0, expected.abs().max().item())
        assert difference(case.call(ours, alone), expected) <= bound
        assert difference(batch[row : row + 1, :target], expected) <= bound


def check_steps(case: FamilyCase, folder: Path, static: bool) -> None:
    """Chunks and single tokens over caches, some rows chosen twice on the way, are one forward."""
    case.save(folder)
    model = ph.load(folder)
    inputs = pairs(model.config, 6)
    mask, target = inputs["attention_mask"], inputs["decoder_input_ids"]
    with torch.no_grad():
        whole = case.call(model, inputs)
        backbone: Any = model.backbone
        memory = backbone.encode(inputs["input_ids"], mask)
        caches = backbone.make_caches(3, 12 if static else None)
        pieces = [
            model.answer(backbone.decode(target[:, a:b], memory, mask, caches=caches))
            for a, b in pairwise([0, 4, 6, 7])
        ]
        bound = CLOSE * max(1.0, whole.abs().max().item())
        assert difference(torch.cat(pieces, dim=1), whole[:, :7]) <= bound
        # Beams: two rows a text go on over one memory, then the first text is done.
        caches.select([0, 0, 1, 1, 2, 2])
        step = target[:, 7:8].repeat_interleave(2, 0)
        found = model.answer(backbone.decode(step, memory, mask, caches=caches))
        assert difference(found, whole[:, 7:8].repeat_interleave(2, 0)) <= bound
        caches.select([3, 2, 5, 5], [1, 2])
        step = target[[1, 1, 2, 2], 8:9]
        found = model.answer(backbone.decode(step, memory[1:], mask[1:], caches=caches))
        assert difference(found, whole[[1, 1, 2, 2], 8:9]) <= bound
