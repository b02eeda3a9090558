import collections
import itertools

import numpy as np
import pytest
import torch

import polyhead as ph
from polyhead.errors import ConfigError
from polyhead.generate.seq2seq import start_id
from polyhead.text.tokenizer import Tokenizer
from polyhead.train.config import TrainConfig
from polyhead.train.corruption import (
    Corruption,
    corrupted,
    corrupted_windows,
    parts,
    sentinels_of,
    span_corruption,
)
from polyhead.train.masked import drawn, hit_rate
from polyhead.train.objectives import IGNORE, shifted

from .conftest import text

SENTINELS = [f"<extra_id_{i}>" for i in range(30)]


@pytest.fixture(scope="module")
def t5() -> Tokenizer:
    return Tokenizer.train([text(50)], kind="chars", extra_tokens=SENTINELS)


def model_of(tokenizer, **fields):
    sizes = {"d_model": 16, "num_layers": 1, "num_heads": 2, "max_seq_len": 64, "d_ff": 32}
    vocab = tokenizer.vocab_size
    return ph.build("transformer", seed=0, vocab_size=vocab, **{**sizes, "dropout": 0.0, **fields})


def test_t5s_own_figures():
    # random_spans_helper of t5/data/preprocessors.py: 512 inputs of 568 tokens, 114 targets.
    found = Corruption()
    assert found.length(512) == 568
    assert found.sizes(568) == (512, 114)
    assert found.counts(568) == (85, 28)
    assert Corruption(0.5, 3.0).counts(100) == (50, 17)
    assert Corruption().counts(30) == (4, 1)  # 4.5 rounds to even, as tf.round's
    assert Corruption().counts(2) == (1, 1)
    for size in range(4, 300):
        length = found.length(size)
        assert found.sizes(length)[0] <= size < found.sizes(length + 1)[0]


@pytest.mark.parametrize("length", [2, 3, 7, 30, 100, 568])
@pytest.mark.parametrize("settings", [{}, {"density": 0.5}, {"mean_span": 1.0}, {"mean_span": 8.0}])
def test_masks_have_their_counts(length, settings):
    corruption = Corruption(**settings)
    noise, spans = corruption.counts(length)
    for n in range(30):
        mask = corruption.noise(length, drawn(0, n))
        assert mask.dtype == bool
        assert mask.shape == (length,)
        assert mask.sum() == noise
        edges = np.diff(mask.astype(int))
        assert (edges == 1).sum() == spans
        assert not mask[0]
        assert mask[-1]


def test_every_division_is_equally_likely():
    # 6 tokens in 3 parts: 10 ways, each 1 in 10.
    draw = np.random.default_rng(0)
    seen = collections.Counter(tuple(parts(6, 3, draw).tolist()) for _ in range(5000))
    ways = {w for w in itertools.product(range(1, 7), repeat=3) if sum(w) == 6}
    assert set(seen) == ways
    assert len(ways) == 10
    assert all(abs(count - 500) < 110 for count in seen.values()), "5 standard deviations"
    assert parts(1, 1, draw).tolist() == [1]
    assert parts(4, 4, draw).tolist() == [1, 1, 1, 1]


def t5_mask(length: int, density: float, mean: float, rng: np.random.Generator) -> np.ndarray:
    """random_spans_noise_mask as T5 states it: a shuffled indicator of first tokens, summed up."""
    noise = min(max(round(length * density), 1), length - 1)
    spans = max(round(noise / mean), 1)

    def segment(items: int) -> np.ndarray:
        first = np.arange(items - 1) < spans - 1
        rng.shuffle(first)
        number = np.cumsum(np.pad(first.astype(int), (1, 0)))
        return np.bincount(number)

    lengths = np.stack([a := segment(noise), segment(length - noise)][::-1], 1).reshape(-1)
    assert len(a) == spans
    starts = np.zeros(length, int)
    starts[np.cumsum(lengths)[:-1]] = 1
    return np.cumsum(starts) % 2 == 1


def test_the_distribution_is_t5s():
    rng = np.random.default_rng(1)
    count, length = 3000, 60
    theirs = np.stack([t5_mask(length, 0.15, 3.0, rng) for _ in range(count)])
    ours = np.stack([Corruption().noise(length, drawn(0, n)) for n in range(count)])
    # Each position's share, of standard deviation below 0.01 on either side.
    assert np.abs(ours.mean(0) - theirs.mean(0)).max() < 0.05
    assert ours.mean() == theirs.mean() == pytest.approx(9 / 60)

    def runs(masks):
        edges = np.diff(np.pad(masks.astype(int), ((0, 0), (1, 1))))
        sizes = np.argwhere(edges == -1)[:, 1] - np.argwhere(edges == 1)[:, 1]
        return np.bincount(sizes, minlength=8)[:8] / len(sizes)

    assert np.abs(runs(ours) - runs(theirs)).max() < 0.03
    assert (runs(ours) * np.arange(8)).sum() == pytest.approx(3.0, abs=0.2)


