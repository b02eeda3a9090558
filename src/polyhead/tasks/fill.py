"""What stands behind a mask: masked language models. V vocabulary, M masks."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polyhead.errors import ConfigError, DataError
from polyhead.models.model import TaskModel
from polyhead.nn.head import Heads, MaskedLanguageHead
from polyhead.nn.mode import evaluating
from polyhead.tasks.batching import MOST_TOKENS, Progress, batches, inputs
from polyhead.tasks.fit import fit, kind_of
from polyhead.text.batch import Batch
from polyhead.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Filling:
    """A token for a mask, its probability, and the text with it in place."""

    token: str
    token_id: int
    score: float
    text: str


class Filler:
    """Texts with masks to what stands there: `Filler(model, tokenizer)(["Ada [MASK] code."])`.

    `mask` is how this tokenizer writes one. Errors: ConfigError for a model that fills no masks,
    DataError for a tokenizer without a mask token.
    """

    def __init__(self, model: TaskModel, tokenizer: Tokenizer) -> None:
        if kind_of(model) != "encoder":
            raise ConfigError(
                f"{model.config.model_type} is of the kind {kind_of(model)} and fills no masks; "
                "that needs an encoder with a masked-LM head, such as bert"
            )
        if tokenizer.mask_id is None or tokenizer.special_tokens.mask is None:
            raise DataError(
                "the tokenizer has no mask token; use the one that belongs to a masked-LM model"
            )
        self.model, self.tokenizer = model, tokenizer
        self.fit = fit(model, "lm")
        self.mask: str = tokenizer.special_tokens.mask
        self.mask_id: int = tokenizer.mask_id

    def __call__(
        self,
        texts: str | Sequence[str],
        *,
        top_k: int = 5,
        most_tokens: int = MOST_TOKENS,
        progress: Progress | None = None,
    ) -> list[list[list[Filling]]]:
        """For each text, and each of its masks, the `top_k` likeliest tokens, the best first.

        Errors: DataError for texts without a mask, empty or longer than the model.
        """
        texts = [texts] if isinstance(texts, str) else texts
        if top_k < 1:
            raise ConfigError(f"top_k is {top_k}; it must be at least 1")
        found: dict[int, list[list[Filling]]] = {}
        with evaluating(self.model), torch.inference_mode():
            for batch in batches(
                self.tokenizer, texts, max_len=None, most_tokens=most_tokens, progress=progress
            ):
                masks = batch.input_ids == self.mask_id
                if not bool(masks.any(1).all()):
                    row = int(masks.any(1).logical_not().nonzero()[0])
                    raise DataError(
                        f"text {int(batch.text_index[row])} has no mask to fill; write "
                        f"{self.mask} where one word is missing"
                    )
                scores, ids = self._probabilities(batch, masks).topk(
                    min(top_k, self.tokenizer.vocab_size)
                )
                rows = masks.nonzero()[:, 0].tolist()
                for row, text in enumerate(batch.text_index.tolist()):
                    own = [i for i, owner in enumerate(rows) if owner == row]
                    ranked = [(ids[i].tolist(), scores[i].tolist()) for i in own]
                    found[text] = self._fillings(batch.input_ids[row][: batch.lengths[row]], ranked)
        return [found[i] for i in range(len(texts))]

    def _probabilities(self, batch: Batch, masks: Tensor) -> Tensor:
        """`[M, V]` at the masks, row by row."""
        model, name = self.model, self.fit.name
        given = inputs(model, batch)
        head = model.head.pick(name) if isinstance(model.head, Heads) else model.head
        if isinstance(head, MaskedLanguageHead):
            # A vocabulary at every token would cost more than the rest of the model.
            logits = head(model.hidden(head=name, **given)[masks.to(model.device)])
        else:
            named = {} if name is None else {"head": name}
            logits = model(**given, **named)[masks.to(model.device)]
        return logits.float().softmax(-1).cpu()

    def _fillings(
        self, row: Tensor, ranked: list[tuple[list[int], list[float]]]
    ) -> list[list[Filling]]:
        """For each mask of a row what its ids and scores say."""
        places = (row == self.mask_id).nonzero()[:, 0].tolist()
        others = self.tokenizer.special_ids - {self.mask_id}
        found: list[list[Filling]] = []
        for place, (ids, scores) in zip(places, ranked, strict=True):
            choices: list[Filling] = []
            for token_id, score in zip(ids, scores, strict=True):
                filled = row.tolist()
                filled[place] = token_id
                kept = [i for i in filled if i not in others]
                # The masks beside it stay to be seen; a text's only one is gone.
                text = self.tokenizer.decode(kept, skip_special_tokens=len(places) == 1)
                token = self.tokenizer.decode([token_id], skip_special_tokens=False)
                choices.append(Filling(token, token_id, score, text))
            found.append(choices)
        return found
