"""`polyhead classify`: classes of texts, of pairs of texts, and of images."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from polyhead.cli.texts import lines_of, note_cut, pairs_of, print_json, print_table, progress
from polyhead.errors import ConfigError
from polyhead.serve.opening import Opening

if TYPE_CHECKING:
    from polyhead.models.model import TaskModel
    from polyhead.tasks.batching import Progress
    from polyhead.tasks.classify import Classification


@dataclass(frozen=True)
class Args:
    """Say the class of each text, or of each image where the model reads images.

    The model needs a classification head; `polyhead train DATA --objective classify` makes one.
    Texts longer than the model lose their end; a line on standard error says how many did.

    Examples:
      polyhead classify runs/mood "What a lovely day" "I want my money back"
      polyhead classify runs/mood --file reviews.txt --json > answers.jsonl
      polyhead classify runs/entails --pairs --file pairs.tsv
      polyhead classify vit/ cat.jpg dog.png --top-k 3
      polyhead classify clip/ cat.jpg --labels "a cat" "a dog"
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Directory, .gguf file, training run, name (see `polyhead pull`) or owner/name of the hub."""
    texts: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="TEXT|IMAGE ...")]
    """Texts in quotes, or paths of images; - reads one a line from standard input."""
    file: str | None = None
    """A UTF-8 file with a text, or an image's path, on each line."""
    pairs: bool = False
    """Each text is two, with a tab between them."""
    labels: tuple[str, ...] = ()
    """For CLIP: what the images may show, in your own words."""
    template: str = "This is a photo of {}."
    """For CLIP: the sentence that a label stands in."""
    top_k: int = 1
    """How many classes to show; --json shows all."""
    head: str | None = None
    """Which head, where the model has several."""
    json: bool = False
    """One JSON object a text and line: text, label, score, scores, cut (its end was not read)."""
    opening: Annotated[Opening, tyro.conf.arg(name="")] = field(default_factory=Opening)


def run(args: Args) -> int:
    """Classify and print."""
    if args.top_k < 1:
        raise ConfigError(f"--top-k is {args.top_k}; it must be at least 1")
    lines = lines_of(args.texts, args.file, "text or image")
    model, path = args.opening.open_model(args.model, lines)
    with progress("classifying") as tell:
        found = _classified(args, model, path, lines, tell)
    if args.json:
        print_json(
            {
                "text": line,
                "label": one.label,
                "score": one.score,
                "scores": dict(one.scores),
                "cut": one.is_cut,
            }
            for line, one in zip(lines, found, strict=True)
        )
    else:
        ranked = [_best(one, args.top_k) for one in found]
        print_table(
            ("label", "score", "text"),
            [
                (label, score, line if place == 0 else "")
                for line, some in zip(lines, ranked, strict=True)
                for place, (label, score) in enumerate(some)
            ],
        )
    note_cut(sum(one.is_cut for one in found), len(found), model.config.max_tokens)
    return 0


def _classified(
    args: Args, model: "TaskModel", path: Path, lines: Sequence[str], tell: "Progress"
) -> "list[Classification]":
    from polyhead.adapt.load import tokenizer
    from polyhead.images import Processor
    from polyhead.tasks.classify import Classifier, ImageClassifier, ZeroShotClassifier
    from polyhead.tasks.fit import kind_of

    kind = kind_of(model)
    if args.labels or kind == "two towers":
        if kind == "two towers" and not args.labels:
            raise ConfigError(f'{args.model} knows no classes; name them: --labels "a cat" "a dog"')
        if kind != "two towers":
            raise ConfigError(
                f"--labels is for models that compare texts with images, such as clip; "
                f"{args.model} is a {model.config.model_type}"
            )
        zero = ZeroShotClassifier(model, tokenizer(path), Processor.load(path))
        return zero(lines, args.labels, template=args.template, progress=tell)
    if kind == "vision":
        if args.pairs:
            raise ConfigError(f"--pairs is for texts; {args.model} reads images")
        return ImageClassifier(model, Processor.load(path))(lines, progress=tell)
    classify = Classifier(model, tokenizer(path), args.head)
    if args.pairs:
        return classify(*pairs_of(lines), progress=tell)
    return classify(lines, progress=tell)


def _best(one: "Classification", top_k: int) -> list[tuple[str, float]]:
    return sorted(one.scores.items(), key=lambda item: -item[1])[:top_k]
