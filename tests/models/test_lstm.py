"""The LSTM against the textbook's equations, its states, and what it refuses."""

import pytest
import torch

from polyhead.models.assemble import build
from polyhead.models.load import load
from polyhead.nn.mask import Mask


def make(**fields):
    return build("lstm", seed=0, vocab_size=11, d_model=6, **fields).eval()


def test_is_the_textbooks_recurrence():
    model = make(num_layers=1)
    weights = dict(model.backbone.lstm.named_parameters())
    ids = [5, 1, 9, 2]
    h = c = torch.zeros(6)
    for t, i in enumerate(ids):
        x = model.backbone.embedding.weight[i]
        gates = weights["weight_ih_l0"] @ x + weights["bias_ih_l0"]
        gates = gates + weights["weight_hh_l0"] @ h + weights["bias_hh_l0"]
        into, forget, new, out = gates.view(4, 6)
        c = forget.sigmoid() * c + into.sigmoid() * new.tanh()
        h = out.sigmoid() * c.tanh()
        torch.testing.assert_close(model(torch.tensor([ids]))[0, t], model.head.weight @ h)


def test_forget_gates_begin_open():
    biases = dict(make().backbone.lstm.named_parameters())
    assert (biases["bias_ih_l1"].view(4, 6)[1] == 1).all()


def test_a_row_that_reads_nothing_keeps_its_state():
    model = make()
    caches = model.backbone.make_caches(2)
    model(torch.tensor([[1, 2], [3, 4]]), caches=caches)
    before = caches[0].k.clone()
    keep = torch.tensor([[True, False], [False, False]])
    model(torch.tensor([[5, 0], [0, 0]]), attention_mask=keep, caches=caches)
    assert caches.lengths.tolist() == [3, 2]
    assert torch.equal(caches[0].k[1], before[1])
    assert not torch.equal(caches[0].k[0], before[0])


def test_a_row_that_starts_over_forgets():
    model = make()
    caches = model.backbone.make_caches(1)
    ids = torch.tensor([[1, 2, 3]])
    first = model(ids, caches=caches)
    caches.lengths[0] = 0
    caches.sync()
    torch.testing.assert_close(model(ids, caches=caches), first)
    with pytest.raises(ValueError, match="cannot go back"):
        caches.truncate([1])


def test_segments_are_refused():
    with pytest.raises(ValueError, match="hide padding alone"):
        make()(torch.tensor([[1, 2]]), attention_mask=Mask(segments=torch.tensor([[0, 1]])))


@pytest.mark.parametrize("tied", [False, True])
def test_saves_and_loads(tmp_path, tied):
    model = make(num_layers=3, tie_embeddings=tied)
    model.save(tmp_path)
    ids = torch.tensor([[1, 2, 3]])
    again = load(tmp_path)
    assert torch.equal(again(ids), model(ids))
    assert again.is_tied is tied
