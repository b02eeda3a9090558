"""What every backbone of two stacks does around them: encode, decode, and caches for decoding."""

from typing import Any, cast

from torch import Tensor, nn

from polyhead.models.backbone import make_caches
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.cache import Caches, CrossCache
from polyhead.nn.embedding import TokenEmbedding
from polyhead.nn.mask import Mask, as_mask


class EncoderDecoder(nn.Module):
    """An encoder, a decoder or both: hidden states `[B, T, E]`.

    A stack is called with ids, embedded ids, their mask and caches, and, a decoder, with `memory`
    and `memory_mask`; it has `layers` and their `windows`.
    """

    embedding: TokenEmbedding  # the decoder's, where the encoder has one of its own
    encoder: nn.Module | None
    decoder: nn.Module | None

    def forward(
        self,
        input_ids: Tensor,
        decoder_input_ids: Tensor | Mask | None = None,
        attention_mask: Tensor | Mask | None = None,
        decoder_attention_mask: Tensor | Mask | None = None,
        caches: Caches | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Two sequences for an encoder-decoder; otherwise one, with its mask in second place."""
        if self.encoder is None or self.decoder is None:
            stack = self.encoder or self.decoder
            assert stack is not None
            mask = attention_mask if decoder_input_ids is None else decoder_input_ids
            return stack(input_ids, self.embedding(input_ids), mask, caches, position_ids)
        if not isinstance(decoder_input_ids, Tensor):
            raise ValueError("an encoder-decoder needs decoder_input_ids beside input_ids")
        memory = self.encode(input_ids, attention_mask)
        return self.decode(
            decoder_input_ids, memory, attention_mask, decoder_attention_mask, caches
        )

    def embed_source(self, input_ids: Tensor) -> Tensor:
        """What the encoder reads, `[B, S, E]`."""
        return self.embedding(input_ids)

    def encode(self, input_ids: Tensor, attention_mask: Tensor | Mask | None = None) -> Tensor:
        """The memory `[B, S, E]` that a decoder attends to."""
        assert self.encoder is not None, "this model has no encoder"
        return self.encoder(input_ids, self.embed_source(input_ids), attention_mask)

    def decode(
        self,
        decoder_input_ids: Tensor,
        memory: Tensor,
        attention_mask: Tensor | Mask | None = None,
        decoder_attention_mask: Tensor | Mask | None = None,
        caches: Caches | None = None,
    ) -> Tensor:
        """Hidden states of the decoder's tokens; `attention_mask` speaks of the memory's."""
        assert self.decoder is not None, "this model has no decoder"
        sizes = decoder_input_ids.shape[1], memory.shape[1]
        memory_mask = as_mask(attention_mask, memory.shape[:2]).lower(*sizes, memory.device)
        embedded = self.embedding(decoder_input_ids)
        return self.decoder(
            decoder_input_ids, embedded, decoder_attention_mask, caches,
            memory=memory, memory_mask=memory_mask,
        )  # fmt: skip

    def make_caches(self, batch_size: int, max_len: int | None = None) -> Caches:
        """Empty caches for `batch_size` rows: static of `max_len` positions, or growing."""
        if self.decoder is None:
            raise ValueError("an encoder sees the whole text at once and has no caches")
        windows = cast(list[int | None], self.decoder.windows)
        layers: Any = self.decoder.layers
        attention = cast(MultiHeadAttention, layers[0].attention)
        caches = make_caches(
            batch_size, max_len, windows,
            attention.num_kv_heads, attention.head_dim, next(self.parameters()),
        )  # fmt: skip
        if self.encoder is not None:
            caches.cross = [CrossCache() for _ in windows]
        return caches
