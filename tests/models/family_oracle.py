"""Tiny random models of transformers with any head, and what the families' tests ask of them."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import polyhead as ph
from polyhead.models.model import TaskModel

CLOSE = 1e-5
Inputs = dict[str, Tensor]


def texts(config: Any, seed: int) -> Inputs:
    """Three rows of ids, as long as the smallest table of positions here allows."""
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(3, config.vocab_size, (3, 11), generator=generator)}


def typed_texts(config: Any, seed: int) -> Inputs:
    """The same with token types."""
    found = texts(config, seed)
    types = getattr(config, "type_vocab_size", 0)
    if types > 1:
        generator = torch.Generator().manual_seed(seed + 1)
        found["token_type_ids"] = torch.randint(types, (3, 11), generator=generator)
    return found


def padded_texts(config: Any, seed: int) -> Inputs:
    """The same, padded on the right to the longest of three lengths."""
    found = typed_texts(config, seed)
    keep = torch.arange(11) < torch.tensor([11, 4, 7])[:, None]
    found["input_ids"] = found["input_ids"].where(keep, torch.tensor(config.pad_token_id or 0))
    return {**found, "attention_mask": keep.long()}


@dataclass(frozen=True)
class FamilyCase:
    """A class of transformers, the options of one model of it, and how to read its answer.

    inputs: what both models are called with. answer: theirs as one tensor. ours: how ours is
    called, where it is not `model(**inputs)`. ignore: keys of config.json that need not come back.
    """

    name: str
    model_class: str
    options: Mapping[str, Any]
    inputs: Callable[[Any, int], Inputs] = typed_texts
    answer: Callable[[Any], Tensor] = lambda output: output[0]
    ours: Callable[[TaskModel, Inputs], Tensor] = lambda model, inputs: model(**inputs)
    config_class: str | None = None
    ignore: frozenset[str] = field(default_factory=frozenset)

    def make(self, seed: int = 0) -> Any:
        """The reference with random weights, those of norms and biases too."""
        torch.manual_seed(seed)
        kind = getattr(transformers, self.model_class)
        config_class = (
            getattr(transformers, self.config_class) if self.config_class else kind.config_class
        )
        model = kind(config_class(**self.options)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Ones and zeros would hide a norm or a bias that is not read.
                if "norm" in name.lower() or name.endswith("bias") or "layer_scale" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
                elif parameter.dim() > 1:
                    parameter.mul_(4)
        return model

    def save(self, folder: Path, seed: int = 0) -> Any:
        model = self.make(seed)
        model.save_pretrained(folder)
        return model

    def call(self, model: TaskModel, inputs: Inputs) -> Tensor:
        with torch.no_grad():
            return self.ours(model, inputs)

    def expected(self, model: Any, inputs: Inputs) -> Tensor:
        with torch.no_grad():
            return self.answer(model(**inputs))


def difference(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return (ours.float() - theirs.float()).abs().max().item()


def check_equal(case: FamilyCase, folder: Path) -> None:
    """Ours gives what the reference gives."""
    theirs = case.save(folder)
    ours = ph.load(folder)
    for seed in (1, 2):
        inputs = case.inputs(theirs.config, seed)
        expected = case.expected(theirs, inputs)
        found = case.call(ours, inputs)
        bound = CLOSE * max(1.0, expected.abs().max().item())
        assert difference(found, expected) <= bound


def check_round_trip(case: FamilyCase, folder: Path) -> None:
    """What we save is what they saved, tensor by tensor, and loads in transformers."""
    theirs = case.save(folder / "theirs")
    ours = ph.load(folder / "theirs")
    ours.save(folder / "ours")
    before = load_file(folder / "theirs" / "model.safetensors")
    after = load_file(folder / "ours" / "model.safetensors")
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]), name
    said = [json.loads((folder / at / "config.json").read_text()) for at in ("theirs", "ours")]
    for key in case.ignore:
        said = [{name: value for name, value in one.items() if name != key} for one in said]
    assert said[0] == said[1]
    again = type(theirs).from_pretrained(folder / "ours").eval()
    inputs = case.inputs(theirs.config, 3)
    assert difference(case.expected(again, inputs), case.expected(theirs, inputs)) <= 1e-6


def check_alone(case: FamilyCase, folder: Path) -> None:
    """A row of a batch with padding gives what it gives alone."""
    theirs = case.save(folder)
    ours = ph.load(folder)
    inputs = padded_texts(theirs.config, 4)
    batch = case.call(ours, inputs)
    for row, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        alone = case.call(
            ours,
            {
                name: value[row : row + 1, :length]
                for name, value in inputs.items()
                if name != "attention_mask"
            },
        )
        kept = batch[row : row + 1]
        kept = kept[:, :length] if kept.dim() == 3 else kept
        bound = CLOSE * max(1.0, alone.abs().max().item())
        assert difference(kept, alone) <= bound
