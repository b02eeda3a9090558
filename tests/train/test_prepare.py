"""Shards are the tokens of the texts, whoever made them and however often it was stopped."""

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys

import datasets
import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.test_floors import needed

import polyhead as ph
from polyhead.errors import ConfigError, DataError, FileError
from polyhead.files.disk import locked
from polyhead.text.tokenizer import Tokenizer
from polyhead.text.train import KINDS
from polyhead.train import prepared, sources, tokens
from polyhead.train.blend import Corpus, text_windows
from polyhead.train.corpus import load_tokens
from polyhead.train.prepare import prepare
from polyhead.train.tokens import Joined, joined

from .conftest import text, tiny

TEXTS = [text(1 + seed % 7, seed) for seed in range(30)]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(sources, "PIECE", 256)


def contents(folder):
    """Every file of a directory, by its path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def opened(folder, tokenizer):
    return load_tokens(folder, tokenizer, folder / "none", vocab_size=tokenizer.vocab_size)


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 40), st.integers(0, 40),
    st.randoms(),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_joined_arrays_are_one(sizes, first, last, random):
    parts = [np.array([random.randrange(99) for _ in range(n)], np.uint16) for n in sizes]
    whole = np.concatenate(parts)
    one = joined(parts)
    assert len(one) == len(whole)
    assert one.dtype == whole.dtype
    assert one.tolist() == whole.tolist()
    assert one.max(initial=3) == whole.max(initial=3)
    for at in (slice(first, last), slice(-first - 1, None), slice(None, -last - 1)):
        assert np.asarray(one[at]).tolist() == whole[at].tolist()
        assert np.asarray(one[at][1:], np.int64).tolist() == whole[at][1:].tolist()
    if len(whole):
        places = np.array([[random.randrange(len(whole)) for _ in range(5)] for _ in range(3)])
        assert (one[places] == whole[places]).all()
        assert one[places].dtype == whole.dtype


def test_joining_copies_nothing(tmp_path):
    for number in range(3):
        np.full(8, number, np.uint16).tofile(tmp_path / str(number))
    maps = [np.memmap(tmp_path / str(number), np.uint16, "r") for number in range(3)]
    one = joined(maps)
    assert isinstance(one, Joined)
    assert all(np.shares_memory(a, b) for a, b in zip(one.parts, maps, strict=True))
    assert np.shares_memory(one[9:14], maps[1]), "what lies in one part is of that part"


@pytest.mark.parametrize("shard_tokens", [1, 700, 1 << 20])
def test_tokens_are_those_of_the_texts(tmp_path, tokenizer, shard_tokens):
    long = [*TEXTS, text(80), ""]
    found = prepare(long, tokenizer, tmp_path / "made", shard_tokens=shard_tokens)
    size = tokenizer.vocab_size
    whole = load_tokens(long, tokenizer, tmp_path / "cache", vocab_size=size)
    made = opened(tmp_path / "made", tokenizer)
    assert made.ids.tolist() == whole.ids.tolist()
    assert made.ends.tolist() == whole.ends.tolist()
    assert made.text_bytes == whole.text_bytes == found.text_bytes
    assert (found.tokens, found.documents) == (len(whole.ids), len(long) - 1)
    shards = found.shards
    assert all(shard.tokens >= shard_tokens for shard in shards[:-1])
    assert (len(shards) > 3) == (shard_tokens < 1000)
    for one, other in zip(made.split(99, tokenizer), whole.split(99, tokenizer), strict=True):
        assert np.asarray(one.ids).tolist() == other.ids.tolist()
        assert one.ends.tolist() == other.ends.tolist()
        assert one.text_bytes == other.text_bytes


def test_the_digest_is_of_the_texts_and_the_tokenizer(tmp_path, tokenizer):
    def made(name, texts, words, **options):
        return prepare(texts, words, tmp_path / name, **options).digest

    first = made("a", TEXTS, tokenizer, shard_tokens=100)
    assert first == made("b", TEXTS, tokenizer)
    assert first != made("c", TEXTS[::-1], tokenizer)
    assert first != made("d", TEXTS, Tokenizer.train(TEXTS, kind="bytes"))
    assert made("e", ["ab", "c"], tokenizer) != made("f", ["a", "bc"], tokenizer)


@pytest.mark.parametrize("kind", KINDS)
def test_every_tokenizer_is_known_again(tmp_path, kind):
    words = Tokenizer.train(TEXTS, kind=kind, vocab_size=None if kind == "chars" else 300)
    prepare(TEXTS, words, tmp_path)
    again = Tokenizer.load(tmp_path)
    assert opened(tmp_path, again).ids.tolist() == opened(tmp_path, words).ids.tolist()


def test_workers_and_stops_leave_no_trace(tmp_path, tokenizer, monkeypatch):
    """One process, two, and one that is stopped at every shard write the same bytes."""
    prepare(TEXTS, tokenizer, tmp_path / "one", shard_tokens=700)
    prepare(TEXTS, tokenizer, tmp_path / "two", shard_tokens=700, workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    finish, stops = tokens.Writer.finish, 0

    def stopping(self, header):
        finish(self, header)
        raise KeyboardInterrupt

    monkeypatch.setattr(tokens.Writer, "finish", stopping)
    while True:
        try:
            prepare(TEXTS, tokenizer, tmp_path / "cut", shard_tokens=700)
            break
        except KeyboardInterrupt:
            stops += 1
            with pytest.raises(FileError, match="is not finished"):
                opened(tmp_path / "cut", tokenizer)
    assert stops == len(prepared.read_prepared(tmp_path / "one").shards) > 2
    assert contents(tmp_path / "one") == contents(tmp_path / "cut")


def test_what_is_there_is_not_made_again(tmp_path, tokenizer, monkeypatch):
    whole = prepare(TEXTS, tokenizer, tmp_path, shard_tokens=700)
    before = contents(tmp_path)
    (tmp_path / "shard-00002" / "tokens.bin").write_bytes(b"damaged")
    with pytest.raises(FileError, match="shard-00002 is missing or cut short"):
        opened(tmp_path, tokenizer)
    made = []
    finish = tokens.Writer.finish
    monkeypatch.setattr(
        tokens.Writer, "finish", lambda self, h: made.append(self.folder.name) or finish(self, h)
    )
    told = []
    prepare(TEXTS, tokenizer, tmp_path, shard_tokens=700, progress=lambda *a: told.append(a))
    assert contents(tmp_path) == before
    assert made == [f"shard-{n:05d}" for n in range(2, len(whole.shards))]
    assert told[-1] == (sum(map(len, TEXTS)), sum(map(len, TEXTS)), whole.tokens)
    made.clear()
    assert prepare(TEXTS, tokenizer, tmp_path, shard_tokens=700, workers=2) == whole
    assert made == []


CHILD = """
import time

