"""What every image family is asked, against transformers' model of the same config."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import polyhead as ph

TOLERANCE = 1e-5


@dataclass(frozen=True)
class ImageCase:
    """A tiny model of transformers: its class, its config's options, and images for it."""

    name: str
    model_class: type
    options: dict[str, Any] = field(default_factory=dict)
    images: tuple[int, int, int, int] = (2, 3, 16, 16)
    answer: Callable[[Any], Tensor] = lambda output: output.logits
    named: dict[str, Any] = field(default_factory=dict)  # of their forward

    def make(self, seed: int = 0) -> Any:
        """Theirs, with random values in everything, norms and biases too."""
        torch.manual_seed(seed)
        config = self.model_class.config_class(**self.options)
        model = self.model_class._from_config(config, attn_implementation="eager").eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
        return model

    def pixels(self, seed: int = 1) -> Tensor:
        return torch.randn(self.images, generator=torch.Generator().manual_seed(seed))


def hidden(output: Any) -> Tensor:
    return output.last_hidden_state


@torch.no_grad()
def theirs(case: ImageCase, model: Any) -> Tensor:
    return case.answer(model(pixel_values=case.pixels(), **case.named))


@torch.no_grad()
def ours(case: ImageCase, model: Any) -> Tensor:
    return model(case.pixels())


def saved(case: ImageCase, folder: Path) -> tuple[Any, Path]:
    model = case.make()
    model.save_pretrained(folder / "theirs")
    return model, folder / "theirs"


def check_answers_are_equal(case: ImageCase, folder: Path) -> None:
    model, place = saved(case, folder)
    expected, found = theirs(case, model), ours(case, ph.load(place))
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= TOLERANCE


def check_tensors_come_back(case: ImageCase, folder: Path) -> None:
    place = saved(case, folder)[1]
    loaded = ph.load(place)
    loaded.save(folder / "ours")
    before = load_file(place / "model.safetensors")
    after = load_file(folder / "ours" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    config, again = (json.loads((p / "config.json").read_text()) for p in (place, folder / "ours"))
    assert config == again
    back = case.model_class.from_pretrained(folder / "ours").eval()
    assert torch.equal(theirs(case, back), theirs(case, case.model_class.from_pretrained(place)))


def check_a_fresh_model_loads_there(case: ImageCase, folder: Path, **fields: Any) -> None:
    """What was never theirs has a config they understand, and gives the same answer."""
    model_type = case.model_class.config_class.model_type
    model = ph.build(model_type, seed=3, **fields).eval()
    model.save(folder / "fresh")
    back, info = case.model_class.from_pretrained(folder / "fresh", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (theirs(case, back.eval()) - ours(case, model)).abs().max() <= TOLERANCE


@torch.no_grad()
def check_an_image_alone_is_as_in_a_batch(case: ImageCase, folder: Path) -> None:
    model = ph.load(saved(case, folder)[1])
    pixels = case.pixels()
    alone = torch.cat([model(image[None]) for image in pixels])
    assert (alone - model(pixels)).abs().max() <= TOLERANCE


@torch.no_grad()
def check_maps_are_theirs(case: ImageCase, folder: Path) -> None:
    """Every layer's weights are caught, and those that transformers gives out are the same."""
    place = saved(case, folder)[1]
    loaded = ph.load(place)
    plain = ours(case, loaded)
    with ph.capture(loaded) as maps:
        probed = ours(case, loaded)
    assert len(maps) == loaded.config.num_layers
    assert (plain - probed).abs().max() <= TOLERANCE
    assert all((seen.sum(-1) - 1).abs().max() < 1e-5 for seen in maps.values())
    reference = case.make()
    given = reference(pixel_values=case.pixels(), output_attentions=True, **case.named).attentions
    found = list(maps.values())
    depths = getattr(loaded.config, "depths", None)
    if depths is not None:  # theirs gives the last layer of each stage
        found = [found[sum(depths[: stage + 1]) - 1] for stage in range(len(depths))]
    assert len(given) == len(found)
    for seen, expected in zip(found, given, strict=True):
        assert (seen - expected).abs().max() <= TOLERANCE


CHECKS = (
    check_answers_are_equal,
    check_tensors_come_back,
    check_an_image_alone_is_as_in_a_batch,
    check_maps_are_theirs,
)
