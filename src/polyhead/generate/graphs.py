"""Decode steps on a GPU as CUDA graphs: captured once for each size, replayed from then on.

B rows of a step, of which the last may be nobody's; E model width.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from polyhead.generate.memory import Memory
from polyhead.generate.paged import Plan
from polyhead.generate.row_caches import Fixed
from polyhead.kernels.seen import Seen
from polyhead.models.model import TaskModel
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.mask import Mask
from polyhead.nn.mode import evaluating

TRIES = 2
"""So many steps of one size run as they are before one is captured."""
_SHORT = 128
"""Keys that the smallest steps read; others read twice as many, and so on."""


class Recorder(Protocol):
    """Makes of what a function does something that does it again, in the same memory."""

    def record(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]: ...


class CudaRecorder:
    """By CUDA graphs that share one pool: what one step leaves behind, the next one overwrites."""

    def __init__(self) -> None:
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def record(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        # Libraries allocate what they need when they are first called, which no graph may.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            found = run()

        def replay() -> Tensor:
            graph.replay()
            return found

        return replay


class GraphSteps:
    """The next hidden states of some rows, a token each; as `DecodeSteps` on a CPU.

    reason: why steps are left to the model, if they are.
    """

    def __init__(self, model: TaskModel, memory: Memory, recorder: Recorder) -> None:
        self.model, self.memory, self.recorder = model, memory, recorder
        self._tried: dict[tuple[int, int, int], int] = {}
        self._seen: Seen | None = None
        self.check()

    def check(self) -> None:
        """Forget what was captured of a model that is another one now."""
        seen = Seen(self.model.backbone)
        if seen.is_where(self._seen):
            return
        self._seen, parts = seen, list(self.model.backbone.modules())
        self._steps: dict[tuple[int, int, int], _Captured] = {}
        self.reason = "it has adapters" if any(hasattr(m, "adapters") for m in parts) else ""
        kinds = "_forward_hooks", "_forward_pre_hooks"
        self._hooks: list[dict[int, Any]] = [vars(m)[kind] for m in parts for kind in kinds]
        self._probes = [m.probes for m in parts if isinstance(m, MultiHeadAttention)]

    def read(
        self,
        ids: Sequence[int],
        rows: Sequence[int],
        at: Sequence[int],
        sources: Sequence[int] = (),
    ) -> Tensor | None:
        """Hidden states `[N, E]` after these tokens at these positions, or None: let the model
        read them. sources: how long the memories of the rows are, of a decoder that has any."""
        is_watched = any(self._hooks) or any(self._probes)
        if self.reason or is_watched or len(set(rows)) < len(rows):
            return None
        memory = self.memory
        size = (
            _size(len(rows), 1, memory.max_rows),
            _size(max(at) + 1, _SHORT, memory.max_len),
            _size(max(sources), _SHORT, memory.source_len) if sources else 0,
        )
        self._tried[size] = self._tried.get(size, 0) + 1
        if size not in self._steps:
            if self._tried[size] <= TRIES:
                return None
            try:
                self._steps[size] = _Captured(self, size, rows, at, sources)
            except Exception as error:  # whatever it is, the model's own forward is right
                self.reason = str(error).partition("\n")[0] or type(error).__name__
                warnings.warn(
                    f"no CUDA graph of a decode step: {self.reason}; steps run one by one, slower",
                    stacklevel=2,
                )
                return None
        return self._steps[size](ids, rows, at, sources)

    def ends(self, *given: Sequence[int]) -> None:
        """The head is left to the model."""


class _Captured:
    """Steps of one size, and the buffers that they read."""

    def __init__(
        self,
        steps: GraphSteps,
        size: tuple[int, int, int],
        rows: Sequence[int],
        at: Sequence[int],
        sources: Sequence[int],
    ) -> None:
        self.steps, self.caches = steps, steps.memory.caches
        self.batch, self.longest, self.source = size
        device = steps.memory.device
        self.ids = torch.zeros(self.batch, 1, dtype=torch.long, device=device)
        self.fixed: Fixed = self.caches.fixed(rows, at, self.batch, self.longest)
        self.lengths = torch.ones(self.batch, 1, dtype=torch.long, device=device)
        self.sources: Plan | None = None
        if sources:
            self.sources = self.caches.fixed_sources(rows, sources, self.batch, self.source)
        with evaluating(steps.model):
            self._replay = steps.recorder.record(self._run)

    def _run(self) -> Tensor:
        """What is captured. It reads nothing but buffers and weights."""
        backbone: Any = self.steps.model.backbone
        self.caches.follow(self.fixed)
        if self.sources is None:
            return backbone(self.ids, caches=self.caches)
        self.caches.follow_sources(self.sources)
        width = self.sources.shape[2]
        # Only its length is looked at: keys and values are held.
        like = next(backbone.parameters())
        memory = like.new_empty(1, 1, 1).expand(self.batch, width, 1)
        keep = torch.arange(width, device=self.ids.device) < self.lengths
        return backbone.decode(self.ids, memory, Mask(keep=keep), None, caches=self.caches)

    def __call__(
        self, ids: Sequence[int], rows: Sequence[int], at: Sequence[int], sources: Sequence[int]
    ) -> Tensor:
        missing = [0] * (self.batch - len(ids))
        self.ids.copy_(torch.tensor([*ids, *missing])[:, None])
        self.fixed.take(self.caches.fixed(rows, at, self.batch, self.longest))
        if self.sources is not None:
            lengths = [*sources, *[1] * len(missing)]
            self.lengths.copy_(torch.tensor(lengths)[:, None])
            self.sources.take(self.caches.fixed_sources(rows, sources, self.batch, self.source))
        return self._replay()[: len(ids), 0].clone()


def _size(count: int, least: int, most: int) -> int:
    """Twice as many as `least` and so on, until `count` fit; `most` at most."""
    while least < count:
        least *= 2
    return min(least, most)
