"""The window MLP: the next token from the last few, by one hidden layer (Bengio et al. 2003).

y = b + U tanh(d + H x), where x are the embeddings of the last n tokens, one after the other; with
direct connections also + W x. `B` rows, `T` tokens, `K` of them held, `E` width of a vector.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyhead.models.backbone import make_caches, place
from polyhead.models.config import Config, Row, hf
from polyhead.models.heads import HeadKind
from polyhead.models.keys import Rule, Rules
from polyhead.nn.cache import Caches
from polyhead.nn.embedding import TokenEmbedding
from polyhead.nn.head import LanguageHead
from polyhead.nn.mask import Mask


def _make_head(config: Any) -> LanguageHead:
    """U and b; beside U, W where there are direct connections."""
    return LanguageHead(config.num_states, config.vocab_size, bias=True)


def _head_rules(config: Any) -> Rules:
    return (Rule("lm_head.weight", "weight"), Rule("lm_head.bias", "bias"))


ROWS = (
    Row(
        "window_mlp",
        "WindowMLP",
        "model.",
        {"lm": HeadKind("ForCausalLM", _make_head, _head_rules)},
    ),
)


@dataclass(frozen=True, kw_only=True)
class WindowMLPConfig(Config):
    """Sizes of a window MLP; unless named, those of the paper's best on the Brown corpus.

    d_model: units of the hidden layer. embedding_width: of a token's vector. window: tokens that
    are read, the current one among them. direct: whether the output reads the vectors as well.
    """

    vocab_size: int = hf("vocab_size", default=16383)
    d_model: int = hf("hidden_size", default=100)
    embedding_width: int = hf("embedding_size", default=30)
    window: int = hf("window_size", default=4)
    direct: bool = hf("direct_connections", default=False)
    max_seq_len: int = hf("max_position_embeddings", default=2048)
    init_std: float = hf("initializer_range", default=0.02)

    @classmethod
    def rows(cls) -> tuple[Row, ...]:
        return ROWS

    @property
    def read_width(self) -> int:
        """Numbers that the hidden layer reads."""
        return self.window * self.embedding_width

    @property
    def num_states(self) -> int:
        """Numbers that the head reads."""
        return self.d_model + (self.read_width if self.direct else 0)


class WindowMLP(nn.Module):
    """Token ids `[B, T]` to what the head reads `[B, T, num_states]`."""

    def __init__(self, config: WindowMLPConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = TokenEmbedding(config.vocab_size, config.embedding_width)
        self.hidden = nn.Linear(config.read_width, config.d_model)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | Mask | None = None,
        caches: Caches | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        x = self.embedding(input_ids)
        num_tokens, window = x.shape[1], self.config.window
        placed = place(input_ids, attention_mask, position_ids, caches, [window], None, x.dtype)
        held, own = x, torch.arange(num_tokens, device=x.device)[None]
        cache = placed.caches[0]
        if caches is not None and cache is not None:
            held, own = cache.append(x[:, None], x[:, None], placed.at)[0][:, 0], placed.at
            caches.end()
        # Where the tokens of each window are held, the oldest first.
        slots = own[..., None] - torch.arange(window - 1, -1, -1, device=x.device)
        mask = placed.masks[0].boolean(num_tokens, held.shape[1], x.device)
        x = _windows(held, slots, mask).flatten(2)
        y = torch.tanh(self.hidden(x))
        return torch.cat([y, x], -1) if self.config.direct else y

    def make_caches(self, batch_size: int, max_len: int | None = None) -> Caches:
        """An empty cache of the tokens' vectors: static of `max_len` positions, or growing."""
        like = self.embedding.weight
        return make_caches(batch_size, max_len, [None], 1, self.config.embedding_width, like)


def _windows(held: Tensor, slots: Tensor, mask: Tensor | None) -> Tensor:
    """The vectors `[B, T, n, E]` at `slots` `[B|1, T, n]` of what is held `[B, K, E]`.

    Zeros stand before the beginning of a text, and where `mask` `[B|1, 1, T, K]` hides a token.
    """
    batch, num_held = held.shape[:2]
    slots = slots.expand(batch, -1, -1)
    seen, at = slots >= 0, slots.clamp(min=0)
    if mask is not None:
        seen = seen & mask[:, 0].expand(batch, -1, -1).gather(2, at)
    rows = torch.arange(batch, device=held.device)[:, None, None] * num_held
    # A table's lookup, whose gradient is faster than that of indexing.
    found = F.embedding(rows + at, held.reshape(-1, held.shape[2]))
    return found * seen[..., None]


def rules(config: WindowMLPConfig) -> Rules:
    """The checkpoint map."""
    return (
        Rule("model.embed_tokens.weight", "embedding.weight"),
        Rule("model.hidden.weight", "hidden.weight"),
        Rule("model.hidden.bias", "hidden.bias"),
    )
