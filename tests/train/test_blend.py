"""Several corpora, each as often as its weight says."""

import numpy as np
import pytest

import polyhead as ph
from polyhead.errors import ConfigError, FileError
from polyhead.train.blend import BLOCK, Corpus, blended, read_blend, whole_shares
from polyhead.train.config import TrainConfig

from .conftest import text, tiny
from .test_checkpoint import Stop, assert_same, final_state, stop_at

SOURCES = {
    "cats": Corpus([text(60)], 0.7), "mats": Corpus([text(30, seed=1)], 0.2),
    "hats": Corpus([text(45, seed=2)], 0.1),
}  # fmt: skip


def made(tokenizer, tmp_path, sources=SOURCES, split="train", **settings):
    config = TrainConfig(context=16, out=str(tmp_path), **settings)
    return blended(sources, tokenizer, tiny(tokenizer.vocab_size), config, split)


def test_every_corpus_has_its_share_of_each_block(tokenizer, tmp_path):
    blend = made(tokenizer, tmp_path)
    assert blend.shares.sum() == BLOCK
    for block in (0, 1, 5):
        which, number = blend.places(block * BLOCK, BLOCK)
        assert np.bincount(which).tolist() == blend.shares.tolist() == [717, 205, 102]
        for part, share in enumerate(blend.shares.tolist()):
            rows = number[which == part]
            assert sorted(rows.tolist()) == list(range(block * share, (block + 1) * share))
    first, second = (blend.places(at, BLOCK)[0] for at in (0, BLOCK))
    assert not np.array_equal(first, second)


def test_a_row_is_the_same_however_it_is_asked_for(tokenizer, tmp_path):
    blend = made(tokenizer, tmp_path)
    rows = blend.batch(3, 8).input_ids
    for place in range(8):
        assert blend.batch(24 + place, 1).input_ids.tolist() == rows[place : place + 1].tolist()
    other = made(tokenizer, tmp_path, seed=1)
    assert blend.batch(0, 8).input_ids.tolist() != other.batch(0, 8).input_ids.tolist()
    assert (
        blend.digest
        != made(tokenizer, tmp_path, {**SOURCES, "hats": Corpus([text(45, seed=2)], 0.3)}).digest
    )


@pytest.mark.parametrize(
    ("weights", "shares"),
    [([1], [BLOCK]), ([1, 1], [512, 512]), ([1, 1, 1], [342, 341, 341]), ([1e6, 1], [1023, 1]),
     ([1, 1e-9, 1e-9], [1022, 1, 1])],
)  # fmt: skip
def test_shares_are_whole(weights, shares):
    assert whole_shares(np.array(weights, float)).tolist() == shares


def test_a_run_learns_from_all_and_goes_on(tokenizer, tmp_path):
    def begin(out, callbacks=(), resume=False):
        config = TrainConfig(
            steps=20, batch_size=4, context=16, warmup=2, log_every=5, checkpoint_every=5,
            validate_batches=2, lr=5e-3, out=str(out),
        )  # fmt: skip
        trainer = ph.Trainer(
            tiny(tokenizer.vocab_size), tokenizer, config, callbacks=callbacks, quiet=True
        )
        return trainer.fit(SOURCES, resume=resume)

    found = begin(tmp_path / "whole")
    assert found["valid_loss"] < 3.0
    with pytest.raises(Stop):
        begin(tmp_path / "cut", [stop_at(12)])
    begin(tmp_path / "cut", resume=True)
    whole, cut = final_state(tmp_path / "whole"), final_state(tmp_path / "cut")
    whole[1]["rng"], cut[1]["rng"] = None, None
    assert_same(whole, cut)


def test_corpora_of_a_file(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "mix.toml").write_text('[a]\ndata = "a.txt"\nweight = 3\n\n[b]\ndata = "b.txt"\n')
    found = read_blend(tmp_path / "mix.toml")
    assert found["a"] == Corpus(str(tmp_path / "a.txt"), 3.0)
    assert found["b"].weight == 1.0


@pytest.mark.parametrize(
    ("written", "error", "said"),
    [
        ("[a]\nweight = 1\n", ConfigError, "corpus 'a' has data"),
        ('[a]\ndata = "x"\nweight = "much"\n', ConfigError, "corpus 'a' has data"),
        ('a = "x"\n', ConfigError, "corpus 'a' has data"),
        ("", ConfigError, "names no corpora"),
        ("[a", FileError, "is not TOML"),
        (None, FileError, "cannot read"),
    ],
)
def test_files_that_say_too_little_are_refused(tmp_path, written, error, said):
    if written is not None:
        (tmp_path / "mix.toml").write_text(written)
    with pytest.raises(error, match=said):
        read_blend(tmp_path / "mix.toml")


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_weights_are_above_nothing(tokenizer, tmp_path, weight):
    with pytest.raises(ConfigError, match="give each corpus one above 0"):
        made(tokenizer, tmp_path, {"a": Corpus([text(9)], weight)})
