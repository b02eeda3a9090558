"""What a model becomes: one graph or several, with the names that other runtimes know them by.

The files' and the tensors' names are those of Hugging Face's optimum, so that what reads its
directories reads ours. `P` tokens past, `T` new ones, `S` of a source.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from polyhead.errors import ConfigError
from polyhead.export.past import GivenCaches
from polyhead.models.model import TaskModel
from polyhead.models.vision_config import pair
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.cache import CrossCache
from polyhead.nn.head import Head, Heads, SpanHead

MASK = 2
"""What the numbers of a mask stay below."""
TRACED = {"batch_size": 3, "sequence_length": 5, "past_sequence_length": 4}
TRACED |= {"total_sequence_length": 9, "encoder_sequence_length": 6}
TRACED |= {"decoder_sequence_length": 4, "image_batch_size": 2}


@dataclass(frozen=True)
class Port:
    """An input: its axes, named where a graph serves any size; below what its numbers stay.

    below: None for floats.
    """

    name: str
    axes: tuple[int | str, ...]
    below: int | None = None

    def sample(
        self,
        sizes: Mapping[str, int],
        random: torch.Generator,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """A random value; of a mask, all ones."""
        shape = [sizes[axis] if isinstance(axis, str) else axis for axis in self.axes]
        if self.below is None:
            return torch.randn(shape, generator=random).to(device, dtype)
        if self.below == MASK:
            return torch.ones(shape, dtype=torch.long, device=device)
        return torch.randint(self.below, shape, generator=random).to(device)


@dataclass(frozen=True)
class Graph:
    """One file: a module of tensors in, by position, and tensors out, with their names."""

    name: str
    module: nn.Module
    inputs: tuple[Port, ...]
    outputs: tuple[str, ...]


def graphs(model: TaskModel, past: bool) -> list[Graph]:
    """The graphs of an `exportable` model.

    past: whether models that write take and give keys and values; else they answer whole texts.
    Errors: ConfigError for a model that has no graphs here.
    """
    kind = getattr(model.config, "kind", "decoder")
    if kind == "two towers":
        return _two_towers(model)
    if kind == "image-text":
        if not past or model.head_kind != "lm":
            raise ConfigError("a model of images and text is exported with past and its lm head")
        return _image_text(model)
    if past and model.head_kind == "lm" and _has_attention(model):
        if kind == "encoder-decoder":
            return _encoder_decoder(model)
        if kind == "decoder":
            return [_decoder(model, "model", model.config)]
    return [_whole(model)]


def _has_attention(model: TaskModel) -> bool:
    return any(isinstance(part, MultiHeadAttention) for part in model.backbone.modules())


class Whole(nn.Module):
    """The model as it is called: whole texts or images to the answers of all its heads."""

    def __init__(self, model: TaskModel, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, tuple(names)

    def of(self, model: TaskModel) -> "Whole":
        """The same of another model."""
        return Whole(model, self.names)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        named: dict[str, Any] = dict(zip(self.names, inputs, strict=True))
        mask = named.get("decoder_attention_mask", named.get("attention_mask"))
        states: dict[str, Tensor] = {}
        answers: list[Tensor] = []
        for head, top in _heads(self.model).items():
            reads = top.reads if isinstance(top, Head) else "forward"
            if reads not in states:
                states[reads] = self.model.hidden(**named, head=head)
            answer = self.model.answer(states[reads], mask, head)
            answers += answer.unbind(-1) if isinstance(top, SpanHead) else [answer]
        if self.model.head is None:
            hidden = states["forward"]
            if self.model.sentences is not None:
                answers.append(self.model.sentences.pooling(hidden, mask))
            elif self.model.pooler is not None:
                answers.append(self.model.pooler(hidden))
        return tuple(answers)


def _heads(model: TaskModel) -> dict[str | None, nn.Module | None]:
    return dict(model.head.items()) if isinstance(model.head, Heads) else {None: model.head}


def _answers(model: TaskModel) -> tuple[str, ...]:
    """The names of what `Whole` gives."""
    if model.head is None:
        if model.sentences is not None:
            return "last_hidden_state", "sentence_embedding"
        return ("last_hidden_state", *(["pooler_output"] if model.pooler is not None else []))
    names: list[str] = []
    for name, top in _heads(model).items():
        before = "" if name is None else f"{name}_"
        usual = {"embed": "sentence_embedding"}.get(model.head_kind, "logits")
        ends = ("start_logits", "end_logits") if isinstance(top, SpanHead) else (usual,)
        names += [before + end for end in ends]
    return tuple(names)


def _whole(model: TaskModel) -> Graph:
    config: Any = model.config
    kind = getattr(config, "kind", "decoder")
    if kind == "vision":
        ports = [_pixels(config, "batch_size")]
    else:
        ports = _texts(config.vocab_size)
        if getattr(config, "type_vocab_size", 0) > 1:
            ports.append(_ids("token_type_ids", config.type_vocab_size))
        if kind == "encoder-decoder":
            target = getattr(config, "target_vocab_size", config.vocab_size)
            axes = ("batch_size", "decoder_sequence_length")
            ports.append(_ids("decoder_input_ids", target, axes))
            ports.append(_ids("decoder_attention_mask", MASK, axes))
    module = Whole(model, [port.name for port in ports])
    return Graph("model", module, tuple(ports), _answers(model))


class Decoder(nn.Module):
    """New tokens `[B, T]`, the mask of all `[B, P + T]` and the past, to logits and the present."""

    def __init__(self, answer: TaskModel | nn.Module, model: TaskModel) -> None:
        super().__init__()
        self.answer, self.model = answer, model

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        new, attention_mask, *past = inputs
        caches = GivenCaches(attention_mask, list(zip(past[::2], past[1::2], strict=True)))
        hidden = self.answer(new, caches=caches)
        return self.model.answer(hidden), *caches.present()


def _decoder(model: TaskModel, name: str, config: Any, embedded: int | None = None) -> Graph:
    """The graph of a decoder. embedded: the width of what it reads in the place of ids."""
    backbone: Any = model.backbone
    reader = backbone if embedded is None else backbone.language
    axes = ("batch_size", "sequence_length")
    new = _ids("input_ids", config.vocab_size, axes)
    if embedded is not None:
        new = Port("inputs_embeds", (*axes, embedded))
    total = _ids("attention_mask", MASK, ("batch_size", "total_sequence_length"))
    shapes = [(cache.k.shape[1], cache.k.shape[3]) for cache in backbone.make_caches(1)]
    past = _pairs("past_key_values", "", shapes, "past_sequence_length")
    present = [port.name for port in _pairs("present", "", shapes, "")]
    module = Decoder(reader, model)
    return Graph(name, module, (new, total, *past), ("logits", *present))


class Encoder(nn.Module):
    """Source ids and their mask `[B, S]` to the memory `[B, S, E]`."""

    def __init__(self, model: TaskModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        backbone: Any = self.model.backbone
        return (backbone.encode(*inputs),)


class FirstDecoder(nn.Module):
    """The source's mask `[B, S]`, target ids `[B, T]` and the memory, to logits and the present."""

    def __init__(self, model: TaskModel, num_layers: int) -> None:
        super().__init__()
        self.model, self.num_layers = model, num_layers

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        source_mask, ids, memory = inputs
        caches = GivenCaches(
            torch.ones_like(ids),
            [None] * self.num_layers,
            [CrossCache() for _ in range(self.num_layers)],
        )
        hidden = self.model.backbone.decode(ids, memory, source_mask, caches=caches)
        return self.model.answer(hidden), *_all_present(caches)


