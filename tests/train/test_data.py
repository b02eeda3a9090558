import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import polyhead as ph
from polyhead.errors import ConfigError, DataError, FileError
from polyhead.train import corpus, sources
from polyhead.train.blend import Corpus, text_windows
from polyhead.train.config import TrainConfig
from polyhead.train.corpus import load_tokens
from polyhead.train.data import SORTED, Examples, Windows, split_rows
from polyhead.train.tokens import Tokens

from .conftest import text, tiny


def stretch(count: int) -> Tokens:
    return Tokens(np.arange(count, dtype=np.uint32), count, "digest")


@given(st.integers(2, 600), st.integers(1, 40), st.integers(0, 2**40), st.integers(0, 2**31))
@settings(max_examples=150, deadline=None)
def test_every_window_comes_once_an_epoch(count, context, seed, epoch):
    if count <= context:
        return
    windows = Windows(stretch(count), context, seed)
    starts = windows.starts(epoch * len(windows), len(windows))
    assert len(set(starts.tolist())) == len(windows)
    assert starts.min() >= 0
    assert starts.max() + context + 1 <= count
    assert (np.diff(np.sort(starts)) == context).all()


def test_the_order_is_arithmetic_across_epochs():
    windows = Windows(stretch(1000), 16, seed=3)
    whole = windows.starts(0, 5 * len(windows))
    for at in (len(windows) - 1, len(windows), len(windows) + 1, 3 * len(windows) - 2):
        assert windows.starts(at, 5).tolist() == whole[at : at + 5].tolist()
    epochs = whole.reshape(5, -1)
    assert len({tuple(np.argsort(epoch)) for epoch in epochs}) == 5
    assert len({epoch.min() for epoch in epochs}) > 1, "the phase does not move"
    assert Windows(stretch(1000), 16, seed=4).starts(0, 9).tolist() != whole[:9].tolist()


def test_the_order_never_changes():
    # Resuming an old run depends on these very numbers.
    assert Windows(stretch(1000), 16, seed=0).starts(58, 6).tolist() == [
        287,
        399,
        319,
        606,
        638,
        254,
    ]


def test_labels_are_the_tokens_that_follow():
    windows = Windows(stretch(100), 8, seed=0)
    batch = windows.batch(2, 3)
    assert batch.input_ids.shape == (3, 8)
    assert (batch.labels == batch.input_ids + 1).all()
    first = windows.starts(6, 3).tolist()
    assert batch.input_ids[:, 0].tolist() == first


def test_two_batches_of_four_hold_the_rows_of_one_of_eight():
    windows = Windows(stretch(500), 8, seed=0)
    rows = [row for i in (6, 7) for row in windows.batch(i, 4).input_ids.tolist()]
    assert rows == windows.batch(3, 8).input_ids.tolist()


