"""What was written beside the model that it came from: the same questions, of several sizes.

None of the sizes is the one that was traced; rows are padded at either end, and models that write
go on from their past twice.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from polyhead.export.graphs import MASK, Graph, Port, Tower, Whole
from polyhead.models.model import TaskModel


@dataclass(frozen=True)
class Difference:
    """The largest, and the largest as a share of the answer's largest number (at least 1)."""

    most: float = 0.0
    share: float = 0.0


Feeds = Mapping[str, Tensor]
Run = Callable[[str, Feeds], dict[str, Tensor]]
"""A graph by name on its inputs by name: its outputs by name."""
SIZES = ((1, 2), (2, 13), (4, 24))
"""Rows and tokens of each trial."""


def largest_difference(
    model: TaskModel,
    graphs: Sequence[Graph],
    run: Run,
    sizes: Sequence[tuple[int, int]] = SIZES,
    seed: int = 0,
) -> Difference:
    """The largest difference between what `run` answers and the model, where tokens count."""
    random = torch.Generator().manual_seed(seed)
    most = share = 0.0
    with torch.no_grad():
        for rows, tokens in sizes:
            tokens = min(tokens, model.config.max_tokens or tokens)
            trial = {"batch_size": rows, "sequence_length": tokens, "image_batch_size": rows + 1}
            trial |= {"encoder_sequence_length": tokens, "decoder_sequence_length": tokens}
            for found, wanted in _asked(model, graphs, run, trial, random):
                off = float((found - wanted).abs().max())
                part = off / max(1.0, float(wanted.abs().max()))
                # Written so that what is not a number stays the worst.
                most = most if off <= most else off
                share = share if part <= share else part
    return Difference(most, share)


def _asked(
    model: TaskModel,
    graphs: Sequence[Graph],
    run: Run,
    sizes: Mapping[str, int],
    random: torch.Generator,
) -> list[tuple[Tensor, Tensor]]:
    """Pairs of what was found and what was wanted."""
    names = [graph.name for graph in graphs]
    if names == ["encoder_model", "decoder_model", "decoder_with_past_model"]:
        return _translated(model, graphs, run, sizes, random)
    if names == ["vision_encoder", "embed_tokens", "decoder_model"]:
        return _told(model, graphs, run, sizes, random)
    if any(port.name.startswith("past_") for port in graphs[0].inputs):
        return _written(model, graphs[0], run, sizes, random)
    pairs: list[tuple[Tensor, Tensor]] = []
    for graph in graphs:
        feeds = {
            name: value.to(model.device, model.dtype if value.is_floating_point() else None)
            for name, value in _padded(graph.inputs, sizes, random).items()
        }
        assert isinstance(graph.module, Whole | Tower)
        wanted = graph.module.of(model)(*feeds.values())
        mask = feeds.get("decoder_attention_mask", feeds.get("attention_mask"))
        found = run(graph.name, feeds)
        for name, value in zip(graph.outputs, wanted, strict=True):
            pairs.append((_kept(found[name], mask), _kept(value, mask)))
    return pairs


def _kept(answer: Tensor, mask: Tensor | None) -> Tensor:
    """Of an answer for each token, those of tokens that count."""
    if mask is None or answer.shape[:2] != mask.shape:
        return answer
    return answer[mask != 0]


def _padded(
    ports: Sequence[Port], sizes: Mapping[str, int], random: torch.Generator
) -> dict[str, Tensor]:
    """Random inputs; of every second row some tokens are padding, at either end by turns."""
    feeds = {port.name: port.sample(sizes, random) for port in ports}
    for port in ports:
        if port.below == MASK and port.name.endswith("attention_mask"):
            feeds[port.name] = mask_of(*feeds[port.name].shape, random)
    return feeds


def mask_of(rows: int, tokens: int, random: torch.Generator) -> Tensor:
    """A mask `[rows, tokens]`; of every second row some tokens are padding, right or left."""
    mask = torch.ones(rows, tokens, dtype=torch.long)
    for row in range(1, rows, 2):
        short = int(torch.randint(tokens, (), generator=random))
        mask[row, tokens - short :] = 0
        mask[row] = mask[row].flip(0) if row % 4 == 3 else mask[row]
    return mask