class NextDecoder(nn.Module):
    """The source's mask `[B, S]`, new target ids `[B, T]` and the past, to logits and what grew."""

    def __init__(self, model: TaskModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        source_mask, ids, *past = inputs
        own = list(zip(past[0::4], past[1::4], strict=True))
        crosses = [CrossCache() for _ in own]
        for cross, k, v in zip(crosses, past[2::4], past[3::4], strict=True):
            cross.keep(k, v)
        counts = torch.cat([ids.new_ones(len(ids), past[0].shape[2]), torch.ones_like(ids)], 1)
        caches = GivenCaches(counts, own, crosses)
        # Of the memory, which the crosses hold, no more than the size is asked.
        memory = source_mask[..., None].to(past[0].dtype)
        hidden = self.model.backbone.decode(ids, memory, source_mask, caches=caches)
        return self.model.answer(hidden), *caches.present()


def _all_present(caches: GivenCaches) -> list[Tensor]:
    own = list(caches.present())
    found: list[Tensor] = []
    for layer, cross in enumerate(caches.cross):
        assert cross.held is not None
        found += [*own[2 * layer : 2 * layer + 2], *cross.held]
    return found


def _encoder_decoder(model: TaskModel) -> list[Graph]:
    backbone, config = model.backbone, model.config
    source = _texts(config.vocab_size, "encoder_sequence_length")
    target = getattr(config, "target_vocab_size", config.vocab_size)
    ids = _ids("input_ids", target)
    mask = _ids("encoder_attention_mask", MASK, ("batch_size", "encoder_sequence_length"))
    width = config.d_model
    memory = Port("encoder_hidden_states", ("batch_size", "encoder_sequence_length", width))
    shapes = [(cache.k.shape[1], cache.k.shape[3]) for cache in backbone.make_caches(1)]
    own = _pairs("past_key_values", ".decoder", shapes, "past_sequence_length")
    crossed = _pairs("past_key_values", ".encoder", shapes, "encoder_sequence_length")
    past = [
        port for at in range(0, len(own), 2) for port in (*own[at : at + 2], *crossed[at : at + 2])
    ]
    present = [port.name.replace("past_key_values", "present") for port in past]
    grown = [name for name in present if ".decoder." in name]
    return [
        Graph("encoder_model", Encoder(model), tuple(source), ("last_hidden_state",)),
        Graph(
            "decoder_model",
            FirstDecoder(model, len(shapes)),
            (mask, ids, memory),
            ("logits", *present),
        ),
        Graph(
            "decoder_with_past_model", NextDecoder(model), (mask, ids, *past), ("logits", *grown)
        ),
    ]


class Tower(nn.Module):
    """One of a model's own functions of tensors."""

    def __init__(self, model: TaskModel, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def of(self, model: TaskModel) -> "Tower":
        """The same of another model."""
        return Tower(model, self.name)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return (getattr(self.model.backbone, self.name)(*inputs),)


def _two_towers(model: TaskModel) -> list[Graph]:
    config: Any = model.config
    texts, pixels = _texts(config.text.vocab_size), _pixels(config.vision, "image_batch_size")
    whole = Whole(model, [*(port.name for port in texts), pixels.name])
    return [
        Graph("model", whole, (*texts, pixels), ("logits_per_text",)),
        Graph("text_model", Tower(model, "encode_text"), tuple(texts), ("text_embeds",)),
        Graph("vision_model", Tower(model, "encode_image"), (pixels,), ("image_embeds",)),
    ]


def _image_text(model: TaskModel) -> list[Graph]:
    config: Any = model.config
    pixels = _pixels(config.vision, "image_batch_size")
    ids = _ids("input_ids", config.vocab_size)
    return [
        Graph("vision_encoder", Tower(model, "image_features"), (pixels,), ("image_features",)),
        Graph("embed_tokens", Tower(model, "embedding"), (ids,), ("inputs_embeds",)),
        _decoder(model, "decoder_model", config, embedded=config.d_model),
    ]


def _texts(vocab_size: int, length: str = "sequence_length") -> list[Port]:
    axes = ("batch_size", length)
    return [_ids("input_ids", vocab_size, axes), _ids("attention_mask", MASK, axes)]


def _ids(name: str, below: int, axes: tuple[str, str] = ("batch_size", "sequence_length")) -> Port:
    return Port(name, axes, below)


def _pixels(config: Any, batch: str) -> Port:
    size = pair("image_size", config.image_size)
    return Port("pixel_values", (batch, config.num_channels, *size))


def _pairs(prefix: str, part: str, shapes: Sequence[tuple[int, int]], length: str) -> list[Port]:
    """Keys and values of every layer, of `(G, D)`."""
    return [
        Port(f"{prefix}.{layer}{part}.{name}", ("batch_size", groups, length, width))
        for layer, (groups, width) in enumerate(shapes)
        for name in ("key", "value")
    ]
