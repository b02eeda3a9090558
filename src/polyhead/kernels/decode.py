"""Decode steps recorded from a model as it is: one token a row, over keys and values in pages.

B rows, H query heads, G key/value heads, D head width, E model width, L positions of the longest
text, V vocabulary.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as every
from torch.utils.hooks import RemovableHandle

from polyhead.kernels.attend import FusedAttention
from polyhead.kernels.held import Held
from polyhead.kernels.native import library
from polyhead.kernels.parts import KNOWN_POSITIONS, record_parts
from polyhead.kernels.seen import Seen
from polyhead.kernels.step import Step
from polyhead.kernels.tape import NotRecordedError, Tape
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.cache import Cache, Caches, CrossCache
from polyhead.nn.mask import Lowered, Mask
from polyhead.nn.mode import evaluating
from polyhead.nn.position import Position

_ATTENTIONS = (MultiHeadAttention, FusedAttention)
_KINDS = {torch.int8: "_int8", torch.float16: "_fp16"}
"""Of kernels for numbers that are kept otherwise than they are computed."""
FEW = 16
"""Tokens up to which a step is recorded for just as many; `FEW` of step_attend.h."""
SIZES = (512, 256, 128, 64, 32, FEW)
"""More are read in steps of these sizes."""
MOST_ENDS = 64
"""Tokens up to which a step goes on to the logits."""
TRIES = 2
"""So many steps of few tokens run as they are before one is recorded."""
_Size = tuple[int, bool]  # how many tokens, and whether the head reads them too
_OF_ALL = (every._global_forward_hooks, every._global_forward_pre_hooks)


class Ends(NamedTuple):
    """What may follow each of N tokens.

    logits: `[N, V]`, which the next step writes over. likeliest: the token of the largest, -1
    where logits are no numbers.
    """

    logits: Tensor
    likeliest: list[int]


class DecodeSteps:
    """The next hidden states of some rows, or what follows them, by a step recorded for as many.

    head: makes logits of hidden states; None: there is none. layers, cross: of the decoder, and of
    its attention to a memory.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module | None,
        layers: Sequence[Held],
        cross: Sequence[Held],
        longest: int,
    ) -> None:
        self.backbone, self.head = backbone, head
        self.layers, self.cross, self.longest = layers, cross, longest
        self._tried: Counter[_Size] = Counter()
        self._tries = TRIES
        self._seen: Seen | None = None
        self.check()

    def check(self) -> None:
        """Forget what was recorded of a model that is another one now, or for other threads."""
        models = [self.backbone] if self.head is None else [self.backbone, self.head]
        seen = Seen(*models)
        if seen.is_where(self._seen):
            return
        self._seen, parts = seen, [part for model in models for part in model.modules()]
        self._steps: dict[_Size, _Recorded] = {}
        self.reason = _reason(self.backbone, self.layers)
        self.head_reason = "there is no head" if self.head is None else ""
        self._hooks = [*_OF_ALL, *(part._forward_hooks for part in parts)]
        self._hooks += [part._forward_pre_hooks for part in parts]
        self._hooks_until = -1
        self._probes = [part.probes for part in parts if isinstance(part, MultiHeadAttention)]

    def prepare(self) -> None:
        """Record steps of few tokens now, others when first asked for: where activations are
        rounded, a recorded step and the model's own differ in more than the last bit."""
        self._tries = 0
        for count in range(1, 1 if self.reason else FEW + 1):
            self._step(count, with_head=not self.head_reason)

    def __getstate__(self) -> dict[str, Any]:
        # What is recorded reads and writes where these lie, and a copy lies elsewhere.
        return {**vars(self), "_steps": {}, "_seen": None}

    def read(
        self,
        ids: Sequence[int],
        rows: Sequence[int],
        at: Sequence[int],
        sources: Sequence[int] = (),
    ) -> Tensor | None:
        """Hidden states `[N, E]` after these tokens at these positions; those of one row follow
        one another.

        rows: of the tables, whose last is nobody's. sources: how long the memories of the rows
        are, of a decoder that has any. None: let the model read them by itself.
        """
        if self.reason or self._is_watched():
            return None
        count = len(ids)
        sizes = [count] if count <= FEW else _sizes(count)
        steps = [self._step(size) for size in sizes]
        given = self._filled((ids, rows, at, sources), sum(sizes) - count)
        found: list[Tensor] = []
        begin = 0
        for size, step in zip(sizes, steps, strict=True):
            if step is None:
                return None
            part = slice(begin, begin := begin + size)
            found.append(step.states(*(numbers[part] for numbers in given)))
        return found[0][:count] if len(found) == 1 else torch.cat(found)[:count]

    def ends(
        self,
        ids: Sequence[int],
        rows: Sequence[int],
        at: Sequence[int],
        sources: Sequence[int] = (),
    ) -> Ends | None:
        """What may follow each of a few tokens, given as to `read`. None: ask for their states."""
        count = len(ids)
        if self.reason or self.head_reason or count > MOST_ENDS or self._is_watched():
            return None
        size = count if count <= FEW else -(-count // FEW) * FEW
        step = self._step(size, with_head=True)
        if step is None:
            return None
        ends = step.ends(*self._filled((ids, rows, at, sources), size - count))
        return Ends(ends.logits[:count], ends.likeliest[:count])

    def _filled(self, given: tuple[Sequence[int], ...], missing: int) -> tuple[Sequence[int], ...]:
        """Ids, rows, positions and lengths of sources, with so many more that are nobody's."""
        if not missing:
            return given
        nobody = len(self.layers[0].tables) - 1
        fill = (0, nobody, 0, 1)
        return tuple(
            [*numbers, *[one] * missing] if len(numbers) else ()
            for numbers, one in zip(given, fill, strict=True)
        )

    def _is_watched(self) -> bool:
        """Whether somebody looks at, or changes, what parts answer."""
        newest = RemovableHandle.next_id  # as many hooks there were, of any module
        if self._hooks_until != newest:
            if any(self._hooks):
                return True
            self._hooks_until = newest
        return any(self._probes)

    def _step(self, count: int, with_head: bool = False) -> "_Recorded | None":
        """The step for so many tokens, if it can be and is worth it."""
        size = count, with_head
        self._tried[size] += 1
        is_usual = count > FEW or self._tried[size] > self._tries
        if size not in self._steps and is_usual:
            try:
                self._steps[size] = _Recorded(self, *size)
            except Exception as error:  # whatever it is, the model's own forward is right
                reason = str(error) or type(error).__name__
                if with_head:
                    self.head_reason = reason
                else:
                    self.reason = reason
        return self._steps.get(size)


def _sizes(count: int) -> list[int]:
    """What so many tokens are read in: some of SIZES, the last of which may be too large."""
    found: list[int] = []
    for size in SIZES:
        found += [size] * (count // size)
        count %= size
    return [*found, *([FEW] if count else [])]


class _Recorded:
    """One step for so many rows, and the buffers that it reads."""

    def __init__(self, steps: DecodeSteps, count: int, with_head: bool) -> None:
        self.inputs = torch.zeros(4, count, dtype=torch.long)
        self.ids, self.rows, self.at, self.ends_at = self.inputs
        self._numbers = self.inputs.numpy()
        backbone: Any = steps.backbone
        models = [backbone, steps.head] if with_head and steps.head is not None else [backbone]
        # What is recorded looks at shapes alone, and at whether ids and positions can be.
        caches = _Caches(self, steps)
        with (
            evaluating(nn.ModuleList(models)),
            Tape() as tape,
            record_parts(models, tape, self.at, steps.longest),
        ):
            caches.tape = tape
            ids = self.ids[:, None]
            if steps.cross:
                like = next(backbone.parameters())
                memory = like.new_empty(1, 1, 1).expand(count, 1, 1)
                hidden = backbone.decode(ids, memory, Mask(), None, caches=caches)
            else:
                hidden = backbone(ids, caches=caches)
            found = [hidden[:, 0]]
            for head in models[1:]:
                logits = head(found[0])
                found = [logits, _likeliest(tape, logits)]
        self._step = Step(tape, found)
        self._found = self._step.outputs

    def states(self, *given: Sequence[int]) -> Tensor:
        self._run(*given)
        return self._found[0].clone()

    def ends(self, *given: Sequence[int]) -> Ends:
        self._run(*given)
        logits, likeliest = self._found
        return Ends(logits, likeliest.tolist())

    def _run(
        self, ids: Sequence[int], rows: Sequence[int], at: Sequence[int], sources: Sequence[int]
    ) -> None:
        self._numbers[:3] = ids, rows, at
        if len(sources):
            self._numbers[3] = sources
            self._numbers[3] -= 1
        self._step()


def _likeliest(tape: Tape, logits: Tensor) -> Tensor:
    """The tokens `[B]` of the largest of logits `[B, V]`; -1 where these are no numbers."""
    logits = logits.contiguous()
    count, vocab = logits.shape
    out = tape.new(logits, count, dtype=torch.long)
    room = tape.new(logits, torch.get_num_threads(), count, 2, dtype=torch.long)
    fields = [logits, out, room, count, vocab]
    tape.kernel("likeliest", logits.dtype, fields, [logits], [out, room], "vocabulary")
    return out


class _Caches(Caches):
    """Caches that note what is kept and looked for."""

    tape: Tape

    def __init__(self, recorded: _Recorded, steps: DecodeSteps) -> None:
        self._at = recorded.at[:, None]
        self.lengths = recorded.at
        self.is_static = True
        self.layers = [_Layer(self, recorded, held) for held in steps.layers]
        self.cross = [_Cross(self, recorded, held) for held in steps.cross]

    def begin(self, num_tokens: int, keep: Tensor | None = None) -> Tensor:
        return self._at

    def end(self) -> None:
        pass


class _Pages:
    """What a layer's keys and values are to the kernels. last: the position `[B]` of the last key
    that a row looks at."""

    def __init__(self, caches: _Caches, recorded: _Recorded, lies: Held, last: Tensor) -> None:
        self.caches, self.lies = caches, lies
        held = lies
        self.kind = _KINDS.get(held.keys.dtype, "")
        self.places = [last, recorded.rows, held.tables]
        self.fields = [
            *self.places, held.tables.shape[1], held.size, held.blocks, held.num_heads,
            held.keys.shape[1],
        ]  # fmt: skip
        self.pages = [held.keys, held.values]
        self.scales = [held.key_scales, held.value_scales]

    def keep(self, k: Tensor, v: Tensor) -> None:
        """New keys and values `[B, G, 1, D]`."""
        k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (k, v))
        strides = k.stride(0), k.stride(1), v.stride(0), v.stride(1)
        into = [*self.pages, *(x for x in self.scales if x is not None)]
        fields = [*self.fields, k, v, *self.pages, *self.scales, len(k), *strides]
        reads = [k, v, *self.places]
        by = _shared_by(len(k))
        self.caches.tape.kernel(f"keep{self.kind}", k.dtype, fields, reads, into, by)

    def found(self, q: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        """What queries `[B, H, 1, D]` find; `bias` `[H, L]` by how far back a key is."""
        tape, held = self.caches.tape, self.lies
        batch, heads, _, width = q.shape
        q = q if q.stride(3) == 1 else q.contiguous()
        out = tape.new(q, batch, heads, width)
        many = heads // held.num_heads
        threads = torch.get_num_threads()
        parts = None
        if batch < threads:
            parts = tape.new(q, threads, batch, heads, width + 2, dtype=torch.float32)
        longest = held.tables.shape[1] * held.size
        apart = max(many * (2 * width + 2 + longest), 48 * (2 * width + 130) + 16 * width) + 16
        room = tape.new(q, threads, apart, dtype=torch.float32)
        fields = [
            *self.fields, q, *self.pages, *self.scales, bias, out, parts, room, batch, heads,
            q.stride(0), q.stride(1), held.window or 0, 0 if bias is None else bias.stride(0),
            apart, threads, float(scale),
        ]  # fmt: skip
        by = "runs" if batch > FEW else _shared_by(batch)
        reads = [q, *self.pages, *self.scales, bias, *self.places]
        # A thread looks at the key of one token that it kept itself.
        meets = batch > 1
        into = [out if parts is None else parts, room]
        tape.kernel(f"attend{self.kind}", q.dtype, fields, reads, into, by, meets)
        if parts is not None:
            fields = [parts, out, batch, heads, width, threads]
            tape.kernel("join", q.dtype, fields, [parts], [out], batch)
        return out[:, :, None]


class _Layer(_Pages, Cache):
    is_open = True

    def __init__(self, caches: _Caches, recorded: _Recorded, lies: Held) -> None:
        super().__init__(caches, recorded, lies, recorded.at)
        self.lengths = recorded.at

    def append(self, k: Tensor, v: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        self.keep(k, v)
        return k, v

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Lowered,
        bias: Tensor | None,
        scale: float,
        dropout: float,
    ) -> Tensor:
        return self.found(q, bias, scale)

    def keys_at(self, at: Tensor) -> Tensor:
        return at

    def place(self, mask: Mask, at: Tensor) -> Mask:
        if not (mask.is_order_alone and mask.causal and mask.window == self.lies.window):
            raise NotRecordedError("the mask looks at more than positions")
        return Mask()


class _Cross(_Pages, CrossCache):
    def __init__(self, caches: _Caches, recorded: _Recorded, lies: Held) -> None:
        super().__init__(caches, recorded, lies, recorded.ends_at)
        # Only their shapes are looked at.
        nothing = lies.keys.new_empty(len(recorded.ends_at), lies.num_heads, 1, lies.keys.shape[1])
        self.held = nothing, nothing

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Lowered,
        bias: Tensor | None,
        scale: float,
        dropout: float,
    ) -> Tensor:
        return self.found(q, bias, scale)


def _shared_by(count: int) -> Hashable:
    """How threads share so many tokens, or the keys of fewer."""
    return count if count >= torch.get_num_threads() else "keys"


def _reason(backbone: nn.Module, layers: Sequence[Held]) -> str:
    """Why a backbone's steps cannot be recorded; nothing where they can, as far as is known."""
    parts = list(backbone.modules())
    if not layers or layers[0].keys.device.type != "cpu":
        return "its layers do not hold keys and values on a CPU"
    if any(type(m) not in KNOWN_POSITIONS for m in parts if isinstance(m, Position)):
        return "its positions are not known"
    if any(type(m) not in _ATTENTIONS for m in parts if isinstance(m, MultiHeadAttention)):
        return "its attention is not known"
    if any(hasattr(m, "adapters") for m in parts):
        return "it has adapters"
    return "" if library("step") else "nothing compiles its kernels"
