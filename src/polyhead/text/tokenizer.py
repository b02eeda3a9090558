"""Tokenizer: text to ids and back, over the `tokenizers` library."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import tokenizers

from polyhead.errors import ConfigError, DataError
from polyhead.text import directory
from polyhead.text.batch import Batch, collate
from polyhead.text.from_gguf import read_gguf
from polyhead.text.marian import TARGETS
from polyhead.text.special import ROLES, SpecialTokens, TokenizerParts
from polyhead.text.stream import TextStream, clean_up
from polyhead.text.train import DEFAULT_SPECIAL, KINDS, train_parts


class Tokenizer:
    """A vocabulary and its rules. Immutable once built, so threads may share it.

    `special_tokens` says which token plays which role; `pad_id`, `unk_id`, `bos_id`, `eos_id`,
    `mask_id`, `cls_id` and `sep_id` are None where there is no such token, but `pad_id` falls back
    to `eos_id`: the attention mask says which positions count.
    """

    def __init__(self, parts: TokenizerParts):
        self.backend: tokenizers.Tokenizer = parts.backend
        self.special_tokens = parts.special
        self.chat_templates: dict[str, str] = dict(parts.chat_templates)
        self.config: dict[str, Any] = dict(parts.config)
        # transformers cleans up for WordPiece and the like; with BPE it would eat real spaces
        self._clean_up = parts.clean_up and not isinstance(
            self.backend.model, tokenizers.models.BPE
        )
        self._stops, self._target = parts.stops, parts.target
        ids = {role: self.backend.token_to_id(token) for role, token in parts.special.items()}
        self.bos_id: int | None = ids.get("bos")
        self.eos_id: int | None = ids.get("eos")
        self.unk_id: int | None = ids.get("unk")
        self.mask_id: int | None = ids.get("mask")
        self.cls_id: int | None = ids.get("cls")
        self.sep_id: int | None = ids.get("sep")
        self.pad_id: int | None = ids.get("pad", self.eos_id)

    @classmethod
    def load(cls, path: str | Path, special_tokens: Mapping[str, str | None] | None = None) -> Self:
        """From a Hugging Face directory, or a tokenizer.json, vocab.txt or SentencePiece file.

        `special_tokens` names roles that the files leave open, or changes them.
        Errors: FileError for what is missing or cannot be read.
        """
        return cls(directory.read(Path(path), special_tokens))

    @classmethod
    def train(
        cls,
        texts: str | Iterable[str],
        kind: str = "bpe",
        vocab_size: int | None = None,
        special_tokens: Mapping[str, str | None] | None = None,
        *,
        extra_tokens: Sequence[str] = (),
        chat_template: str | None = None,
        min_frequency: int = 2,
        lowercase: bool = False,
        add_bos: bool = False,
        add_eos: bool = False,
    ) -> Self:
        """A new vocabulary from texts. Kinds:

        "chars" (a token for every distinct character), "bytes" (256 bytes, id = byte), "bpe"
        (byte-level BPE), "wordpiece" (BERT's), "unigram". `vocab_size` counts the special tokens;
        None keeps every character, and means 8192 where merges or pieces are learned.
        `special_tokens` changes roles of the kind's default; None takes one away.
        Errors: DataError for a corpus without text; ConfigError for an unknown kind or role, or a
        `vocab_size` that cannot hold the alphabet.
        """
        if kind not in KINDS:
            raise ConfigError(f"unknown kind {kind!r}; the kinds are {', '.join(KINDS)}")
        parts = train_parts(
            texts,
            kind,
            vocab_size,
            DEFAULT_SPECIAL[kind].updated(special_tokens),
            extra_tokens,
            min_frequency=min_frequency,
            lowercase=lowercase,
            add_bos=add_bos,
            add_eos=add_eos,
        )
        tokenizer = cls(parts)
        if chat_template is not None:
            tokenizer.chat_templates["default"] = chat_template
        return tokenizer

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Self:
        """From the metadata of a GGUF file: the vocabulary under its `tokenizer.` keys.

        Errors: FileError for a vocabulary that is missing, lies, or is of a kind not known here.
        """
        return cls(read_gguf(metadata))

    def save(self, path: str | Path, force: bool = False) -> None:
        """tokenizer.json, tokenizer_config.json, special_tokens_map.json, chat_template.jinja; of
        Marian's, target_tokenizer.json too.

        transformers loads the directory and gives the same ids. A file in the way is a FileError
        unless `force`. Further stop ids go into generation_config.json if there is none.
        """
        directory.write(
            Path(path),
            TokenizerParts(
                backend=self.backend,
                special=self.special_tokens,
                stops=self.eos_ids,
                chat_templates=self.chat_templates,
                clean_up=self._clean_up,
                config=self.config,
                target=self._target,
            ),
            force,
        )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of one text. Special tokens written out in the text become their ids."""
        check_text(text, "text 0")
        if len(text) < 10_000:  # for a short text starting the threads costs more than offsets
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool = True
    ) -> list[list[int]]:
        """The ids of many texts, without padding; several threads work at it."""
        for i, text in enumerate(texts):
            check_text(text, f"text {i}")
        # the "fast" call leaves out offsets: a quarter of the time
        found = self.backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in found]

    def encode_targets(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of texts that a model is to write, without special tokens.

        Those of `encode_batch`, but for Marian's tokenizers, which cut both languages by their own
        pieces. Errors: ConfigError where such a one was saved without its target's.
        """
        if self._target is None:
            if self._lacks_target:
                raise ConfigError(
                    "the tokenizer cuts source texts alone: target.spm or target_tokenizer.json "
                    "is missing beside it"
                )
            return self.encode_batch(texts, add_special_tokens=False)
        for i, text in enumerate(texts):
            check_text(text, f"text {i}")
        found = self._target.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids` (a list or a tensor of one row).

        An id beyond the vocabulary (models pad their tables) is no text. Negative: DataError.
        """
        row = _as_ints(ids)
        try:
            text = self.backend.decode(row, skip_special_tokens=skip_special_tokens)
        except OverflowError:
            wrong = next(i for i in row if not 0 <= i < 2**32)
            raise DataError(
                f"{wrong} is not a token id; ids are 0 to {self.vocab_size - 1}"
            ) from None
        return clean_up(text) if self._clean_up else text

    def decode_batch(
        self, rows: Iterable[Iterable[int]], skip_special_tokens: bool = True
    ) -> list[str]:
        """The text of every row of ids."""
        return [self.decode(row, skip_special_tokens) for row in rows]

    def __call__(
        self,
        texts: str | Sequence[str],
        text_pairs: str | Sequence[str] | None = None,
        *,
        max_len: int | None = None,
        truncate: bool = False,
        stride: int | None = None,
        add_special_tokens: bool = True,
        pad_to_multiple_of: int = 1,
    ) -> Batch:
        """Texts (or pairs) as one batch, padded on the right.

        max_len   tokens a row may have, special ones included. A longer text is a DataError unless
                  `truncate` (the longer of a pair loses its end first) or `stride` is given.
        stride    cut an over-long text into windows of `max_len` that share `stride` tokens; of a
                  pair the second text is cut. `batch.text_index` says whose each row is.
        Errors: DataError for an empty list, a text that is no string, or a text that is too long.
        """
        if isinstance(texts, str):
            texts = [texts]
        if isinstance(text_pairs, str):
            text_pairs = [text_pairs]
        if len(texts) == 0:
            raise DataError("the list of texts is empty; give at least one text")
        if text_pairs is not None and len(text_pairs) != len(texts):
            raise DataError(
                f"{len(texts)} texts but {len(text_pairs)} second texts; give one for each"
            )
        for i, text in enumerate(texts):
            check_text(text, f"text {i}")
        for i, text in enumerate(text_pairs or ()):
            check_text(text, f"second text {i}")
        inputs = list(texts) if text_pairs is None else list(zip(texts, text_pairs, strict=True))
        return collate(
            self.backend.encode_batch(inputs, add_special_tokens=add_special_tokens),
            0 if self.pad_id is None else self.pad_id,
            max_len=max_len,
            truncate=truncate,
            stride=stride,
            multiple=pad_to_multiple_of,
        )

    def stream(self, skip_special_tokens: bool = True) -> TextStream:
        """A decoder that takes one id at a time; see `TextStream`."""
        return TextStream(self.backend, skip_special_tokens, self._clean_up)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        size = self.backend.get_vocab_size()
        if self.backend.id_to_token(size - 1) is not None and size == len(self.vocab):
            return size
        return max(self.vocab.values(), default=-1) + 1

    @cached_property
    def vocab(self) -> dict[str, int]:
        """Every token with its id; built when first asked for."""
        return self.backend.get_vocab()

    @cached_property
    def _lacks_target(self) -> bool:
        return self._target is None and any(piece.startswith(TARGETS) for piece in self.vocab)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids of every special token: those with a role and the other control tokens."""
        added = self.backend.get_added_tokens_decoder().items()
        return frozenset(i for i, token in added if token.special)

    @cached_property
    def special_texts(self) -> tuple[str, ...]:
        """The same tokens as they are written."""
        added = self.backend.get_added_tokens_decoder().values()
        return tuple(token.content for token in added if token.special)

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """Every id at which generation stops, the eos token first.

        The eos token; what the files list (`eos_token_id` of generation_config.json, a GGUF's
        eos and end-of-turn ids); and the special token that the chat template itself writes right
        after an assistant's words, found by rendering a short conversation.
        """
        found = [] if self.eos_id is None else [self.eos_id]
        found += self._stops
        if self.chat_template is not None:
            from polyhead.text import chat  # Jinja is slow to import, and few need it

            end = chat.end_of_turn(
                self.chat_template, self.named_special_tokens, self.special_texts
            )
            end_id = None if end is None else self.backend.token_to_id(end)
            found += [] if end_id is None else [end_id]
        return tuple(dict.fromkeys(found))

    @property
    def named_special_tokens(self) -> dict[str, str]:
        """The roles as templates know them: {"bos_token": "<s>", ...}."""
        return {f"{role}_token": token for role, token in self.special_tokens.items()}

    @property
    def chat_template(self) -> str | None:
        """The template used unless another is named; None where there is none."""
        return self.chat_templates.get("default")

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        *,
        template: str | None = None,
        **variables: Any,
    ) -> str:
        """A conversation as the text the model was taught to continue.

        Encode it with `add_special_tokens=False`: templates write their own. `template` is the
        name of one of `chat_templates`; without it "tool_use" is taken for `tools`, else "default".
        Errors: DataError for messages the template refuses, FileError for a template that is
        broken, unsafe, or takes too long.
        """
        from polyhead.text import chat

        return chat.render(
            chat.pick(self.chat_templates, template, bool(tools)),
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            **{**self.named_special_tokens, **variables},
        )

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        roles = ", ".join(f"{role}={getattr(self.special_tokens, role)!r}" for role in ROLES)
        return f"Tokenizer({type(self.backend.model).__name__}, {self.vocab_size} tokens, {roles})"


def check_text(text: Any, name: str) -> None:
    """DataError unless `text` is a string that UTF-8 can write."""
    if not isinstance(text, str):
        raise DataError(f"{name} is a {type(text).__name__}, not a string")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{name} holds half a surrogate pair at character {error.start}; "
                "decode it with errors='replace' first"
            ) from None


def _as_ints(ids: Any) -> list[int]:
    if hasattr(ids, "tolist"):
        ids = ids.tolist()
    row = [ids] if isinstance(ids, int) else list(ids)
    if not all(isinstance(i, int) for i in row):
        raise DataError("decode takes the ids of one text; use decode_batch for several rows")
    return row


__all__ = ["Batch", "SpecialTokens", "TextStream", "Tokenizer"]
