import pytest
import torch

from polyhead.models.assemble import build
from polyhead.models.load import load
from polyhead.models.registry import families

pytestmark = pytest.mark.skipif("bigram" not in families(), reason="no such family here")


def test_only_the_current_token_counts():
    model = build("bigram", vocab_size=11, d_model=8, seed=0)
    one, other = model(torch.tensor([[1, 2, 3]])), model(torch.tensor([[7, 9, 3]]))
    assert one.shape == (1, 3, 11)
    assert torch.equal(one[:, 2], other[:, 2])
    assert not torch.equal(one[:, 1], other[:, 1])


@pytest.mark.parametrize("max_len", [None, 8])
def test_caches_count_rows(max_len):
    model = build("bigram", vocab_size=11, d_model=8, seed=0).eval()
    caches = model.backbone.make_caches(2, max_len)
    keep = torch.tensor([[True, True, True], [True, False, False]])
    ids = torch.tensor([[1, 2, 3], [4, 0, 0]])
    assert torch.equal(model(ids, attention_mask=keep, caches=caches), model(ids))
    assert caches.lengths.tolist() == [3, 1]


def test_saves_and_loads(tmp_path):
    model = build("bigram", vocab_size=11, d_model=8, seed=0)
    model.save(tmp_path)
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(load(tmp_path)(ids), model(ids))