def told(done, total, tokens):
    print(tokens, flush=True)
    time.sleep(0.05)

if __name__ == "__main__":
    from polyhead.text.tokenizer import Tokenizer
    from polyhead.train import sources
    from polyhead.train.prepare import prepare

    sources.PIECE = 256
    tokenizer = Tokenizer.load({tokenizer!r})
    prepare({texts!r}, tokenizer, {out!r}, shard_tokens=300, workers=2, progress=told)
"""


def of_group(process, group):
    """Whether a process is of a group, and not one that merely waits to be seen off."""
    try:
        return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_process_that_is_killed_goes_on(tmp_path, tokenizer, number):
    """Its workers go with it, and the next one ends with the bytes of one that nobody disturbed."""
    lines = "".join(TEXTS).splitlines()
    texts = tmp_path / "texts.csv"
    texts.write_text("\n".join(["text", *lines]))
    tokenizer.save(tmp_path / "tokenizer")
    script = tmp_path / "child.py"
    names = {"texts": "texts.csv", "tokenizer": "tokenizer", "out": "out"}
    script.write_text(CHILD.format(**{k: str(tmp_path / v) for k, v in names.items()}))
    child = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, text=True, start_new_session=True,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while int(child.stdout.readline()) < 900:
        pass
    os.killpg(child.pid, number) if number == signal.SIGINT else child.kill()
    child.wait()
    workers = [one for one in psutil.process_iter() if of_group(one, child.pid)]
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not any(of_group(one, child.pid) for one in alive), "workers go with the one that reads"
    there = sorted(path.name for path in (tmp_path / "out").glob("shard-*"))
    assert there, "whole shards are kept"
    prepare(texts, tokenizer, tmp_path / "out", shard_tokens=300)
    prepare(lines, tokenizer, tmp_path / "whole", shard_tokens=300)
    assert len(contents(tmp_path / "whole")) > 3 * len(there)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("touch", ["add", "finish"])
def test_a_full_disk_keeps_what_is_written(tmp_path, tokenizer, monkeypatch, touch):
    real, left = getattr(tokens.Writer, touch), [2]

    def full(self, value):
        if self.folder.name == "shard-00002":
            left[0] -= 1
            if left[0] >= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, value)

    monkeypatch.setattr(tokens.Writer, touch, full)
    for workers in (1, 2):
        with pytest.raises(FileError, match=r"No space left on device.*make room") as error:
            prepare(TEXTS, tokenizer, tmp_path / "a", shard_tokens=700, workers=workers)
        assert "\n" not in str(error.value)
        names = sorted(path.name for path in (tmp_path / "a").iterdir())
        assert [n for n in names if "shard" in n] == ["shard-00000", "shard-00001"]
    prepare(TEXTS, tokenizer, tmp_path / "a", shard_tokens=700)
    prepare(TEXTS, tokenizer, tmp_path / "b", shard_tokens=700)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_other_texts_and_settings_are_refused(tmp_path, tokenizer):
    other = Tokenizer.train(TEXTS, kind="bytes")
    before = None
    for texts, words, shard_tokens, error, says in [
        (TEXTS, tokenizer, 700, None, ""),
        ([*TEXTS, "more"], tokenizer, 700, DataError, "not those that"),
        (TEXTS[:-1], tokenizer, 700, DataError, "not those that"),
        ([TEXTS[1], *TEXTS[1:]], tokenizer, 700, DataError, "not those that"),
        (TEXTS, tokenizer, 701, ConfigError, "another shard_tokens:"),
        (TEXTS, other, 700, ConfigError, "another tokenizer"),
    ]:
        if error is None:
            prepare(texts, words, tmp_path, shard_tokens=shard_tokens)
            before = contents(tmp_path)
            continue
        with pytest.raises(error, match=says) as raised:
            prepare(texts, words, tmp_path, shard_tokens=shard_tokens)
        assert "\n" not in str(raised.value)
        assert contents(tmp_path) == before
    prepare(TEXTS[:9], other, tmp_path, force=True)
    assert opened(tmp_path, other).ends.size == 9


def test_bad_calls_say_what_to_do(tmp_path, tokenizer):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter").write_text("dear")
    (tmp_path / "file").write_text("x")
    cases = [
        (([], tmp_path / "new"), DataError, "the corpus is empty"),
        ((tmp_path / "none.txt", tmp_path / "no"), DataError, "no such file"),
        ((TEXTS, tmp_path / "full"), FileError, "holds other files"),
        ((TEXTS, tmp_path / "file"), FileError, "cannot be written"),
        ((["a", "b\ud800"], tmp_path / "new"), DataError, "half a surrogate pair"),
    ]
    for (texts, out), error, says in cases:
        with pytest.raises(error, match=says) as raised:
            prepare(texts, tokenizer, out)
        assert "\n" not in str(raised.value)
    assert not (tmp_path / "no").exists()
    assert contents(tmp_path / "full") == {"letter": b"dear"}
    for options in ({"workers": 0}, {"shard_tokens": 0}):
        with pytest.raises(ConfigError, match="1 at least"):
            prepare(TEXTS, tokenizer, tmp_path / "new", **options)
    prepare(TEXTS, tokenizer, tmp_path / "new")
    with pytest.raises(DataError, match="holds tokens, not texts"):
        prepare(tmp_path / "new", tokenizer, tmp_path / "newer")


def test_one_process_at_a_time(tmp_path, tokenizer):
    with (
        locked(tmp_path, "being prepared"),
        pytest.raises(FileError, match="being prepared by another"),
    ):
        prepare(TEXTS, tokenizer, tmp_path)


def test_a_worker_that_dies_is_said(tmp_path, tokenizer):
    def kill(*told):
        for child in multiprocessing.active_children():
            child.kill()

    with pytest.raises(FileError, match="go on with fewer workers"):
        prepare(TEXTS * 9, tokenizer, tmp_path, workers=2, progress=kill)


def test_workers_are_light():
    assert {root for root, _ in needed("polyhead.train.prepare")} == {"numpy", "tokenizers"}


def test_what_is_prepared_trains_as_the_texts_do(tmp_path, tokenizer):
    prepare(TEXTS, tokenizer, tmp_path / "made", shard_tokens=700)

    def trained(source, out, **options):
        config = ph.TrainConfig(
            steps=6, batch_size=2, context=24, log_every=1, validate_every=3, out=str(out)
        )
        trainer = ph.Trainer(
            tiny(tokenizer.vocab_size), tokenizer, config, options=options, quiet=True
        )
        found = trainer.fit(source)
        log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        return found["valid_loss"], [r["loss"] for r in log if "loss" in r]

    for number, options in enumerate(({}, {"by_document": True})):
        raw = trained(TEXTS, tmp_path / f"raw{number}", **options)
        assert raw == trained(tmp_path / "made", tmp_path / f"made{number}", **options)
    blends = [
        {"a": Corpus(source, 3.0), "b": Corpus([text(40, 9)])}
        for source in (TEXTS, tmp_path / "made")
    ]
    assert trained(blends[0], tmp_path / "b0") == trained(blends[1], tmp_path / "b1")


@pytest.mark.parametrize("objective", ["masked-lm", "sop", "span-corruption"])
def test_other_objectives_read_it_too(tmp_path, objective):
    from polyhead.train.registry import OBJECTIVES

    spans = [f"<extra_id_{n}>" for n in range(20)] if objective == "span-corruption" else []
    kind = "bpe" if spans else "wordpiece"
    words = Tokenizer.train(TEXTS, kind=kind, vocab_size=300, extra_tokens=spans)
    sizes = {"d_model": 16, "num_layers": 1, "num_heads": 2, "d_ff": 32}
    family = {"masked-lm": "bert", "sop": "albert"}.get(objective, "t5")
    head = {"sop": "pretraining"}.get(objective, "lm")
    model = ph.build(family, head=head, seed=0, vocab_size=words.vocab_size, **sizes)
    prepare(TEXTS, words, tmp_path / "made", shard_tokens=300)
    config = ph.TrainConfig(context=32, batch_size=2, out=str(tmp_path / "run"))
    make = OBJECTIVES[objective].dataset
    raw, made = (
        make(source, words, model, config, "train") for source in (TEXTS, tmp_path / "made")
    )
    for index in range(4):
        one, other = raw.batch(index, 2), made.batch(index, 2)
        assert repr(one) == repr(other)


def test_another_tokenizer_and_small_models_are_refused(tmp_path, tokenizer):
    prepare(TEXTS, tokenizer, tmp_path / "made")
    config = ph.TrainConfig(context=8, out=str(tmp_path / "run"))
    other = Tokenizer.train(TEXTS, kind="bytes")
    with pytest.raises(DataError, match="prepared with another tokenizer"):
        text_windows(tmp_path / "made", other, tiny(300), config, "train")
    with pytest.raises(DataError, match="vocabulary of 5"):
        text_windows(tmp_path / "made", tokenizer, tiny(5), config, "train")
    trainer = ph.Trainer(tiny(tokenizer.vocab_size), tokenizer, config, quiet=True)
    with pytest.raises(DataError, match="holds tokens, not texts"):
        trainer.evaluate(tmp_path / "made")
    (tmp_path / "made" / "prepared.json").write_text("{")
    with pytest.raises(FileError, match="cannot be read: prepare it anew"):
        opened(tmp_path / "made", tokenizer)


def test_a_stream_without_a_length(tmp_path, tokenizer):
    stream = datasets.IterableDataset.from_generator(lambda: ({"text": one} for one in TEXTS))
    told = []
    prepare(stream, tokenizer, tmp_path / "a", progress=lambda *a: told.append(a))
    prepare(TEXTS, tokenizer, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert told[-1][:2] == (len(TEXTS), 0)
