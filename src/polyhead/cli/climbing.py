"""One rung of the ladder after the other: what they have in common, and how each is climbed."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyhead.cli.common import note
from polyhead.cli.corpora import SplitText, corpus, split
from polyhead.cli.starting import make_tokenizer
from polyhead.errors import DataError
from polyhead.generate.config import GenerationConfig
from polyhead.generate.generator import TextGenerator
from polyhead.models.model import TaskModel
from polyhead.models.ngram import NGram
from polyhead.tasks.perplexity import perplexity, scorable
from polyhead.text.tokenizer import Tokenizer
from polyhead.train.allocator import forget_peak
from polyhead.train.config import TrainConfig
from polyhead.train.log import read_log
from polyhead.train.loop import Interrupted, Trainer
from polyhead.train.rungs import RUNGS, Plan, built, planned
from polyhead.train.sources import Texts

if TYPE_CHECKING:
    from polyhead.cli.ladder import Args
    from polyhead.cli.ladder_view import LadderView

LEARNED = tuple(rung.name for rung in RUNGS)
TOKENIZER = "tokenizer"
_PROMPT = 24  # characters
_LOOKS = 12  # at the held-out text while a rung learns


@dataclass(frozen=True)
class Course:
    """What all rungs have in common. ids: of the text to learn from. prompt: token ids.

    rates: learning rates that take the place of a rung's own.
    """

    args: "Args"
    text: SplitText
    tokenizer: Tokenizer
    ids: list[int]
    prompt: list[int]
    budget: float
    rates: Mapping[str, float]


def make_course(args: "Args", budget: float, rates: Mapping[str, float]) -> Course:
    """Read the text, hold out its end, and make the tokenizer, or take up the ladder's."""
    text = split("\n\n".join(Texts(corpus(args.data)).documents()))
    folder = args.out / TOKENIZER
    if args.resume and folder.exists():
        words = Tokenizer.load(folder)
    else:
        # The alphabet is that of all the text, so that no character is unknown.
        texts = [text.train, text.held_out] if args.tokenizer == "chars" else [text.train]
        size = (args.vocab_size or 1024) if args.tokenizer == "bpe" else None
        words = make_tokenizer(args.tokenizer, size, lambda: texts)
    prompt = words.encode(args.prompt or _opening(text.held_out), add_special_tokens=False)
    ids = words.encode(text.train, add_special_tokens=False)
    if len(ids) <= args.context or not prompt:
        raise DataError(
            f"{args.data} has {len(ids)} tokens to learn from, and a text takes {args.context}: "
            "give more text, or a smaller --context"
        )
    return Course(args, text, words, ids, prompt[: args.context // 2], budget, rates)


def _opening(text: str) -> str:
    """The first words of a text, up to a space or the end of a line."""
    line = text.lstrip()[:_PROMPT].partition("\n")[0]
    return line.rpartition(" ")[0] + " " if " " in line.strip() else line


def described(course: Course) -> dict[str, Any]:
    """What ladder.json says of the text."""
    text = course.text
    return {
        "digest": sha256(f"{text.train}\0{text.held_out}".encode()).hexdigest(),
        "train_bytes": len(text.train.encode()),
        "train_tokens": len(course.ids),
        "held_out_bytes": len(text.held_out.encode()),
        "vocab_size": course.tokenizer.vocab_size,
        "prompt": course.tokenizer.decode(course.prompt),
        "flops": course.budget,
    }


def check_plans(course: Course) -> None:
    """Every rung's plan, so that what cannot be is said before anything is trained."""
    for name in course.args.rungs:
        if name in LEARNED:
            _plan(name, course)


def _plan(name: str, course: Course) -> Plan:
    args, rung = course.args, next(rung for rung in RUNGS if rung.name == name)
    rung = replace(rung, lr=course.rates.get(name, rung.lr))
    size = course.tokenizer.vocab_size
    return planned(rung, course.budget, size, args.context, args.batch_size, len(course.ids))


def count(name: str, course: Course, view: "LadderView") -> dict[str, Any]:
    """The n-gram: its order by the end of the text to learn from, then counts of all of that."""
    view.start(name, "counting")
    began = time.perf_counter()
    model = NGram.best(course.ids, course.tokenizer.vocab_size)
    seconds = time.perf_counter() - began
    folder = course.args.out / name
    model.save(folder, force=True)
    course.tokenizer.save(folder, force=True)
    ids, num_bytes = scorable(course.tokenizer, course.text.held_out)
    nats = -float(model.log_probs(ids)[1:].sum())
    return {
        "model": f"{model.order}-gram",
        "parameters": sum(len(level.counts) for level in model.levels),
        "tokens": len(course.ids),
        "flops": 0,
        "seconds": seconds,
        "bits_per_byte": nats / math.log(2) / num_bytes,
        "sample": _counted_sample(model, course),
        "directory": str(folder),
    }


def _counted_sample(model: NGram, course: Course) -> str:
    room = course.args.context - len(course.prompt)
    ids = model.generate(course.prompt, room, course.args.seed)
    return course.tokenizer.decode([*course.prompt, *ids])


def train(name: str, course: Course, view: "LadderView") -> dict[str, Any]:
    """A rung that learns: train, or go on; then score, sample and say what it took."""
    args, plan = course.args, _plan(name, course)
    model = built(plan, args.seed)
    config = _config(plan, course)
    forget_peak()
    view.start(name, f"{model.num_parameters():,} parameters", config.steps)
    trainer = Trainer(
        model,
        course.tokenizer,
        config,
        callbacks=[lambda trainer, record: view.tell(record)],
        about={"ladder": str(args.out), "rung": name, "data": args.data},
        quiet=True,
    )
    try:
        trainer.fit([course.text.train], [course.text.held_out], resume=args.resume)
    except Interrupted:
        note(f"polyhead ladder --out {args.out} --resume goes on")
        raise
    view.say(name, "scoring")
    stride = args.context // 4
    score = perplexity(
        model, course.tokenizer, course.text.held_out,
        context=args.context, stride=stride, batch_size=32,
    )  # fmt: skip
    tokens = config.steps * args.batch_size * args.context
    records = read_log(Path(config.out) / "log.jsonl")
    return {
        "model": plan.rung.family,
        "width": plan.width,
        "parameters": model.num_parameters(),
        "weights_per_token": plan.weights,
        "flops_per_token": plan.flops_per_token,
        "lr": plan.rung.lr,
        "steps": config.steps,
        "tokens": tokens,
        "flops": plan.flops_per_token * tokens,
        "seconds": sum(record.get("seconds", 0.0) for record in records),
        "memory_bytes": max((record.get("memory_bytes", 0) for record in records), default=0),
        "bits_per_byte": score.bits_per_byte,
        "sample": _sample(model, course),
        "directory": config.out,
    }


def _config(plan: Plan, course: Course) -> TrainConfig:
    args, steps = course.args, plan.steps
    return TrainConfig(
        steps=steps,
        batch_size=args.batch_size,
        context=args.context,
        lr=plan.rung.lr,
        seed=args.seed,
        validate_every=max(1, steps // _LOOKS),
        checkpoint_every=max(1, steps // 4),
        keep=1,
        log_every=max(1, steps // 100),
        out=str(args.out / "runs" / plan.rung.name),
        cache=str(args.out / "tokens"),
        device=args.device,
    )


def _sample(model: TaskModel, course: Course) -> str:
    """Drawn as the model has it: temperature 1, no likely tokens alone."""
    # A text that is longer than the context is not what the model learned.
    room = course.args.context - len(course.prompt)
    config = GenerationConfig(max_new_tokens=room, temperature=1.0, seed=course.args.seed)
    (found,) = TextGenerator(model, course.tokenizer).generate([course.prompt], config)
    return course.tokenizer.decode(course.prompt) + str(found)
