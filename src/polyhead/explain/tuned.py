"""A logit lens that has learned each layer's own way of saying things (Belrose et al. 2023).

B rows, T tokens, E the model's width, V vocabulary.
"""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyhead.errors import ConfigError, DataError, FileError
from polyhead.explain.answers import stack_of
from polyhead.explain.capture import capture
from polyhead.explain.inputs import Inputs, call, counted_tokens
from polyhead.explain.lens import LogitLens
from polyhead.explain.places import chosen
from polyhead.explain.reduce import Top
from polyhead.files.safetensors import SafetensorsFile
from polyhead.files.safetensors_write import write_file
from polyhead.models.model import TaskModel
from polyhead.nn.head import LanguageHead, MaskedLanguageHead


class TunedLens(nn.Module):
    """`LogitLens` with an affine map `[E]` to `[E]` for each block below the last.

    Untrained, the maps change nothing. `fit` makes what a layer says as near as it can be to what
    the model says in the end; the model itself learns nothing.
    """

    def __init__(self, model: TaskModel) -> None:
        super().__init__()
        self.lens = LogitLens(model)
        if not isinstance(model.head, (LanguageHead, MaskedLanguageHead)):
            raise ConfigError("a tuned lens is of a language head, which answers at every token")
        self.where = f"{stack_of(self.lens.last)}*"
        names = list(chosen(model, self.where, "residual"))
        self.names = names[:-1]
        width = _width(model)
        self.maps = nn.ModuleList(nn.Linear(width, width) for _ in self.names)
        for part in self.maps.parameters():
            nn.init.zeros_(part)
        self.maps.to(model.device)

    def forward(self, state: Tensor, block: str) -> Tensor:
        """What a block's states `[B, T, E]` say: logits `[B, T, V]`."""
        if block in self.names:
            part = self.maps[self.names.index(block)]
            state = state + part(state.float()).to(state.dtype)
        return self.lens(state)

    def fit(
        self,
        batches: Iterable[Inputs],
        lr: float = 1e-3,
        layers_at_once: int = 4,
        seed: int = 0,
    ) -> list[float]:
        """Learn from texts, a step for each batch; the loss of each step, in nats a token.

        The loss is the Kullback-Leibler divergence of what a layer says from what the model says.
        layers_at_once: drawn for each step, as logits of all layers would not fit.
        """
        if not self.names:
            raise ConfigError("a model of one block has no layer below the last to tune a lens for")
        optimizer = torch.optim.Adam(self.maps.parameters(), lr=lr)
        draw = torch.Generator().manual_seed(seed)
        losses: list[float] = []
        for batch in batches:
            picked = torch.randperm(len(self.names), generator=draw)[:layers_at_once].tolist()
            with torch.no_grad(), capture(self.lens.model, self.where, "residual") as seen:
                wanted = call(self.lens.model, batch).float().log_softmax(-1)
            _check_runs(seen)
            keep = _counted(batch, wanted)
            optimizer.zero_grad()
            total = 0.0
            for number in picked:
                name = self.names[number]
                loss = _divergence(self(seen[name], name)[keep], wanted[keep]) / len(picked)
                torch.autograd.backward(loss, inputs=list(self.maps[number].parameters()))
                total += float(loss.detach())
            optimizer.step()
            losses.append(total)
        if not losses:
            raise DataError("a lens is tuned on no text at all; give it some batches of ids")
        return losses

    @torch.no_grad()
    def layers(self, inputs: Inputs, k: int = 5) -> dict[str, Top]:
        """The likeliest k answers after each block, as `LogitLens.layers`: log-probabilities."""
        with capture(self.lens.model, self.where, "residual") as seen:
            call(self.lens.model, inputs)
        _check_runs(seen)
        found: dict[str, Top] = {}
        for name in (*self.names, self.lens.last):
            said = self(seen[name], name).float().log_softmax(-1)
            found[name] = Top(*said.topk(min(k, said.shape[-1])))
        return found

    def save(self, path: str | Path, force: bool = False) -> None:
        """Write the maps as safetensors. FileError where a file stands and `force` is not given."""
        tensors = {
            f"{name}.{kind}": value.detach()
            for name, part in zip(self.names, self.maps, strict=True)
            for kind, value in part.named_parameters()
        }
        place = Path(path)
        if place.exists() and not force:
            raise FileError(f"{place} is there already; choose another place or use force")
        write_file(place, tensors)

    @classmethod
    def load(cls, model: TaskModel, path: str | Path) -> Self:
        """A lens that was saved. ConfigError where it is that of another model."""
        lens, tensors = cls(model), SafetensorsFile(path)
        own = {f"{name}.{kind}" for name in lens.names for kind in ("weight", "bias")}
        if own != set(tensors) or any(
            tensors[f"{name}.bias"].shape != lens.maps[0].bias.shape for name in lens.names
        ):
            raise ConfigError(f"{path} holds a lens of another model; tune one for this")
        with torch.no_grad():
            for name, part in zip(lens.names, lens.maps, strict=True):
                for kind, value in part.named_parameters():
                    value.copy_(tensors[f"{name}.{kind}"])
        return lens


def _check_runs(seen: Collection[str]) -> None:
    if any("@" in name for name in seen):
        raise ConfigError(
            "a block of this model serves several depths, which a tuned lens cannot tell apart; "
            "use LogitLens"
        )


def _counted(batch: Inputs, answers: Tensor) -> Tensor:
    """Which tokens that are answered at are no padding: of a decoder that reads a text, all."""
    keep = counted_tokens(batch)
    is_read = not isinstance(batch, Tensor) and "decoder_input_ids" in batch
    return torch.ones(answers.shape[:2], dtype=torch.bool, device=keep.device) if is_read else keep


def _divergence(said: Tensor, wanted: Tensor) -> Tensor:
    return F.kl_div(said.float().log_softmax(-1), wanted, log_target=True, reduction="batchmean")


def _width(model: TaskModel) -> int:
    return int(getattr(model.config, "d_model"))  # noqa: B009
