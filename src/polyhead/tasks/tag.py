"""Tags of words and the names they make: token classification. T tokens, C tags."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import models

from polyhead.errors import ConfigError, DataError
from polyhead.models.model import TaskModel
from polyhead.nn.mode import evaluating
from polyhead.tasks.batching import MOST_TOKENS, Progress, batches, inputs, longest
from polyhead.tasks.fit import fit
from polyhead.text.tokenizer import Tokenizer, check_text

AGGREGATIONS = ("none", "simple", "first", "max", "average")
OUTSIDE = "O"
WINDOW = 512


@dataclass(frozen=True)
class Entity:
    """A piece of a text with its tag. start, end: its characters, `text == whole[start:end]`."""

    label: str
    text: str
    start: int
    end: int
    score: float


@dataclass(frozen=True)
class _Token:
    """A token, or a word of several, with the probability of each tag [C]."""

    start: int
    end: int
    scores: np.ndarray
    goes_on: bool = False


class Tagger:
    """Texts to the entities in them: `Tagger(model, tokenizer)(["Ada lives in London"])`.

    aggregation, as in transformers: "none" gives each token that is not O with its tag; "simple"
    joins neighbours of one tag, where B- begins anew; "first", "max" and "average" let the tokens
    of a word agree before. head: which one, where the model has several. Errors: ConfigError for a
    model that does not tag.
    """

    def __init__(
        self,
        model: TaskModel,
        tokenizer: Tokenizer,
        aggregation: str = "simple",
        head: str | None = None,
        window: int | None = None,
        stride: int | None = None,
    ) -> None:
        """window: tokens of a piece of a long text; stride: how many two pieces share."""
        if aggregation not in AGGREGATIONS:
            raise ConfigError(
                f"aggregation {aggregation!r} is not one of {', '.join(AGGREGATIONS)}"
            )
        self.model, self.tokenizer, self.aggregation = model, tokenizer, aggregation
        self.fit = fit(model, "tag", head)
        most = longest(model, window) or WINDOW
        self.window = min(most, WINDOW) if window is None else most
        self.stride = min(self.window // 4, 128) if stride is None else stride
        prefix = getattr(tokenizer.backend.model, "continuing_subword_prefix", None)
        self._has_prefix = isinstance(tokenizer.backend.model, models.WordPiece) or bool(prefix)

    def __call__(
        self,
        texts: str | Sequence[str],
        *,
        most_tokens: int = MOST_TOKENS,
        progress: Progress | None = None,
    ) -> list[list[Entity]]:
        """The entities of each text, in the order of texts and within them; O is left out.

        Long texts are read in windows; each token is tagged where most stands around it. Errors:
        DataError for texts that are empty or no strings.
        """
        texts = [texts] if isinstance(texts, str) else texts
        found: dict[int, list[Entity]] = {}
        for text, tokens in self._tokens(texts, most_tokens, progress):
            found[text] = self._entities(texts[text], tokens)
        return [found[i] for i in range(len(texts))]

    def words(
        self,
        rows: Sequence[Sequence[str]],
        *,
        most_tokens: int = MOST_TOKENS,
        progress: Progress | None = None,
    ) -> list[list[Entity]]:
        """A tag for each word, O too; a word's first token speaks for it.

        Words are joined by spaces, as in training. start and end are in the joined text.
        """
        for i, row in enumerate(rows):
            if isinstance(row, str):
                raise DataError(f"row {i} is a string; give its words as a list")
            for word in row:
                check_text(word, f"a word of row {i}")
        texts = [" ".join(row) for row in rows]
        found: dict[int, list[Entity]] = {}
        for text, tokens in self._tokens(texts, most_tokens, progress):
            found[text] = self._words(rows[text], tokens, text)
        return [found[i] for i in range(len(rows))]

    def _tokens(
        self, texts: Sequence[str], most_tokens: int, progress: Progress | None
    ) -> Iterator[tuple[int, list[_Token]]]:
        """Each text's number and its tokens with their scores."""
        waiting: dict[int, _Windows] = {}
        with evaluating(self.model), torch.inference_mode():
            for batch in batches(
                self.tokenizer,
                texts,
                max_len=self.window,
                stride=self.stride,
                most_tokens=most_tokens,
                progress=progress,
            ):
                named = {} if self.fit.name is None else {"head": self.fit.name}
                logits = self.model(**inputs(self.model, batch), **named)
                scores = logits.float().softmax(-1).cpu().numpy()
                for row, text in enumerate(batch.text_index.tolist()):
                    own = (batch.sequence_ids[row] == 0).numpy()
                    waiting.setdefault(text, _Windows(self.stride)).add(
                        batch.input_ids[row].numpy()[own],
                        batch.offsets[row].numpy()[own],
                        scores[row][own],
                    )
        for text, windows in waiting.items():
            yield (
                text,
                [self._token(texts[text], *token) for token in zip(*windows.merged(), strict=True)],
            )

    def _token(self, text: str, token_id: Any, place: Any, scores: np.ndarray) -> _Token:
        start, end = int(place[0]), int(place[1])
        if self._has_prefix:
            token = self.tokenizer.backend.id_to_token(int(token_id)) or ""
            goes_on = len(token) != end - start
        else:
            goes_on = start > 0 and " " not in text[start - 1 : start + 1]
        return _Token(start, end, scores, goes_on and int(token_id) != self.tokenizer.unk_id)

    def _entities(self, text: str, tokens: list[_Token]) -> list[Entity]:
        if self.aggregation not in ("none", "simple"):
            tokens = list(_agreed(tokens, self.aggregation))
        tagged = [(token, *self._best(token)) for token in tokens]
        if self.aggregation == "none":
            groups = [[one] for one in tagged]
        else:
            groups = list(_grouped(tagged))
        found: list[Entity] = []
        for group in groups:
            label, start, end = group[0][1], group[0][0].start, group[-1][0].end
            if self.aggregation != "none":
                label = label.split("-", 1)[-1]
            score = sum(score for _, _, score in group) / len(group)
            if label != OUTSIDE:
                found.append(Entity(label, text[start:end], start, end, score))
        return found

    def _words(self, words: Sequence[str], tokens: list[_Token], row: int) -> list[Entity]:
        found: list[Entity] = []
        at = start = 0
        for word in words:
            end = start + len(word)
            # A token may begin with the space before its word.
            while at < len(tokens) and tokens[at].end <= start:
                at += 1
            if not word or at == len(tokens) or tokens[at].start >= end:
                raise DataError(
                    f"the tokenizer has no token for word {len(found)} of row {row}, {word!r}; "
                    "leave it out"
                )
            label, score = self._best(tokens[at])
            found.append(Entity(label, word, start, end, score))
            start = end + 1
        return found

    def _best(self, token: _Token) -> tuple[str, float]:
        best = int(token.scores.argmax())
        return self.fit.labels[best], float(token.scores[best])


