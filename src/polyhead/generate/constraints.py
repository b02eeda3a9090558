"""What an answer may not say next, and what it must. `N` rows, `V` tokens of the vocabulary."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from polyhead.generate.sampling import penalize_counts, penalize_repetition
from polyhead.generate.search_config import SearchConfig


class Constraints:
    """Of one config, on logits or log-probabilities `[N, V]`; the caller's stay as they are.

    ends: the tokens that end an answer. Order as in transformers: penalties, n-grams, bad words,
    the least length, forced tokens.
    """

    def __init__(self, config: SearchConfig, ends: Collection[int]) -> None:
        self.config = config
        self.ends = sorted(ends)
        # An end token is no bad word, whatever a file says.
        self.bad_words = [word for word in config.bad_words_ids if word not in {(e,) for e in ends}]
        self.penalizes = (
            config.repetition_penalty != 1 or config.presence_penalty or config.frequency_penalty
        )

    def __call__(
        self, scores: Tensor, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
    ) -> Tensor:
        """Scores of the next token of each row, whose answers so far are all of one length."""
        config, written = self.config, len(answers[0])
        if self.penalizes:
            scores = self._penalized(scores, prompts, answers)
        banned: list[tuple[int, int]] = []
        if config.no_repeat_ngram_size or self.bad_words:
            for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
                text = [*prompt, *answer]
                banned += [(row, token) for token in self._banned(text)]
        if written < config.min_new_tokens:
            banned += [(row, end) for row in range(len(scores)) for end in self.ends]
        if banned:
            index = torch.tensor(banned, device=scores.device).T
            scores = scores.index_put((index[0], index[1]), scores.new_tensor(-torch.inf))
        if written == 0 and config.forced_bos_token_id is not None:
            scores = _forced(scores, config.forced_bos_token_id)
        if written == config.max_new_tokens - 1 and config.forced_eos_token_id is not None:
            scores = _forced(scores, config.forced_eos_token_id)
        return scores

    def _penalized(
        self, scores: Tensor, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
    ) -> Tensor:
        config, num_rows, device = self.config, len(scores), scores.device

        def column(value: float) -> Tensor:
            return torch.full((num_rows,), value, device=device)

        if config.repetition_penalty != 1:
            texts = [[*p, *a] for p, a in zip(prompts, answers, strict=True)]
            width = max(map(len, texts))
            # Padded with what is there already: a token seen twice is penalized once.
            seen = [text + text[:1] * (width - len(text)) for text in texts]
            index = torch.tensor(seen, device=device)
            scores = penalize_repetition(scores, index, column(config.repetition_penalty))
        if answers[0] and (config.presence_penalty or config.frequency_penalty):
            drawn = torch.tensor([list(answer) for answer in answers], device=device)
            presence, frequency = config.presence_penalty, config.frequency_penalty
            scores = penalize_counts(scores, drawn, column(presence), column(frequency))
        return scores

    def _banned(self, text: list[int]) -> set[int]:
        """Tokens that would complete a bad word, or a run that is there already."""
        found = {
            word[-1]
            for word in self.bad_words
            if len(word) == 1 or tuple(text[-len(word) + 1 :]) == word[:-1]
        }
        size = self.config.no_repeat_ngram_size
        if size and len(text) >= size:
            last = text[len(text) - size + 1 :]
            for start in range(len(text) - size + 1):
                if text[start : start + size - 1] == last:
                    found.add(text[start + size - 1])
        return found


def _forced(scores: Tensor, token: int) -> Tensor:
    forced = torch.full_like(scores, -torch.inf)
    forced[:, token] = 0.0
    return forced