def test_sources_agree(tmp_path, tokenizer):
    texts = [text(5, 1), text(3, 2)]
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "folder" / "a.txt").write_text(texts[0])
    (tmp_path / "folder" / "deep" / "b.txt").write_text(texts[1])
    lines = "".join(json.dumps({"text": t, "id": 1}) + "\n\n" for t in texts)
    (tmp_path / "c.jsonl").write_text(lines)
    sources = [texts, tmp_path / "folder", str(tmp_path / "c.jsonl")]
    size = tokenizer.vocab_size
    found = [load_tokens(s, tokenizer, tmp_path / "cache", vocab_size=size) for s in sources]
    expected = []
    for t in texts:
        expected += tokenizer.encode(t, add_special_tokens=False)
        expected += [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    for tokens in found:
        assert tokens.ids.tolist() == expected
        assert tokens.text_bytes == sum(len(t.encode()) for t in texts)


def test_tokens_are_made_once(tmp_path, tokenizer, monkeypatch):
    size = tokenizer.vocab_size
    first = load_tokens([text(9)], tokenizer, tmp_path, vocab_size=size)
    monkeypatch.setattr(corpus, "_write", None)
    again = load_tokens([text(9)], tokenizer, tmp_path, vocab_size=size)
    assert isinstance(again.ids, np.memmap)
    assert again.ids.tolist() == first.ids.tolist()
    with pytest.raises(TypeError):
        load_tokens([text(10)], tokenizer, tmp_path, vocab_size=size)


def test_a_large_file_is_tokenised_in_pieces_as_if_whole(tmp_path, tokenizer, monkeypatch):
    path = tmp_path / "large.txt"
    path.write_text(text(300))
    size = tokenizer.vocab_size
    whole = load_tokens(path, tokenizer, tmp_path / "a", vocab_size=size)
    monkeypatch.setattr(sources, "PIECE", 256)
    longest = []
    encode = tokenizer.encode_batch

    class Spy:
        backend, eos_id = tokenizer.backend, tokenizer.eos_id

        def encode_batch(self, texts, add_special_tokens):
            longest.append(sum(map(len, texts)))
            return encode(texts, add_special_tokens=add_special_tokens)

    told = []
    pieces = load_tokens(
        path, Spy(), tmp_path / "b", vocab_size=size, progress=lambda *a: told.append(a)
    )
    assert pieces.ids.tolist() == whole.ids.tolist()
    assert max(longest) < 4 * 256
    assert told[-1] == (path.stat().st_size, path.stat().st_size)


def test_pieces_end_where_tokenizers_cut_as_well():
    # Several newlines together may be one token; a lone one between words never joins the next.
    assert sources.line_end("ab\n\ncd\n ef\ngh", 1) == len("ab\n\ncd\n ef\n")
    assert sources.line_end("no line ends here", 4) == 8


@pytest.mark.parametrize("cut", [b"", b"{", b'{"format": 1}'])
def test_a_damaged_cache_is_refused(tmp_path, tokenizer, cut):
    size = tokenizer.vocab_size
    load_tokens([text(9)], tokenizer, tmp_path, vocab_size=size)
    next(tmp_path.glob("*/header.json")).write_bytes(cut)
    with pytest.raises(FileError, match="remove it"):
        load_tokens([text(9)], tokenizer, tmp_path, vocab_size=size)


def test_bad_corpora_say_what_to_do(tmp_path, tokenizer):
    def load(source, vocab_size=tokenizer.vocab_size):
        return load_tokens(source, tokenizer, tmp_path / "cache", vocab_size=vocab_size)

    (tmp_path / "empty").mkdir()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 \xff")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"title": "b"}\n')
    cases = [
        ([], "empty"),
        ([""], "empty"),
        (["a", 3], "text 1 is a int"),
        (tmp_path / "none.txt", "no such file"),
        (tmp_path / "empty", "no .txt, .jsonl, .csv, .tsv or .parquet file"),
        (tmp_path / "latin.txt", "not UTF-8"),
        (tmp_path / "bad.jsonl", "line 2"),
    ]
    for source, says in cases:
        with pytest.raises(DataError) as error:
            load(source)
        assert says in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="vocabulary of 3"):
        load([text(3)], vocab_size=3)
    load([text(4)])
    with pytest.raises(DataError, match="vocabulary of 3"):
        load([text(4)], vocab_size=3)
    assert not list((tmp_path / "cache").glob(".tmp*"))


def test_a_corpus_shorter_than_a_window_gives_figures():
    with pytest.raises(DataError, match=r"8 tokens.*takes 9.*below 8"):
        Windows(stretch(8), 8, seed=0)
    assert Windows(stretch(9), 8, seed=0).batch(5, 2).labels[:, -1].tolist() == [8, 8]


def test_a_split_knows_the_bytes_of_its_end(tmp_path, tokenizer):
    tokens = load_tokens([text(30)], tokenizer, tmp_path, vocab_size=tokenizer.vocab_size)
    train, held = tokens.split(100, tokenizer)
    assert (len(held.ids), len(train.ids)) == (100, len(tokens.ids) - 100)
    assert held.text_bytes == len(tokenizer.decode(held.ids.tolist()).encode())
    assert train.text_bytes + held.text_bytes == tokens.text_bytes