def _written(
    model: TaskModel, graph: Graph, run: Run, sizes: Mapping[str, int], random: torch.Generator
) -> list[tuple[Tensor, Tensor]]:
    """A text at once, and the same in three pieces, each of which goes on from the last."""
    rows, tokens = sizes["batch_size"], sizes["sequence_length"]
    ids = graph.inputs[0].sample(sizes, random)
    mask = mask_of(rows, tokens, random)
    wanted = model(ids, attention_mask=mask)[mask != 0]
    pairs: list[tuple[Tensor, Tensor]] = []
    for cuts in ((0, tokens), (0, (tokens + 1) // 2, tokens - 1, tokens)):
        found = pieces(graph, run, ids, mask, cuts)
        pairs.append((found[mask != 0], wanted))
    return pairs


def pieces(graph: Graph, run: Run, new: Tensor, mask: Tensor, cuts: Sequence[int]) -> Tensor:
    """The logits `[B, T, V]` of what is read from cut to cut."""
    rows = len(new)
    past = {
        port.name: torch.zeros([rows, *(0 if isinstance(a, str) else a for a in port.axes[1:])])
        for port in graph.inputs[2:]
    }
    found: list[Tensor] = []
    for start, end in pairwise(sorted({*cuts})):
        feeds = {graph.inputs[0].name: new[:, start:end], "attention_mask": mask[:, :end], **past}
        answer = run(graph.name, feeds)
        past = _passed_on(answer)
        found.append(answer["logits"])
    return torch.cat(found, 1)


def _passed_on(answer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What was present is past."""
    return {
        name.replace("present", "past_key_values"): value
        for name, value in answer.items()
        if name.startswith("present")
    }


def _translated(
    model: TaskModel,
    graphs: Sequence[Graph],
    run: Run,
    sizes: Mapping[str, int],
    random: torch.Generator,
) -> list[tuple[Tensor, Tensor]]:
    encoder, first, _ = graphs
    feeds = _padded(encoder.inputs, sizes, random)
    target = first.inputs[1].sample(sizes, random)
    tokens, mask = target.shape[1], feeds["attention_mask"]
    wanted = model(feeds["input_ids"], target, attention_mask=mask)
    memory = run("encoder_model", feeds)["last_hidden_state"]
    step = {"encoder_attention_mask": mask}
    half = (tokens + 1) // 2
    answer = run(
        "decoder_model",
        {**step, "input_ids": target[:, :half], "encoder_hidden_states": memory},
    )
    past, logits = _passed_on(answer), [answer["logits"]]
    for at in range(half, tokens):
        answer = run(
            "decoder_with_past_model", {**step, "input_ids": target[:, at : at + 1], **past}
        )
        past |= _passed_on(answer)
        logits.append(answer["logits"])
    return [(torch.cat(logits, 1), wanted)]


def _told(
    model: TaskModel,
    graphs: Sequence[Graph],
    run: Run,
    sizes: Mapping[str, int],
    random: torch.Generator,
) -> list[tuple[Tensor, Tensor]]:
    """An image before some words, in every row."""
    config: Any = model.config
    rows, room, image = sizes["batch_size"], config.tokens_per_image, config.image_token_id
    pixels = graphs[0].inputs[0].sample({"image_batch_size": rows}, random)
    words = graphs[1].inputs[0].sample(sizes, random)
    words = words.masked_fill(words == image, (image + 1) % config.vocab_size)
    ids = torch.cat([words.new_full((rows, room), image), words], 1)
    mask = torch.ones_like(ids)
    wanted = model(ids, pixels, attention_mask=mask)
    features = run("vision_encoder", {"pixel_values": pixels})["image_features"]
    read = run("embed_tokens", {"input_ids": ids})["inputs_embeds"]
    read[:, :room] = features
    last = ids.shape[1]
    return [(pieces(graphs[2], run, read, mask, (0, room + 1, last - 1, last)), wanted)]
