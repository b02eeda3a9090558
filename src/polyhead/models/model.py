"""A backbone and a head: built, called and saved alike in every family."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polyhead.errors import ConfigError, FileError
from polyhead.files.safetensors import write_checkpoint
from polyhead.models.config import Config, to_hf
from polyhead.models.initialize import initialize
from polyhead.models.keys import differ, to_ours, to_theirs
from polyhead.models.registry import Family, family_of
from polyhead.nn.head import LanguageHead

HEADS = ("lm", "none")


class TaskModel(nn.Module):
    """A backbone with a head on it; without a head, the hidden states are the answer."""

    def __init__(self, config: Config, backbone: nn.Module, head: nn.Module | None) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.head = head
        self.generation: dict[str, Any] = {}
        """What the checkpoint's `generation_config.json` holds."""

    def forward(self, *inputs: Tensor, **named: Any) -> Tensor:
        """The backbone's arguments; logits `[B, T, V]`, or hidden states without a head."""
        hidden = self.backbone(*inputs, **named)
        return hidden if self.head is None else self.head(hidden)

    def state_dict(self, *args: Any, **named: Any) -> dict[str, Any]:
        """Each weight once: a tied head's is the embedding's."""
        state = super().state_dict(*args, **named)
        if self.is_tied:
            prefix = named.get("prefix", "")
            state.pop(f"{prefix}head.weight")
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **named: Any) -> Any:
        """As torch's, and tied again afterwards."""
        if self.is_tied:
            state_dict = dict(state_dict)
            state_dict["head.weight"] = state_dict["backbone.embedding.weight"]
        answer = super().load_state_dict(state_dict, *args, **named)
        self.tie()
        return answer

    @property
    def is_tied(self) -> bool:
        """Whether the head reads the embedding's weight."""
        return isinstance(self.head, LanguageHead) and bool(
            getattr(self.config, "tie_embeddings", False)
        )

    def tie(self) -> None:
        """Make a tied head share the embedding's weight (again)."""
        if self.is_tied:
            assert isinstance(self.head, LanguageHead)
            self.head.tie(self.backbone.get_submodule("embedding"))  # pyright: ignore[reportArgumentType]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are."""
        return next(self.parameters()).dtype

    def num_parameters(self) -> int:
        """Weights, each counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def hf_config(self) -> dict[str, Any]:
        """What `config.json` says of this model."""
        data = to_hf(self.config)
        data["dtype"] = str(self.dtype).removeprefix("torch.")
        data.pop("torch_dtype", None)
        if self.head is None:
            family = family_of(self.config.model_type)
            data["architectures"] = [family.headless(self.config.model_type)]
        return data

    def hf_tensors(self) -> dict[str, Tensor]:
        """The weights under Hugging Face's names."""
        family = family_of(self.config.model_type)
        own = {name.removeprefix("backbone."): tensor for name, tensor in self.state_dict().items()}
        theirs = to_theirs(family.rules(self.config), own)
        if self.head is None:
            return {name.removeprefix(family.prefix): value for name, value in theirs.items()}
        return theirs

    def save(self, directory: str | Path, force: bool = False) -> None:
        """Write `config.json` and the weights in Hugging Face layout.

        Raises FileError where a model already stands and `force` is not given.
        """
        folder = Path(directory)
        if folder.exists() and not folder.is_dir():
            raise FileError(f"{folder} is a file; name a directory to save to")
        there = (folder / "config.json").exists() or any(folder.glob("*.safetensors*"))
        if there and not force:
            raise FileError(f"{folder} already holds a model; choose another place or use force")
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach() for name, tensor in self.hf_tensors().items()}
        write_checkpoint(folder, tensors)
        _write_json(folder / "config.json", self.hf_config())
        if self.generation:
            _write_json(folder / "generation_config.json", self.generation)
        else:
            # What a model that stood here before said of itself would steer this one.
            (folder / "generation_config.json").unlink(missing_ok=True)


def require_causal(model: TaskModel) -> None:
    """Raise ConfigError unless the model predicts each token from those before it."""
    if model.head is None:
        raise ConfigError("the model has no language head; load it with head='lm'")
    kind = getattr(model.config, "kind", "decoder")
    if kind != "decoder":
        raise ConfigError(
            f"the model is an {kind}; this needs a decoder: build it with kind=decoder"
        )


def build(family: str, *, seed: int | None = None, **fields: Any) -> TaskModel:
    """A fresh model from its config's fields; a tied or untied language head as the config says.

    seed: of the weights; None draws from torch's global state.
    """
    kind = family_of(family)
    config = kind.config.fresh(family, **fields)
    if seed is None:
        return assemble(kind, config, "lm")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return assemble(kind, config, "lm")


def assemble(family: Family, config: Config, head: str) -> TaskModel:
    """Backbone and head of a config, with fresh weights (none on the meta device)."""
    backbone = family.backbone(config)
    top = family.head(config) if head == "lm" else None
    model = TaskModel(config, backbone, top)
    if not any(parameter.is_meta for parameter in model.parameters()):
        initialize(model, getattr(config, "num_layers", 1), getattr(config, "init_std", 0.02))
    model.tie()
    return model


def from_tensors(
    config: Config, tensors: Mapping[str, Tensor], head: str, dtype: torch.dtype | None
) -> TaskModel:
    """A model that takes Hugging Face's tensors as its weights, without copying where it can."""
    family = family_of(config.model_type)
    if not any(name.startswith(family.prefix) for name in tensors):
        tensors = _Prefixed(tensors, family.prefix)
    if differ(family.rules(config), tensors):
        # Said to be tied, but trained apart: transformers believes the tensors, too.
        config = replace(config, tie_embeddings=False)
    with torch.device("meta"):
        model = assemble(family, config, head)
    shapes = {
        name.removeprefix("backbone."): value.shape for name, value in model.state_dict().items()
    }
    rules = family.rules(config)
    if head == "none":
        tensors = {name: tensors[name] for name in tensors if name.startswith(family.prefix)}
    ours = to_ours(rules, tensors, shapes)
    state = {
        name if name.startswith("head.") else f"backbone.{name}": _ready(tensor, dtype)
        for name, tensor in ours.items()
    }
    model.load_state_dict(state, assign=True)
    return model.eval()


class _Prefixed(Mapping[str, Tensor]):
    """The tensors of a bare backbone, under the names they have below a head."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str) -> None:
        self._tensors, self._prefix = tensors, prefix

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name.removeprefix(self._prefix)]

    def __iter__(self) -> Iterator[str]:
        return (n if n.startswith("lm_head.") else self._prefix + n for n in self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _ready(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is not None:
        tensor = tensor.to(dtype)
    return tensor.contiguous()


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