@given(st.integers(1, 300), st.integers(0, 2**31), st.integers(0, 6))
@settings(max_examples=100, deadline=None)
def test_an_epoch_of_rows_has_each_once(count, seed, epoch):
    rows = Examples(range(count), list, seed, "")
    order = rows.order(epoch * count, count).tolist()
    assert sorted(order) == list(range(count))
    # Any batch of any size is a slice of the same endless order.
    for size in (1, 3, 8):
        at = (epoch * count + count // 2) // size
        assert rows.batch(at, size) == rows.order(at * size, size).tolist()
    if count > 20:
        assert order != rows.order((epoch + 1) * count, count).tolist()
        assert (
            order != Examples(range(count), list, seed + 1, "").order(epoch * count, count).tolist()
        )


@given(st.integers(1, 300), st.integers(1, 8), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_rows_of_like_length_share_a_batch(count, size, seed):
    lengths = np.random.default_rng(seed).integers(1, 99, count)
    rows = Examples(range(count), list, seed, "", lengths)
    many = min(SORTED, max(1, count // (8 * size)))
    batches = [rows.batch(at, size) for at in range(many)]
    # The same rows as without lengths, each as often.
    plain = rows.order(0, many * size).tolist()
    assert sorted(row for batch in batches for row in batch) == sorted(plain)
    spreads = sorted((min(lengths[batch]), max(lengths[batch])) for batch in batches)
    assert all(high <= low for (_, high), (low, _) in pairwise(spreads) if size > 1)
    assert batches == [rows.batch(at, size) for at in range(many)]
    if count >= size:
        assert all(len(set(batch)) == size for batch in batches)


@given(st.integers(1, 400), st.sampled_from([12, 6, 4, 1]), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_a_step_has_the_same_rows_however_it_is_cut(count, size, seed):
    step = 12
    lengths = np.random.default_rng(seed).integers(1, 99, count)
    rows = Examples(range(count), list, seed, "", lengths, step)
    whole = [rows.batch(at, step) for at in range(20)]
    parts = [rows.batch(at, size) for at in range(20 * step // size)]
    assert [row for part in parts for row in part] == [row for one in whole for row in one]


@given(st.integers(1, 200), st.floats(0, 0.99), st.integers(0, 2**31))
@settings(max_examples=100, deadline=None)
def test_rows_are_held_out_once(count, share, seed):
    train, held = (split_rows(count, share, seed, side).tolist() for side in ("train", "valid"))
    assert sorted([*train, *held]) == split_rows(count, share, seed, "all").tolist()
    assert train, "something is left to learn from"
    assert abs(len(held) - share * count) <= 1
    assert bool(held) == (share > 0 and count > 1)
    if count > 50 and 0.2 < share < 0.8:
        assert held != list(range(count - len(held), count)), "files are often sorted"


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_documents_in_a_window_are_blind_to_each_other(tmp_path, tokenizer, family):
    texts = [text(2, seed=seed) for seed in range(12)]
    sizes = {"d_model": 16, "num_layers": 2, "num_heads": 2, "max_seq_len": 256}
    more = {} if family == "gpt2" else {"d_ff": 24}
    model = ph.build(family, seed=0, vocab_size=tokenizer.vocab_size, **sizes, **more).eval()
    config = TrainConfig(context=150, held_out=0.0, out=str(tmp_path))
    found = text_windows(texts, tokenizer, model, config, "train", by_document=True)
    plain = text_windows(texts, tokenizer, model, config, "train")
    assert found.digest != plain.digest
    batch = found.batch(0, 2)
    assert torch.equal(batch.input_ids, plain.batch(0, 2).input_ids)
    states = model.backbone(
        batch.input_ids, attention_mask=batch.mask(), position_ids=batch.position_ids
    )
    for row in range(2):
        segments = batch.segments[row]
        assert segments.unique().numel() > 2
        for segment in segments.unique():
            own = segments == segment
            assert batch.position_ids[row][own].tolist() == list(range(int(own.sum())))
            alone = model.backbone(batch.input_ids[row][own][None])
            assert torch.allclose(states[row][own], alone[0], atol=1e-5)
        ends = (segments[1:] != segments[:-1]).nonzero()[:, 0]
        assert (batch.labels[row][ends] == -100).all()
        assert int((batch.labels[row] == -100).sum()) in (len(ends), len(ends) + 1)


def test_documents_cannot_be_told_apart_in_a_blend(tmp_path, tokenizer):
    model = tiny(tokenizer.vocab_size)
    config = TrainConfig(context=16, out=str(tmp_path))
    with pytest.raises(ConfigError, match="is for one corpus"):
        text_windows({"a": Corpus(["x"])}, tokenizer, model, config, "train", by_document=True)
