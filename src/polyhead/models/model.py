"""A backbone and a head: called and saved alike in every family."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polyhead.errors import ConfigError, FileError
from polyhead.files.jsons import write_json
from polyhead.files.safetensors_write import write_checkpoint
from polyhead.models.config import Config
from polyhead.models.config_json import to_hf
from polyhead.models.factors import with_factors
from polyhead.models.heads import within
from polyhead.models.keys import Rules, to_theirs
from polyhead.models.registry import family_of
from polyhead.models.sentence import Sentences, write_sentences
from polyhead.nn.head import Head, Heads, LanguageHead
from polyhead.nn.mask import Mask
from polyhead.nn.pooling import Pooling

BESIDE = "adapters"
"""What stands beside a layer under this name is no part of the checkpoint."""


class TaskModel(nn.Module):
    """A backbone with a head on it; without a head, the hidden states are the answer.

    head_kind: its name, as `load` and `build` take it. pooler: the vector of a whole text, if any.
    """

    def __init__(
        self,
        config: Config,
        backbone: nn.Module,
        head: nn.Module | None,
        pooler: nn.Module | None = None,
        head_kind: str = "lm",
    ) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.head = head
        self.pooler = pooler
        self.head_kind = "none" if head is None else head_kind
        self._arguments = tuple(inspect.signature(backbone.forward).parameters)
        self._masks = _masks(config, self._arguments)
        self.generation: dict[str, Any] = {}
        """What the checkpoint's `generation_config.json` holds."""
        self.sentences: Sentences | None = None
        """What a sentence-transformers directory says of embedding texts."""
        self.origin: str | None = None
        """What `load` was asked for: a name, or a path from the root."""
        self.drawn: tuple[str, ...] = ()
        """Parts that the checkpoint lacked."""
        self.inference_only = False  # packed: its kernels have no gradients

    def forward(self, *inputs: Tensor, head: str | None = None, **named: Any) -> Tensor:
        """The backbone's arguments; logits, or hidden states without a head.

        head: which one, where the model has several.
        """
        hidden = self.hidden(*inputs, head=head, **named)
        return self.answer(hidden, self._mask(inputs, named), head)

    def hidden(self, *inputs: Tensor, head: str | None = None, **named: Any) -> Tensor:
        """The states that the head reads `[B, T, E]`: the backbone's, or its mask decoder's."""
        top = self._top(head)
        reads = top.reads if isinstance(top, Head) else "forward"
        return (self.backbone if reads == "forward" else getattr(self.backbone, reads))(
            *inputs, **named
        )

    def answer(self, hidden: Tensor, attention_mask: Any = None, head: str | None = None) -> Tensor:
        """The head's answer to the states `[B, T, E]` that it reads, as `hidden` gives them."""
        top = self._top(head)
        if top is None:
            return hidden
        reads_pooled = isinstance(top, Head) and top.reads_pooled
        if reads_pooled:
            assert self.pooler is not None
            hidden = self.pooler(hidden)
        if isinstance(attention_mask, Mask):
            attention_mask = attention_mask.keep
        needs_mask = isinstance(top, Head) and top.needs_mask
        return top(hidden, attention_mask) if needs_mask else top(hidden)

    def _mask(self, inputs: Sequence[Any], named: Mapping[str, Any]) -> Any:
        """Of the backbone's arguments the mask of the states that it answers with."""
        given = {**dict(zip(self._arguments, inputs, strict=False)), **named}
        return next((given[name] for name in self._masks if given.get(name) is not None), None)

    def _top(self, name: str | None) -> nn.Module | None:
        return self.head.pick(name) if isinstance(self.head, Heads) else self.head

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Each text's vector in the space shared with images `[B, P]`, not yet of length 1."""
        return self._tower("encode_text")(input_ids, attention_mask)

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """Each image's vector in the space shared with texts `[B, P]`, not yet of length 1."""
        return self._tower("encode_image")(pixel_values)

    def _tower(self, name: str) -> Any:
        if not hasattr(self.backbone, name):
            raise ConfigError(f"{self.config.model_type} has no {name}; that is for clip")
        return getattr(self.backbone, name)

    def state_dict(self, *args: Any, **named: Any) -> dict[str, Any]:
        """Each weight once: a tied head's is the embedding's."""
        state = super().state_dict(*args, **named)
        for name in self._tied():
            state.pop(named.get("prefix", "") + name)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **named: Any) -> Any:
        """As torch's, and tied again afterwards."""
        if tied := self._tied():
            shared = getattr(self.backbone, "embedding").weight  # noqa: B009
            source = next(name for name, value in self.named_parameters() if value is shared)
            state_dict = {**state_dict, **dict.fromkeys(tied, state_dict[source])}
        answer = super().load_state_dict(state_dict, *args, **named)
        self.tie()
        return answer

    @property
    def is_tied(self) -> bool:
        """Whether a head reads the embedding's weight."""
        return bool(self._tied())

    def tie(self) -> None:
        """Make tied heads share the embedding's weight (again)."""
        for name in self._tied():
            head = self.get_submodule(name.removesuffix(".weight"))
            assert isinstance(head, LanguageHead)
            head.tie(getattr(self.backbone, "embedding"))  # noqa: B009

    def _tied(self) -> list[str]:
        """The weights that are the embedding's."""
        if self.head is None or not getattr(self.config, "tie_embeddings", False):
            return []
        return [
            f"{name}.weight"
            for name, part in self.head.named_modules(prefix="head")
            if isinstance(part, LanguageHead)
        ]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are."""
        return next(self.parameters()).dtype

    def num_parameters(self) -> int:
        """Weights, each counted once, those kept in few bits too."""
        packed = sum(getattr(part, "num_weights", 0) for part in self.modules())
        return packed + sum(parameter.numel() for parameter in self.parameters())

    def hf_config(self) -> dict[str, Any]:
        """What `config.json` says of this model."""
        data = to_hf(self.config)
        data["dtype"] = str(self.dtype).removeprefix("torch.")
        data.pop("torch_dtype", None)
        row = self.config.row(self.config.model_type)
        named = data.get("architectures") or [""]
        if row.head_of(str(named[0])) != self.head_kind:
            data["architectures"] = [row.architecture(self.head_kind)]
        return data

    def hf_tensors(self, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The weights, or those of `state` in their place, under Hugging Face's names."""
        own = {
            name.removeprefix("backbone."): tensor
            for name, tensor in (self.state_dict() if state is None else state).items()
            if f".{BESIDE}." not in name
        }
        bare = self.head_kind in ("none", "embed")
        if bare:
            own = {name: tensor for name, tensor in own.items() if not name.startswith("head.")}
        theirs = to_theirs(checkpoint_rules(self.config, self.head_kind), own)
        prefix = self.config.row(self.config.model_type).prefix if bare else ""
        return {name.removeprefix(prefix): value for name, value in theirs.items()}

    def stored(
        self, state: Mapping[str, Tensor] | None = None
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What `save` writes: `config.json`, and tensors by their names in the file."""
        return self.hf_config(), {n: t.detach() for n, t in self.hf_tensors(state).items()}

    def save(
        self, directory: str | Path, force: bool = False, state: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write `config.json` and the weights, or those of `state`, in Hugging Face layout.

        Raises FileError where a model already stands and `force` is not given.
        """
        folder = Path(directory)
        if folder.exists() and not folder.is_dir():
            raise FileError(f"{folder} is a file; name a directory to save to")
        there = (folder / "config.json").exists() or any(folder.glob("*.safetensors*"))
        if there and not force:
            raise FileError(f"{folder} already holds a model; choose another place or use force")
        folder.mkdir(parents=True, exist_ok=True)
        config, tensors = self.stored(state)
        write_checkpoint(folder, tensors)
        write_json(folder / "config.json", config)
        sentences = self.sentences
        if isinstance(self.head, Pooling):
            sentences = replace(sentences or Sentences(), pooling=self.head)
        if sentences is not None and self.head_kind in ("none", "embed"):
            write_sentences(folder, sentences, getattr(self.config, "d_model"))  # noqa: B009
        if self.generation:
            write_json(folder / "generation_config.json", self.generation)
        else:
            # What a model that stood here before said of itself would steer this one.
            (folder / "generation_config.json").unlink(missing_ok=True)


def checkpoint_rules(config: Config, head: str) -> Rules:
    """The checkpoint map of a model with a head, whose parts stand under `head.`."""
    row, rules = config.row(config.model_type), family_of(config.model_type).rules(config)
    rules = with_factors(rules, config.ranks, row.prefix)
    return rules if head == "none" else (*rules, *within("head.", row.kind(head).rules(config)))


def _masks(config: Config, arguments: Sequence[str]) -> tuple[str, ...]:
    """What a backbone may call the mask of its answer: the first that is given is it."""
    if "decoder_input_ids" not in arguments:
        return ("attention_mask",)
    has_both = getattr(config, "kind", "encoder-decoder") == "encoder-decoder"
    # A stack alone takes its mask in the second place as well.
    return ("decoder_attention_mask",) if has_both else ("attention_mask", "decoder_input_ids")


def require_causal(model: TaskModel) -> None:
    """Raise ConfigError unless the model predicts each token from those before it."""
    if model.head is None or model.head_kind != "lm":
        raise ConfigError("the model has no language head; load it with head='lm'")
    kind = getattr(model.config, "kind", "decoder")
    if kind not in ("decoder", "image-text"):
        raise ConfigError(f"the model is of the kind {kind}; this needs a decoder, such as gpt2")