class _Windows:
    """The windows of one text, put together: of what two share, each takes its nearer half."""

    def __init__(self, stride: int) -> None:
        self.stride = stride
        self.parts: list[tuple[np.ndarray, ...]] = []

    def add(self, *part: np.ndarray) -> None:
        """The next window: ids, offsets and scores of its tokens."""
        self.parts.append(part)

    def merged(self) -> tuple[np.ndarray, ...]:
        """Ids, offsets and scores of the whole text."""
        if len(self.parts) == 1:
            return self.parts[0]
        left, right = self.stride // 2, self.stride - self.stride // 2
        kept: list[tuple[np.ndarray, ...]] = []
        for number, part in enumerate(self.parts):
            first = 0 if number == 0 else left
            last = len(part[0]) - (0 if number == len(self.parts) - 1 else right)
            kept.append(tuple(values[first:last] for values in part))
        return tuple(np.concatenate(values) for values in zip(*kept, strict=True))


def _agreed(tokens: list[_Token], aggregation: str) -> Iterator[_Token]:
    """Words in the place of their tokens."""
    word: list[_Token] = []
    for token in tokens:
        if word and not token.goes_on:
            yield _word(word, aggregation)
            word = []
        word.append(token)
    if word:
        yield _word(word, aggregation)


def _word(tokens: list[_Token], aggregation: str) -> _Token:
    if aggregation == "first":
        scores = tokens[0].scores
    elif aggregation == "max":
        scores = max((token.scores for token in tokens), key=lambda scores: scores.max())
    else:
        scores = np.stack([token.scores for token in tokens]).mean(0)
    return _Token(tokens[0].start, tokens[-1].end, scores)


def _grouped(tagged: list[tuple[_Token, str, float]]) -> Iterator[list[tuple[_Token, str, float]]]:
    """Neighbours of one tag; B- begins a group of its own."""
    group: list[tuple[_Token, str, float]] = []
    for one in tagged:
        if group and (one[1].startswith("B-") or _tag(one[1]) != _tag(group[-1][1])):
            yield group
            group = []
        group.append(one)
    if group:
        yield group


def _tag(label: str) -> str:
    return label[2:] if label.startswith(("B-", "I-")) else label
