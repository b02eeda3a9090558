"""What the parts of a model are on a tape: each by the kernels that do what it does."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from threading import Lock, get_ident
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyhead.compress.formats import STEPS, PackedWeight
from polyhead.compress.layers import PackedExperts, PackedLinear, PackedTable, TiedHead
from polyhead.kernels.norm import FusedLayerNorm, FusedRMSNorm
from polyhead.kernels.packing import LaidOutLinear
from polyhead.kernels.products import LaidOut
from polyhead.kernels.rotate import FusedRotary
from polyhead.kernels.tape import NotRecordedError, Tape
from polyhead.nn.embedding import Table, TokenEmbedding
from polyhead.nn.head import LanguageHead
from polyhead.nn.moe import MixtureOfExperts
from polyhead.nn.norm import LayerNorm, RMSNorm
from polyhead.nn.position import (
    Alibi,
    LearnedPositions,
    MarianPositions,
    Position,
    SinusoidalPositions,
    T5Bias,
)
from polyhead.nn.rotary import Rotary

_ONE_AT_A_TIME = Lock()
_FEW = 16  # tokens that plain matrices are read for by our kernel; torch's is better for many
KNOWN_POSITIONS = (Rotary, FusedRotary, T5Bias, Alibi)


@contextmanager
def record_parts(
    models: Sequence[nn.Module], tape: Tape, at: Tensor, longest: int
) -> Iterator[None]:
    """Let the parts of models note their kernels on a tape instead of computing.

    at: positions `[B]` of the one token of each row, all below `longest`.
    """
    recorder = _Recorder(tape, at, longest)
    changed: list[tuple[nn.Module, str]] = []
    with _ONE_AT_A_TIME:
        try:
            for part in chain.from_iterable(model.modules() for model in models):
                for name, does in _DOES.items():
                    own: Any = getattr(type(part), name, None)
                    if own in does and name not in vars(part):
                        object.__setattr__(part, name, recorder.instead(does[own], own, part))
                        changed.append((part, name))
            yield
        finally:
            for part, name in changed:
                object.__delattr__(part, name)


class _Recorder:
    def __init__(self, tape: Tape, at: Tensor, longest: int) -> None:
        self.tape, self.at, self.longest = tape, at, longest
        self.rounded: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        self.by_position: dict[nn.Module, Any] = {}
        self._computes = False

    def instead(self, does: Any, own: Any, part: nn.Module) -> Callable[..., Any]:
        """A part's method that notes; its own while something is computed, and for whoever else
        runs the model meanwhile."""
        thread = get_ident()

        def method(*args: Any, **named: Any) -> Any:
            if self._computes or get_ident() != thread:
                return own(part, *args, **named)
            return does(self, part, *args, **named)

        return method

    @contextmanager
    def computing(self) -> Iterator[None]:
        """A while in which parts compute and nothing is noted."""
        self._computes = True
        try:
            with torch.utils._python_dispatch._disable_current_modes():
                yield
        finally:
            self._computes = False

    def linear(self, layer: Any, x: Tensor) -> Tensor:
        weight = layer.weight
        if x.numel() // x.shape[-1] > _FEW:
            return F.linear(x, weight, layer.bias)
        return self._dense(x.contiguous(), weight, layer.bias, weight.shape[0])

    def packed_linear(self, layer: Any, x: Tensor) -> Tensor:
        return self._packed(x, layer.packed, layer.bias)

    def laid_out_linear(self, layer: Any, x: Tensor) -> Tensor:
        found = self.packed_linear(layer, x)
        return found if layer.activation is None else layer.activation(found)

    def tied_head(self, head: Any, x: Tensor) -> Tensor:
        found = self._packed(x, head.embedding.packed, head.bias)
        return found if head.scale == 1.0 else found * head.scale

    def language_head(self, head: Any, x: Tensor) -> Tensor:
        by = super(LanguageHead, head).forward
        does = _DOES["forward"].get(by.__func__)
        found = by(x) if does is None else does(self, head, x)
        return found if head.scale == 1.0 else found * head.scale

    def _dense(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, rows: int, ends: Tensor | None = None
    ) -> Tensor:
        """By a matrix, or by those of experts whose tokens end at `ends` `[N]`."""
        if not weight.is_contiguous() or weight.dtype != x.dtype:
            raise NotRecordedError("a matrix lies otherwise than plain, or in another dtype")
        out = self.tape.new(x, *x.shape[:-1], rows)
        tokens, given = x.numel() // x.shape[-1], x.shape[-1]
        experts = 1 if ends is None else len(ends)
        fields = [x, weight, bias, out, ends, tokens, given, rows, experts]
        self.tape.kernel("dense", x.dtype, fields, [x, weight, bias, ends], [out], ("rows", rows))
        return out

    def _packed(
        self, x: Tensor, weight: PackedWeight, bias: Tensor | None, ends: Tensor | None = None
    ) -> Tensor:
        if not isinstance(weight, LaidOut):
            raise NotRecordedError("a matrix in few bits is not laid out")
        experts = 1 if ends is None else len(ends)
        rows, given = weight.shape[0] // experts, weight.shape[1]
        if experts > 1 and rows % 16:
            raise NotRecordedError(f"experts have {rows} rows each, which is no multiple of 16")
        tokens = x.numel() // given
        room = self._round(x.contiguous(), weight, tokens)
        out = self.tape.new(x, *x.shape[:-1], rows)
        scales = getattr(weight, "scales", None)
        fields = [room, weight.data, scales, bias, out, ends, tokens, given, rows, experts]
        reads = [room, weight.data, scales, bias, ends]
        name = f"packed_{weight.times_kind}"
        self.tape.kernel(name, x.dtype, fields, reads, [out], ("rows", rows))
        return out

    def _round(self, x: Tensor, weight: LaidOut, tokens: int) -> Tensor:
        """Activations in eight bits, once for all that multiply them alike."""
        given, (kind, size) = weight.shape[1], weight.rounding
        key = (kind, self.tape.state_of(x))
        if key not in self.rounded:
            groups = -(-given // STEPS)
            room = self.tape.new(x, tokens * groups * size, dtype=torch.uint8)
            fields = [x, room, tokens, given]
            self.tape.kernel(f"round_{kind}", x.dtype, fields, [x], [room], tokens)
            self.rounded[key] = room
        return self.rounded[key]

    def norm(self, layer: Any, x: Tensor) -> Tensor:
        center = isinstance(layer, LayerNorm)
        bias = layer.bias if center else None
        width = layer.weight.numel() if layer.weight is not None else x.shape[-1]
        x = x.contiguous()
        out = self.tape.new(x, *x.shape)
        tokens, rows = len(x), x.numel() // width
        if rows % tokens or (layer.weight is not None and layer.weight.dtype != x.dtype):
            raise NotRecordedError("a norm has another dtype than what it sees")
        fields = [
            x, layer.weight, bias, out, tokens, rows // tokens, width, int(center),
            float(layer.eps),
        ]  # fmt: skip
        self.tape.kernel("norm", x.dtype, fields, [x, layer.weight, bias], [out], tokens)
        return out

    def table(self, table: Any, index: Tensor) -> Tensor:
        index = index.contiguous()
        if not isinstance(table, PackedTable):
            return self._lookup(table.weight, index)
        weight = table.packed
        if not isinstance(weight, LaidOut):
            raise NotRecordedError("a table in few bits is not laid out")
        out = torch.empty(*index.shape, weight.shape[1], dtype=weight.dtype)
        scales = getattr(weight, "scales", None)
        fields = [index, weight.data, scales, out, index.numel(), weight.shape[1]]
        reads = [index, weight.data, scales]
        name = f"unpacked_{weight.kind}"
        self.tape.kernel(name, out.dtype, fields, reads, [out], index.numel())
        return out

    def _lookup(self, table: Tensor, index: Tensor) -> Tensor:
        table = table.detach()
        out = self.tape.new(table, *index.shape, table.shape[1])
        fields = [index, table, out, index.numel(), table.shape[1]]
        self.tape.kernel("lookup", out.dtype, fields, [index, table], [out], index.numel())
        return out

    def tokens(self, table: Any, index: Tensor) -> Tensor:
        if index.is_floating_point():  # vectors in the place of ids
            return index
        found = self.table(table, index)
        return found if table.scale == 1.0 else found * table.scale

    def position_vectors(self, module: Any, index: Tensor) -> Tensor:
        """Of vectors that positions alone decide, a table."""
        if module not in self.by_position:
            with self.computing():
                at = torch.arange(self.longest)[None]
                self.by_position[module] = type(module).forward(module, at)[0]
        return self._lookup(self.by_position[module], index.contiguous())

    def learned_positions(self, table: Any, index: Tensor) -> Tensor:
        return self._lookup(table.weight, index.contiguous())

    def rotary(self, rotary: Any, at: Tensor, keys_at: Tensor, dtype: torch.dtype) -> Position:
        with self.computing():
            angles = rotary.angles(torch.arange(self.longest)[None])
            cos, sin = (x[0, 0, :, : rotary.head_dim // 2].contiguous() for x in angles)
        return _Turning(self, cos, sin)

    def distance_bias(
        self, position: Any, at: Tensor, keys_at: Tensor, dtype: torch.dtype
    ) -> Position:
        with self.computing():
            last = torch.tensor([[self.longest - 1]])
            keys = torch.arange(self.longest)[None]
            make = position.biases if isinstance(position, T5Bias) else position.table
            table = make(last, keys)[0, :, 0].flip(1).to(dtype).float().contiguous()
        return _ByDistance(table)

    def mixture(self, layer: Any, tokens: Tensor) -> Tensor:
        """`MixtureOfExperts._mix`: `[B, E]` to `[B, E]`."""
        tape, count, top_k = self.tape, len(tokens), layer.top_k
        logits = layer.router(tokens)
        shares = tape.new(tokens, count, top_k, dtype=torch.float32)
        order = tape.new(tokens, count * top_k, dtype=torch.long)
        ends = tape.new(tokens, layer.num_experts, dtype=torch.long)
        sizes = [count, layer.num_experts, top_k, int(layer.renormalize)]
        fields = [logits, shares, order, ends, *sizes]
        tape.kernel("choose", logits.dtype, fields, [logits], [shares, order, ends], "one")
        width = tokens.shape[-1]
        seen = tape.new(tokens, count * top_k, width)
        fields = [tokens, order, seen, count * top_k, width, top_k]
        tape.kernel("gather", seen.dtype, fields, [tokens, order], [seen], count * top_k)
        by = self._expert_products(layer.experts, ends)
        found = by(layer.experts.activation(by(seen, "gate")) * by(seen, "up"), "down")
        out = tape.new(tokens, count, width)
        fields = [found, shares, order, out, count, width, top_k]
        tape.kernel("combine", out.dtype, fields, [found, shares, order], [out], count)
        return out

    def _expert_products(self, experts: Any, ends: Tensor) -> Callable[[Tensor, str], Tensor]:
        if isinstance(experts, PackedExperts):
            return lambda x, name: self._packed(x, experts.of[name], None, ends)  # pyright: ignore[reportArgumentType]
        return lambda x, name: self._dense(
            x, getattr(experts, name), None, getattr(experts, name).shape[1], ends
        )


class _Turning(Position):
    """Rotary angles `[L, D / 2]` of all positions."""

    def __init__(self, recorder: _Recorder, cos: Tensor, sin: Tensor) -> None:
        super().__init__()
        self.recorder, self.cos, self.sin = recorder, cos, sin

    def rotate(self, x: Tensor, at: Tensor) -> Tensor:
        x = x if x.stride(3) == 1 else x.contiguous()
        batch, heads, _, width = x.shape
        recorder = self.recorder
        out = recorder.tape.new(x, batch, heads, 1, width)
        fields = [
            x, self.cos, self.sin, recorder.at, out, batch, heads, width, x.stride(0), x.stride(1),
        ]  # fmt: skip
        reads = [x, self.cos, self.sin, recorder.at]
        recorder.tape.kernel("turn", x.dtype, fields, reads, [out], batch)
        return out


class _ByDistance(Position):
    """A bias `[H, L]` by how far back a key is."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table

    def bias(self, q: Tensor, k: Tensor, at: Tensor, keys_at: Tensor, attention: Any) -> Tensor:
        return self.table