def restored(inputs: list[int], targets: list[int], sentinels: list[int]) -> list[int]:
    """The text, from what the encoder reads and the decoder writes."""
    spans: dict[int, list[int]] = {}
    for token in targets:
        if token in sentinels:
            spans[token] = current = []
        else:
            current.append(token)
    text: list[int] = []
    for token in inputs:
        text += spans.pop(token) if token in spans else [token]
    assert not spans
    return text


@pytest.mark.parametrize("settings", [{}, {"density": 0.5}, {"mean_span": 1.5}])
@pytest.mark.parametrize("context", [12, 48])
def test_inputs_and_targets_make_up_the_text(t5, tmp_path, settings, context):
    config = TrainConfig(context=context, out=str(tmp_path), held_out=0.1, seed=2)
    train, valid = (
        corrupted_windows([text(200)], t5, model_of(t5), config, split, **settings)
        for split in ("train", "valid")
    )
    assert len(train) > len(valid) > 0
    sentinels = [t5.vocab[name] for name in SENTINELS]
    length = Corruption(**settings).length(context)
    assert train.windows.context == length
    batch = train.batch(2, 8)
    assert batch.input_ids.shape == (8, Corruption(**settings).sizes(length)[0])
    assert batch.input_ids.shape[1] <= context
    starts = train.windows.starts(16, 8)
    for row, start in enumerate(starts.tolist()):
        inputs, labels = batch.input_ids[row].tolist(), batch.labels[row].tolist()
        assert inputs[-1] == labels[-1] == t5.eos_id
        found = restored(inputs[:-1], labels[:-1], sentinels)
        assert found == train.windows.tokens.ids[start : start + length].tolist()
        used = [token for token in inputs if token in sentinels]
        assert used == sentinels[: len(used)]
        assert [token for token in labels if token in sentinels] == used
    assert batch.tokens() == batch.labels.numel()
    assert (batch.decoder_input_ids[:, 0] == start_id(model_of(t5), t5)).all()
    assert torch.equal(batch.decoder_input_ids[:, 1:], batch.labels[:, :-1])
    halves = [train.batch(i, 4) for i in (4, 5)]
    assert torch.equal(torch.cat([half.labels for half in halves]), batch.labels)
    other = corrupted_windows([text(200)], t5, model_of(t5), config, "train", density=0.2)
    assert other.digest != train.digest


def test_the_paper_s_example():
    words = "Thank you for inviting me to your party last week .".split()
    noise = np.isin(words, ["for", "inviting", "last"])
    ids, sentinels = np.arange(11), np.array([100, 101, 102])
    read, written = corrupted(ids, noise, sentinels)
    assert read.tolist() == [0, 1, 100, 4, 5, 6, 7, 101, 9, 10]
    assert written.tolist() == [100, 2, 3, 101, 8, 102]


def test_the_loss_is_that_of_the_decoder(t5, tmp_path):
    config = TrainConfig(context=24, out=str(tmp_path))
    model = model_of(t5).train()
    batch = corrupted_windows([text(90)], t5, model, config, "train").batch(0, 4)
    loss = span_corruption(model, batch)
    logits = model(batch.input_ids, batch.decoder_input_ids)
    logp = logits.log_softmax(-1).gather(-1, batch.labels[..., None])
    torch.testing.assert_close(loss.total, -logp.sum())
    assert loss.tokens == batch.labels.numel()
    torch.testing.assert_close(loss.logits(), logits.flatten(0, 1))
    model.eval()
    rate = hit_rate(model, None, [span_corruption(model, batch).answers])["accuracy"]
    assert rate == pytest.approx(float((logits.argmax(-1) == batch.labels).float().mean()))
    assert batch.to(torch.device("cpu")).decoder_input_ids is batch.decoder_input_ids


def test_a_decoder_reads_padding_where_labels_do_not_count():
    labels = torch.tensor([[5, 6, 7], [8, IGNORE, IGNORE]])
    assert shifted(labels, 9, 0).tolist() == [[9, 5, 6], [9, 8, 0]]


def test_what_is_missing_is_named(t5, tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="tokenizer has 0"):
        sentinels_of(tokenizer, 3)
    with pytest.raises(ConfigError, match=r"<extra_id_39>.*has 30"):
        sentinels_of(t5, 40)
    for settings, says in (({"density": 1.0}, "density is 1.0"), ({"mean_span": 0.5}, "0.5")):
        with pytest.raises(ConfigError, match=says):
            Corruption(**settings)
    config = TrainConfig(context=3, out=str(tmp_path))
    with pytest.raises(ConfigError, match="context is 3"):
        corrupted_windows([text(90)], t5, model_of(t5), config, "train")
