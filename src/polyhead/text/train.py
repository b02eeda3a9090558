"""Training recipes: characters, bytes, byte-level BPE, WordPiece, Unigram.

The same texts in the same order give the same vocabulary, on every run.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from polyhead.errors import ConfigError, DataError, PolyheadError
from polyhead.text.special import SpecialTokens, TokenizerParts, add_special, frame, frame_bert

_CAUSAL = SpecialTokens(pad="<|pad|>", bos="<|endoftext|>", eos="<|endoftext|>")
_BERT = SpecialTokens(pad="[PAD]", unk="[UNK]", mask="[MASK]", cls="[CLS]", sep="[SEP]")

DEFAULT_SPECIAL = {
    "chars": _CAUSAL.updated({"unk": "<|unk|>"}),
    "bytes": _CAUSAL,
    "bpe": _CAUSAL,
    "wordpiece": _BERT,
    "unigram": _CAUSAL.updated({"unk": "<|unk|>"}),
}
KINDS = tuple(DEFAULT_SPECIAL)


def train_parts(
    texts: str | Iterable[str],
    kind: str,
    vocab_size: int | None,
    special: SpecialTokens,
    extra: Sequence[str],
    *,
    min_frequency: int = 2,
    lowercase: bool = False,
    add_bos: bool = False,
    add_eos: bool = False,
) -> TokenizerParts:
    """A trained vocabulary with its special tokens first (kind "bytes": after the 256 bytes).

    Errors: DataError for a corpus without text, ConfigError for a `vocab_size` that cannot hold
    the special tokens and the alphabet, for an unknown kind, and for a role that is missing.
    """
    if vocab_size is not None and vocab_size < 1:
        raise ConfigError(f"vocab_size is {vocab_size}; give a positive number")
    if kind in ("chars", "wordpiece", "unigram") and special.unk is None:
        raise ConfigError(f"kind {kind!r} needs an unk token for what it has not seen; name one")
    tokens = list(dict.fromkeys([*special.distinct(), *extra]))
    corpus = _Corpus([texts] if isinstance(texts, str) else texts)
    try:
        backend = _RECIPES[kind](corpus, vocab_size, special, tokens, min_frequency, lowercase)
    except PolyheadError:
        raise
    except Exception as error:  # the library raises bare Exception
        corpus.check()
        if "not large enough" not in str(error):
            raise
        raise ConfigError(
            f"vocab_size {vocab_size} is too small for the alphabet of these texts; raise it"
        ) from None
    corpus.check()
    add_special(backend, tokens)
    if vocab_size is not None and backend.get_vocab_size() > vocab_size:
        raise ConfigError(
            f"vocab_size {vocab_size} is too small: the special tokens and the alphabet of these "
            f"texts take {backend.get_vocab_size()}; give at least that"
        )
    _frame(backend, special, add_bos, add_eos)
    return TokenizerParts(backend=backend, special=special)


class _Corpus:
    """The texts, read once, counted, and checked to be texts."""

    def __init__(self, texts: Iterable[str]):
        self.texts = texts
        self.length = 0

    def __iter__(self) -> Iterator[str]:
        for i, text in enumerate(self.texts):
            if not isinstance(text, str):
                raise DataError(f"text {i} of the corpus is a {type(text).__name__}, not a string")
            self.length += len(text)
            yield text

    def check(self) -> None:
        if not self.length:
            raise DataError("the corpus holds no text; give at least one text that is not empty")


def _frame(backend: Backend, special: SpecialTokens, add_bos: bool, add_eos: bool) -> None:
    for wanted, role in ((add_bos, "bos"), (add_eos, "eos")):
        if wanted and getattr(special, role) is None:
            raise ConfigError(f"add_{role} is set but no {role} token is named")
    if add_bos or add_eos:
        frame(backend, special.bos if add_bos else None, special.eos if add_eos else None)
    elif special.cls is not None and special.sep is not None:
        frame_bert(backend, special.cls, special.sep)


def _train_chars(
    corpus: Iterable[str],
    vocab_size: int | None,
    special: SpecialTokens,
    tokens: list[str],
    min_frequency: int,
    lowercase: bool,
) -> Backend:
    counts: Counter[str] = Counter()
    for text in corpus:
        counts.update(text.lower() if lowercase else text)
    kept = sorted(counts)
    if vocab_size is not None:
        # The most frequent characters stay; ties go to the smaller code point.
        kept = sorted(sorted(kept, key=lambda c: -counts[c])[: max(0, vocab_size - len(tokens))])
    alphabet = [c for c in kept if c not in tokens]
    vocab = {token: i for i, token in enumerate([*tokens, *alphabet])}
    # BPE without merges: one symbol a character, also for text that is one long "word".
    backend = Backend(models.BPE(vocab=vocab, merges=[], unk_token=special.unk))
    if lowercase:
        backend.normalizer = normalizers.Lowercase()
    backend.decoder = decoders.Fuse()
    return backend


def _train_bytes(
    corpus: Iterable[str],
    vocab_size: int | None,
    special: SpecialTokens,
    tokens: list[str],
    min_frequency: int,
    lowercase: bool,
) -> Backend:
    for _ in corpus:  # read for its length alone
        pass
    vocab = {char: byte for byte, char in enumerate(byte_alphabet())}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if lowercase:
        backend.normalizer = normalizers.Lowercase()
    return backend


def byte_alphabet() -> list[str]:
    """The character GPT-2 writes each byte as: itself where it prints, else one from U+0100 on."""
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printing else chr(next(hidden)) for byte in range(256)]


def _train_bpe(
    corpus: Iterable[str],
    vocab_size: int | None,
    special: SpecialTokens,
    tokens: list[str],
    min_frequency: int,
    lowercase: bool,
) -> Backend:
    smallest = 256 + len(tokens)
    if vocab_size is not None and vocab_size < smallest:
        raise ConfigError(
            f"vocab_size {vocab_size} is too small: 256 bytes and {len(tokens)} special tokens "
            f"need at least {smallest}"
        )
    backend = Backend(models.BPE())
    if lowercase:
        backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size or 8192,
        min_frequency=min_frequency,
        special_tokens=tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(corpus, trainer)
    return backend


def _train_wordpiece(
    corpus: Iterable[str],
    vocab_size: int | None,
    special: SpecialTokens,
    tokens: list[str],
    min_frequency: int,
    lowercase: bool,
) -> Backend:
    def trained(first: list[str], min_frequency: int) -> dict[str, int]:
        backend.train_from_iterator(
            texts,
            trainers.WordPieceTrainer(
                vocab_size=vocab_size or 8192,
                min_frequency=min_frequency,
                special_tokens=first,
                show_progress=False,
            ),
        )
        return backend.get_vocab()

    backend = Backend(models.WordPiece(unk_token=special.unk))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    # The trainer numbers "##a" in an order that changes from run to run, and breaks ties by number:
    # a first round without merges finds the alphabet, and the second is given it in order.
    texts = list(corpus)
    alphabet = sorted(set(trained(tokens, sys.maxsize)) - set(tokens), key=lambda t: (len(t), t))
    vocab = trained([*tokens, *alphabet], min_frequency)
    settled = Backend(models.WordPiece(vocab=vocab, unk_token=special.unk))
    settled.normalizer, settled.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    settled.decoder = backend.decoder
    return settled


def _train_unigram(
    corpus: Iterable[str],
    vocab_size: int | None,
    special: SpecialTokens,
    tokens: list[str],
    min_frequency: int,
    lowercase: bool,
) -> Backend:
    backend = Backend(models.Unigram())
    if lowercase:
        backend.normalizer = normalizers.Lowercase()
    # "first": a text gets one leading mark, what follows a special token none, so decoding is exact
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size or 8192,
        special_tokens=tokens,
        unk_token=special.unk,
        show_progress=False,
    )
    backend.train_from_iterator(corpus, trainer)
    return _settled(backend, len(tokens))


def _settled(backend: Backend, specials: int) -> Backend:
    """The trained pieces with settled scores, ordered by score and then by spelling.

    Two things change from run to run: the last digits of the scores (floats added up in another
    order), and which of the characters that had lost their score gets which step above the lowest.
    So scores are kept in steps of 2^-12, which also tokenizer.json keeps exactly and which add up
    exactly, and those characters all get the lowest.
    """
    described = json.loads(backend.to_str())
    vocab = described["model"]["vocab"]
    low = min(score for _, score in vocab)
    settled = [
        (piece, low if len(piece) == 1 and _is_step(score - low) else score)
        for piece, score in vocab[specials:]
    ]
    rounded = [(piece, round(score * 4096) / 4096) for piece, score in settled]
    learned = sorted(rounded, key=lambda entry: (-entry[1], entry[0]))
    described["model"]["vocab"] = [*vocab[:specials], *learned]
    return Backend.from_str(json.dumps(described))


def _is_step(above: float) -> bool:
    """The trainer puts back characters it had dropped, each 0.0001 above the one before."""
    return abs(above / 1e-4 - round(above / 1e-4)) < 1e-6


_RECIPES: dict[str, Callable[..., Backend]] = {
    "chars": _train_chars,
    "bytes": _train_bytes,
    "bpe": _train_bpe,
    "wordpiece": _train_wordpiece,
    "unigram": _train_unigram,
}