_DOES: dict[str, dict[Any, Any]] = {
    "forward": {
        nn.Linear.forward: _Recorder.linear,
        PackedLinear.forward: _Recorder.packed_linear,
        LaidOutLinear.forward: _Recorder.laid_out_linear,
        TiedHead.forward: _Recorder.tied_head,
        LanguageHead.forward: _Recorder.language_head,
        RMSNorm.forward: _Recorder.norm,
        FusedRMSNorm.forward: _Recorder.norm,
        LayerNorm.forward: _Recorder.norm,
        FusedLayerNorm.forward: _Recorder.norm,
        Table.forward: _Recorder.table,
        PackedTable.forward: _Recorder.table,
        TokenEmbedding.forward: _Recorder.tokens,
        LearnedPositions.forward: _Recorder.learned_positions,
        SinusoidalPositions.forward: _Recorder.position_vectors,
        MarianPositions.forward: _Recorder.position_vectors,
    },
    "prepare": {
        Rotary.prepare: _Recorder.rotary,
        FusedRotary.prepare: _Recorder.rotary,
        T5Bias.prepare: _Recorder.distance_bias,
        Alibi.prepare: _Recorder.distance_bias,
    },
    "_mix": {MixtureOfExperts._mix: _Recorder.mixture},
}
"""By the method that a part's class has: what is done in its place."""
