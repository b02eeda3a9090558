"""Texts that answer images: rows of a batch with one image, two or none."""

from pathlib import Path

import pytest
import torch

import polyhead as ph
from polyhead.generate.engine import Engine
from polyhead.generate.engine_config import EngineConfig

pytest.importorskip("transformers")

from tests.models.test_llava import CASES, images


@pytest.mark.parametrize("case", CASES[:3], ids=lambda case: case.name)
def test_a_ragged_batch_of_prompts_with_images(case, tmp_path: Path) -> None:
    theirs = case.make()
    theirs.save_pretrained(tmp_path)
    model = ph.load(tmp_path)
    tokenizer = ph.Tokenizer.train(["ab"], kind="bytes")
    torch.manual_seed(3)
    shown = [images(1), None, images(2)]
    spread = [case.row(2, 3), [7, 8, 9], case.row(1, 2, 2)]
    image = model.config.image_token_id
    short = [[t for n, t in enumerate(row) if t != image or row[n - 1] != image] for row in spread]
    settings = ph.GenerationConfig(max_new_tokens=8, temperature=0, ignore_eos=True)
    found = ph.TextGenerator(model, tokenizer).generate(short, settings, images=shown)
    for row, pixels, answer in zip(spread, shown, found, strict=True):
        extra = {} if pixels is None else {"pixel_values": pixels}
        wanted = theirs.generate(
            input_ids=torch.tensor([row]), max_new_tokens=8, do_sample=False, eos_token_id=None,
            **extra,
        )  # fmt: skip
        assert list(answer.token_ids) == wanted[0, len(row) :].tolist()


@pytest.mark.parametrize("before", [1, 15, 26])
@pytest.mark.parametrize("after", [1, 12, 25])
def test_images_that_are_found_again(before: int, after: int, tmp_path: Path) -> None:
    case = CASES[0]
    case.make().save_pretrained(tmp_path)
    model = ph.load(tmp_path)
    image = model.config.image_token_id
    torch.manual_seed(5)
    shown = images(3)
    words = [torch.randint(3, image, (count,)).tolist() for count in (before, 9, 2, after)]
    row = [*words[0], image, *words[1], image, *words[2], image, *words[3]]
    settings = ph.GenerationConfig(max_new_tokens=6, temperature=0, ignore_eos=True)
    engine = Engine(model, None, EngineConfig(max_rows=2))
    wanted = ph.TextGenerator(model, None).generate([row], settings, images=[shown])[0]
    ids = model.config.with_room(row)
    for other in (ids, ids, [*ids[:-1], 3], ids):
        request = engine.add(other, settings, pixels=shown)
        while engine.has_work:
            engine.step()
        if other is ids:
            assert request.outcome()[0].token_ids == wanted.token_ids
    assert request.found
    assert not any(begin < request.found < end for begin, end in request.images)


def test_a_model_without_eyes_says_so() -> None:
    model = ph.build("gpt2", vocab_size=256, d_model=16, num_layers=1, num_heads=2)
    writer = ph.TextGenerator(model, ph.Tokenizer.train(["ab"], kind="bytes"))
    with pytest.raises(ph.ConfigError, match="gpt2 reads no images"):
        writer.generate(["a"], images=[torch.zeros(1, 3, 4, 4)])
