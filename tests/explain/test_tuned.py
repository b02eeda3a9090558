"""A lens that learns: nearer to the answer than the plain one, and kept in a file."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.explain.models import IDS, OTHER, answer, made
from tests.nn.parts import shaken

import polyhead as ph
from polyhead.explain.lens import LogitLens
from polyhead.explain.tuned import TunedLens

TEXTS = [
    torch.randint(3, 31, (4, 9), generator=torch.Generator().manual_seed(i)) for i in range(60)
]
SAME = dict(atol=1e-5, rtol=1e-5)


def texts(name: str, count: int = 60) -> list[Any]:
    if name != "t5":
        return TEXTS[:count]
    return [{"input_ids": ids, "decoder_input_ids": ids.flip(0)} for ids in TEXTS[:count]]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_it_learns_what_the_model_says_and_the_model_learns_nothing(name: str) -> None:
    model = made(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    lens = TunedLens(model)
    inputs = {"input_ids": IDS, "decoder_input_ids": OTHER} if name == "t5" else IDS
    plain = LogitLens(model).layers(inputs)
    for key, top in lens.layers(inputs).items():
        torch.testing.assert_close(top.values, plain[key].values, **SAME)
    losses = lens.fit(texts(name), lr=1e-2, layers_at_once=8)
    assert len(losses) == 60
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(part.grad is None for part in model.parameters())
    last = lens.layers(inputs)[lens.lens.last]
    best = answer(model, inputs).log_softmax(-1).topk(5)
    torch.testing.assert_close(last.values, best.values, **SAME)


def test_the_same_texts_and_seed_make_the_same_lens(tmp_path: Path) -> None:
    model = made("llama")
    one, other = TunedLens(model), TunedLens(model)
    assert one.fit(TEXTS[:5], layers_at_once=1) == other.fit(TEXTS[:5], layers_at_once=1)
    one.save(tmp_path / "lens.safetensors")
    again = TunedLens.load(model, tmp_path / "lens.safetensors")
    for key, top in one.layers(IDS).items():
        assert torch.equal(again.layers(IDS)[key].values, top.values)
    with pytest.raises(ph.PolyheadError, match="there already"):
        one.save(tmp_path / "lens.safetensors")
    one.save(tmp_path / "lens.safetensors", force=True)
    for sizes in (dict(num_layers=2), dict(d_model=32)):
        other_sizes: dict[str, Any] = {"vocab_size": 31, "d_model": 16, "num_heads": 4, **sizes}
        stranger = shaken(ph.build("gpt2", **{"num_layers": 3, **other_sizes}), 0.1, 0)
        with pytest.raises(ph.ConfigError, match="a lens of another model"):
            TunedLens.load(stranger, tmp_path / "lens.safetensors")


def test_padding_teaches_nothing() -> None:
    model = made("bert")
    keep = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    spoilt = torch.where(keep.bool(), IDS, 7)
    found = [
        TunedLens(model).fit([{"input_ids": ids, "attention_mask": keep}]) for ids in (IDS, spoilt)
    ]
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_no_text_and_no_layer_are_refused() -> None:
    with pytest.raises(ph.DataError, match="on no text at all"):
        TunedLens(made("llama")).fit([])
    flat = ph.build("gpt2", vocab_size=31, d_model=16, num_heads=4, num_layers=1)
    with pytest.raises(ph.ConfigError, match="one block"):
        TunedLens(flat).fit(TEXTS[:1])
