"""A look inside a model that reads a text or an image, as a page to walk through. T tokens."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from polyhead.explain.findings import findings_of
from polyhead.explain.heads import head_scores, repeated
from polyhead.explain.inputs import call
from polyhead.explain.lens import LogitLens
from polyhead.explain.page import Lens, Page, Side, Stack
from polyhead.explain.reduce import Top
from polyhead.explain.stacks import Reader, stacks_of
from polyhead.images import Processor
from polyhead.models.model import TaskModel
from polyhead.tasks.fit import kind_of
from polyhead.tasks.looking import reader_of
from polyhead.text.pieces import pieces
from polyhead.text.tokenizer import Tokenizer

_ANSWERS = 8000  # of a lens, over all layers and tokens
_LENGTH, _ROWS = 50, 4  # of the random texts that are written twice


@torch.no_grad()
def inside(
    model: TaskModel,
    tokenizer: Tokenizer | None = None,
    text: str | None = None,
    second: str | None = None,
    image: object = None,
    *,
    processor: Processor | None = None,
    where: str = "*",
    title: str | None = None,
    max_tokens: int | None = None,
) -> Page:
    """What every head looks at, the heads worth a look, and what each layer would answer.

    second: of an encoder, the text after the first; of an encoder-decoder, what it writes, or
    None: what it would. image: a path, bytes, a Pillow image or an array, with the model's
    processor. where: as of `capture`. max_tokens: of each text; what is longer loses its end.
    Raises ConfigError for what the model does not read and for what does not fit a page, DataError
    for empty texts and broken images.
    """
    reader = reader_of(model, tokenizer, text, second, image, processor, max_tokens)
    sides, stacks, tokens = stacks_of(model, reader, where)
    reads_on = tokenizer is not None and kind_of(model) in ("decoder", "image-text")
    scores = _induction(model, tokenizer, where) if tokenizer is not None and reads_on else {}
    stacks = [_with_induction(stack, scores) for stack in stacks]
    lens = None
    if tokenizer is not None and model.head_kind == "lm":
        lens, sides = _lens(model, tokenizer, reader, sides)
    return Page(
        title or model.config.model_type, sides, stacks, findings_of(stacks, tokens), lens,
        _facts(model, tokenizer, reader, lens),
    )  # fmt: skip


def _induction(model: TaskModel, tokenizer: Tokenizer, where: str) -> dict[str, Tensor]:
    """By layer `[H]`: measured on random tokens that are written twice."""
    size = min(tokenizer.vocab_size, int(getattr(model.config, "vocab_size")))  # noqa: B009
    ids = torch.tensor([i for i in range(size) if i not in tokenizer.special_ids])
    most = model.config.max_tokens or 2 * _LENGTH + 1
    length = min(_LENGTH, (most - 1) // 2)
    if length < 2 or not len(ids):
        return {}
    begin = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    texts = repeated(ids, length, _ROWS, begin=begin).to(model.device)
    return head_scores(model, texts, where=where)["induction"]


def _with_induction(stack: Stack, scores: dict[str, Tensor]) -> Stack:
    """A text at hand may repeat nothing: what says how much a head does so is measured apart."""
    if not all(name in scores for name in stack.layers):
        return replace(stack, measures=_others(stack))
    rows = [[round(float(value), 4) for value in scores[name]] for name in stack.layers]
    return replace(stack, measures={"induction": rows, **_others(stack)})


def _others(stack: Stack) -> dict[str, Sequence[Sequence[float | None]]]:
    return {name: rows for name, rows in stack.measures.items() if name != "induction"}


def _lens(
    model: TaskModel, tokenizer: Tokenizer, reader: Reader, sides: list[Side]
) -> tuple[Lens, list[Side]]:
    """As many answers as a page has room for."""
    tokens = next(
        (reader.parts[part] for part in ("decoder", "language", "") if part in reader.parts),
        next(iter(reader.parts.values())),
    )
    lens = LogitLens(model)
    found: dict[str, Top] = lens.layers(reader.inputs)
    room = _ANSWERS // (len(found) * len(tokens.side.tokens))
    answers = [_answers(tokenizer, top, max(1, min(5, room))) for top in found.values()]
    # What comes next is said in full, however long the text is.
    answers[-1][-1] = _answers(tokenizer, Top(*(x[:, -1:] for x in [*found.values()][-1])), 5)[0]
    sides = sides if tokens.side in sides else [*sides, tokens.side]
    return Lens(sides.index(tokens.side), list(found), answers), sides


def _answers(tokenizer: Tokenizer, top: Top, count: int) -> list[list[tuple[str, float]]]:
    """Of each token of `[1, T, k]` log-probabilities."""
    return [
        [
            (word, round(float(share), 4))
            for word, share in zip(pieces(tokenizer, ids), shares, strict=True)
        ]
        for ids, shares in zip(
            top.indices[0, :, :count].tolist(), top.values[0, :, :count].exp(), strict=True
        )
    ]


def _facts(
    model: TaskModel, tokenizer: Tokenizer | None, reader: Reader, lens: Lens | None
) -> dict[str, str]:
    """What a reader wants to know first: what was read, and what the model makes of it."""
    facts = {"model": f"{model.config.model_type}, {model.num_parameters():,} parameters"}
    sizes = [
        f"{len(tokens.side.tokens)} {'patches and tokens' if tokens.side.picture else 'tokens'}"
        for tokens in reader.parts.values()
    ]
    facts["read"] = ", ".join(sizes)
    kind = kind_of(model)
    if lens is not None and kind in ("decoder", "image-text"):
        best = lens.answers[-1][-1]
        facts["goes on with"] = ", ".join(f"{word!r} {share:.1%}" for word, share in best)
    elif (
        kind == "encoder-decoder"
        and tokenizer is not None
        and not isinstance(reader.inputs, Tensor)
    ):
        facts["writes"] = tokenizer.decode(reader.inputs["decoder_input_ids"][0].tolist())
    elif model.head_kind == "classify":
        facts["says"] = _classes(model, call(model, reader.inputs)[0])
    elif kind == "two towers":
        facts["score"] = f"{float(call(model, reader.inputs)[0, 0]):.2f}"
    return facts


def _classes(model: TaskModel, logits: Tensor) -> str:
    labels, problem = model.config.labels, model.config.problem
    shares = logits.float().sigmoid() if problem == "multi_label" else logits.float().softmax(-1)
    values, places = shares.topk(min(3, len(shares)))
    names = [labels[i] if labels else f"class {i}" for i in places.tolist()]
    return ", ".join(f"{name} {value:.1%}" for name, value in zip(names, values, strict=True))
