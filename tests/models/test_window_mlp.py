"""The window MLP against the paper's equation, and with padding, caches and packing."""

import pytest
import torch

from polyhead.models.assemble import build
from polyhead.models.load import load
from polyhead.nn.mask import Mask

SIZES = {"vocab_size": 11, "d_model": 6, "embedding_width": 4, "window": 3, "init_std": 0.5}


def make(**fields):
    return build("window_mlp", seed=0, **SIZES, **fields).eval()


@pytest.mark.parametrize("direct", [False, True])
def test_is_the_papers_equation(direct):
    model = make(direct=direct)
    c, h = model.backbone.embedding.weight, model.backbone.hidden
    ids = [5, 1, 9, 2]
    vectors = [torch.zeros(4), torch.zeros(4), *(c[i] for i in ids)]
    for t in range(len(ids)):
        x = torch.cat(vectors[t : t + 3])
        u, w = model.head.weight[:, :6], model.head.weight[:, 6:]
        y = model.head.bias + u @ torch.tanh(h.bias + h.weight @ x)
        if direct:
            y = y + w @ x
        torch.testing.assert_close(model(torch.tensor([ids]))[0, t], y)


def test_only_the_window_counts():
    model = make()
    one, other = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[7, 2, 3, 4]])
    same = (model(one) == model(other)).all(-1)[0]
    assert same.tolist() == [False, False, False, True]


def test_packed_texts_are_blind_to_each_other():
    model = make()
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    packed = model(ids, attention_mask=Mask(segments=torch.tensor([[0, 0, 1, 1, 1]])))
    torch.testing.assert_close(packed[:, 2:], model(ids[:, 2:]))
    torch.testing.assert_close(packed[:, :2], model(ids[:, :2]))


def test_saves_and_loads(tmp_path):
    model = make(direct=True)
    model.save(tmp_path)
    ids = torch.tensor([[1, 2, 3]])
    again = load(tmp_path)
    assert torch.equal(again(ids), model(ids))
    assert again.config == model.config
