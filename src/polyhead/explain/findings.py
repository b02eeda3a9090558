"""What to look for in a page's stacks: the heads that stand out, in words and figures."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polyhead.explain.heads import MEASURES, Text
from polyhead.explain.page import Finding, Place, Stack
from polyhead.explain.stacks import Tokens

_MOST = 24  # heads that one finding names


@dataclass(frozen=True)
class _Kind:
    """Heads of which a measure is so much or more. does: what they do with their weight."""

    measure: str
    title: str
    least: float
    does: str
    means: str


_OF_TEXTS = (
    _Kind("induction", "Induction", 0.4,
          "to what followed an earlier equal token (on random tokens written twice)",
          "They go on as the text went on before."),
    _Kind("previous", "Previous token", 0.5, "to the token just before",
          "Later heads can tell by it what a token stands behind."),
    _Kind("sink", "Sinks", 0.8, "to the first token",
          "Read it as rest: the head finds nothing to do there."),
    _Kind("delimiter", "Delimiters", 0.5, "to marks, separators and line ends", ""),
    _Kind("duplicate", "Same token", 0.5, "to other places of the same token", ""),
    _Kind("itself", "Itself", 0.5, "to the token itself", ""),
    _Kind("positional", "Position", 0.5, "to one and the same offset",
          "What stands there does not matter to them."),
)  # fmt: skip
_OF_CROSS = (
    _Kind("pointed", "Pointed", 0.5, "to one source token, in the mean",
          "Read these as an alignment of the two texts."),
)  # fmt: skip
_OF_IMAGES = (
    _Kind("class token", "Class token", 0.5, "to the class token, as patches", ""),
)  # fmt: skip


def findings_of(stacks: Sequence[Stack], tokens: Sequence[Tokens]) -> list[Finding]:
    """Of each stack; tokens: who looks in each."""
    found: list[Finding] = []
    for number, (stack, own) in enumerate(zip(stacks, tokens, strict=True)):
        kinds = _OF_CROSS if "pointed" in stack.measures else _OF_IMAGES + _OF_TEXTS
        title = f" · {stack.name}" if len(stacks) > 1 else ""
        found += [
            _finding(number, stack, kind, own.text, title)
            for kind in kinds
            if kind.measure in stack.measures and _has(kind.measure, own.text)
        ]
        found += _widest(number, stack, title)
    # What was found comes before what was not.
    return sorted(found, key=lambda finding: not finding.heads)


def _has(measure: str, text: Text | None) -> bool:
    """Whether a text has what a measure is about."""
    if measure == "delimiter":
        return text is not None and bool(text.delimiters[:, 1:].any())
    if measure == "duplicate":
        return text is not None and len(text.ids[0].unique()) < text.ids.shape[1]
    return True


def _finding(number: int, stack: Stack, kind: _Kind, text: Text | None, where: str) -> Finding:
    ranked = _ranked(stack, kind.measure)
    best = [(place, value) for place, value in ranked if value >= kind.least]
    if kind.measure == "positional":
        near = {p for m in ("previous", "itself") for p, v in _ranked(stack, m) if v >= 0.5}
        best = [(place, value) for place, value in best if place not in near]
    if not best:
        (layer, head), most = ranked[0]
        words = f"No head gives {kind.least:.0%} of its weight {kind.does}"
        if kind.measure != "positional":
            words += f"; the most is {most:.2f}, layer {stack.number(layer)}, head {head}"
        return Finding(kind.title + where, words + ".", number)
    count = f"{len(best)} of {len(ranked)} heads give" if len(best) > 1 else "One head gives"
    words = f"{count} {kind.least:.0%} or more of their weight {kind.does}. {kind.means}"
    if len(best) == 1:
        words = words.replace("their", "its").replace("They go", "It goes")
    heads = [place for place, _ in best[:_MOST]]
    return Finding(
        kind.title + where, words.strip(), number, heads, _shows(stack, heads[0], kind, text),
        [stack.layers[layer] for layer, _ in heads], [value for _, value in best[:_MOST]],
    )  # fmt: skip


def _widest(number: int, stack: Stack, where: str) -> list[Finding]:
    """The heads that spread their weight most, in tokens that would be as many at equal shares."""
    ranked = _ranked(stack, "entropy") if "entropy" in stack.measures else []
    if not ranked:
        return []
    least, most = (float(torch.tensor(value).exp()) for _, value in (ranked[-1], ranked[0]))
    words = (
        f"Heads read as if {least:.1f} to {most:.1f} tokens had equal shares (the exponential of "
        "their mean entropy); the widest are these."
    )
    heads = [place for place, _ in ranked[:4]]
    names = [stack.layers[layer] for layer, _ in heads]
    return [
        Finding(f"Widest{where}", words, number, heads, None, names, [v for _, v in ranked[:4]])
    ]


def _ranked(stack: Stack, measure: str) -> list[tuple[Place, float]]:
    values = [
        ((layer, head), value)
        for layer, row in enumerate(stack.measures[measure])
        for head, value in enumerate(row)
        if value is not None
    ]
    return sorted(values, key=lambda item: -item[1])


def _shows(stack: Stack, place: Place, kind: _Kind, text: Text | None) -> int | None:
    """The query at which the head does most of what is meant."""
    shares = (stack.weights[place[0], place[1]].float() / 255).square()
    if kind.measure == "pointed":
        return int(shares.amax(-1).argmax())
    if text is None or kind.measure not in MEASURES:
        return None
    values, counts = _by_query(shares, kind.measure, text)
    return int(values.masked_fill(~counts, -1).argmax()) if bool(counts.any()) else None


def _by_query(shares: Tensor, measure: str, text: Text) -> tuple[Tensor, Tensor]:
    own = Text(text.ids.cpu(), text.keep.cpu(), text.delimiters.cpu())
    values, counts = MEASURES[measure](shares[None, None], own)
    return values[0, 0], counts[0]
