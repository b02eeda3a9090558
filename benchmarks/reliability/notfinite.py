"""NaN and infinity put into a run at many places: each is caught, and no weight or moment moves."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from benchmarks.reliability.child import SIZES, TEXT
from benchmarks.reliability.runs import Progress
from torch import Tensor, nn

import polyhead as ph
from polyhead.errors import PolyheadError
from polyhead.train.log import read_log
from polyhead.train.objectives import Loss, causal_lm
from polyhead.train.optim import Masters

AT = 3  # the step after which the fault is put in
CONFIG: dict[str, Any] = dict(
    steps=5, batch_size=2, accumulate=2, context=16, warmup=2, log_every=1, checkpoint_every=2,
    held_out=0.0, schedule="constant", ema=0.9, device="cpu",
)  # fmt: skip
PAIRS = (
    *((math.nan, "bfloat16"), (math.inf, "float32")),
    *((math.nan, "float32"), (math.inf, "bfloat16")),
)

# What a module gives, in the forward pass.
ACTIVATIONS = (
    *("embedding", "positions", "layers.0.attention_norm", "layers.0.attention.q"),
    *("layers.0.attention.k", "layers.0.attention.v", "layers.0.attention.out", "layers.0.ffn.up"),
    *("layers.0.ffn.down", "layers.1", "norm"),
)
# The gradient of what a module gives, and of a parameter.
BACKWARD = ("embedding", "layers.0.attention.q", "layers.0", "layers.1.ffn", "norm")
PARAMETERS = (
    *("embedding.weight", "layers.0.attention.v.weight", "layers.1.ffn.down.bias", "norm.weight"),
)
MOMENTS = ("exp_avg", "exp_avg_sq", "average")

Fault = Callable[[nn.Module, Masters, float], Callable[[], None]]
"""Puts a value in; what takes it out again after the step."""


def injected(folder: Path, rounds: int) -> dict[str, Any]:
    """Every place, with the first `rounds` of the four pairs of a value and a dtype.

    What passes is a step left out; what stays ends the run, and is in no checkpoint.
    """
    cases = [
        (f"{name} {value} {dtype}", fault, value, dtype, name.startswith(("weight", "moment")))
        for name, fault in PLACES.items()
        for value, dtype in PAIRS[:rounds]
    ]
    progress, faults = Progress("not finite", len(cases)), list[str]()
    for number, (name, fault, value, dtype, stays) in enumerate(cases):
        said = _one(folder / str(number), fault, value, dtype, stays)
        faults += [f"{name}: {said}"] if said else []
        progress(number + 1)
    return {"ok": not faults, "places": len(PLACES), "cases": len(cases), "faults": faults}


def _one(out: Path, fault: Fault, value: float, dtype: str, stays: bool) -> str:
    """Runs once; what is not as it should be."""
    optimizers, before, after = list[Masters](), dict[str, Tensor](), dict[str, Tensor]()
    undo: Callable[[], None] = lambda: None  # noqa: E731 (replaced when the fault is put in)

    def kept(*given: Any) -> Masters:
        optimizers.append(Masters(*given))
        return optimizers[-1]

    def watch(trainer: Any, record: dict[str, Any]) -> None:
        nonlocal undo
        state = {name: tensor.clone() for name, tensor in optimizers[-1].state().items()}
        if record["step"] == AT and not before:
            undo = fault(trainer.model, optimizers[-1], value)
            before.update({n: t.clone() for n, t in optimizers[-1].state().items()})
        elif record["step"] == AT + 1 and not after:
            after.update(state)
            undo()

    tokenizer = ph.Tokenizer.train([TEXT], kind="chars")
    model = ph.build("gpt2", seed=0, vocab_size=tokenizer.vocab_size, **SIZES)
    config = ph.TrainConfig(**CONFIG, dtype=dtype, out=str(out))
    trainer = ph.Trainer(
        model, tokenizer, config, objective=_objective, callbacks=[watch], quiet=True
    )
    ended = ""
    with patch("polyhead.train.loop.Masters", kept):
        try:
            trainer.fit([TEXT])
        except PolyheadError as error:
            ended = str(error)
    SPOILT.clear()
    skipped = [line["step"] for line in read_log(out / "log.jsonl") if "skipped" in line]
    after = after or optimizers[-1].state()  # the run ended before another line
    moved = [n for n, t in before.items() if not torch.equal(_plain(t), _plain(after[n]))]
    saved = sorted((out / "checkpoints").glob("step-*"))[-1]
    if moved:
        return f"{moved[0]} moved"
    if stays:
        if "no longer finite" not in ended:
            return f"ended with {ended!r}"
        return "" if saved.name == f"step-{AT - 1:08d}" else f"{saved.name} was saved"
    return "" if skipped == [AT + 1] and not ended else f"left out {skipped}, ended {ended!r}"


def _plain(tensor: Tensor) -> Tensor:
    return tensor.nan_to_num(nan=7.0)


SPOILT: dict[int, float] = {}
"""Factor of the loss of the n-th batch from here on."""


def _objective(model: Any, batch: Any) -> Loss:
    loss = causal_lm(model, batch)
    factor = SPOILT.get(0, 1.0)
    later = {number - 1: value for number, value in SPOILT.items() if number > 0}
    SPOILT.clear()
    SPOILT.update(later)
    return Loss(loss.total * factor, loss.tokens, {"loss": loss.total.detach() * factor})


def _spoil(tensor: Tensor, value: float) -> Tensor:
    spoilt = tensor.clone()
    spoilt.view(-1)[0] = value
    return spoilt


def _activation(name: str) -> Fault:
    def put(model: nn.Module, optimizer: Masters, value: float) -> Callable[[], None]:
        part = model.get_submodule(name)
        return part.register_forward_hook(lambda part, given, made: _spoil(made, value)).remove

    return put


def _overflow(model: nn.Module, optimizer: Masters, value: float) -> Callable[[], None]:
    """What bfloat16 (and float32) holds no more: an honest product that is too large."""
    part = model.get_submodule("backbone.layers.0.ffn")
    return part.register_forward_hook(lambda part, given, made: made * 3e38 * 1e10).remove


def _backward(name: str) -> Fault:
    def put(model: nn.Module, optimizer: Masters, value: float) -> Callable[[], None]:
        def hook(part: nn.Module, given: Any, made: Tensor) -> None:
            made.register_hook(lambda gradient: _spoil(gradient, value))

        return model.get_submodule(name).register_forward_hook(hook).remove

    return put


def _gradient(name: str) -> Fault:
    def put(model: nn.Module, optimizer: Masters, value: float) -> Callable[[], None]:
        hook = model.get_parameter(name).register_hook(lambda gradient: _spoil(gradient, value))
        return hook.remove

    return put


def _loss(batch: int) -> Fault:
    def put(model: nn.Module, optimizer: Masters, value: float) -> Callable[[], None]:
        SPOILT[batch] = value
        return SPOILT.clear

    return put


def _weight(model: nn.Module, optimizer: Masters, value: float) -> Callable[[], None]:
    name = "backbone.layers.0.ffn.up.weight"
    with torch.no_grad():
        for tensor in (model.get_parameter(name), optimizer.state()[f"master.{name}"]):
            tensor.view(-1)[0] = value
    return lambda: None


def _moment(key: str) -> Fault:
    def put(model: nn.Module, optimizer: Masters, value: float) -> Callable[[], None]:
        with torch.no_grad():
            optimizer.state()[f"{key}.backbone.layers.0.ffn.up.weight"].view(-1)[0] = value
        return lambda: None

    return put


PLACES: dict[str, Fault] = {
    **{f"activation backbone.{name}": _activation(f"backbone.{name}") for name in ACTIVATIONS},
    "activation head": _activation("head"),
    "activation too-large": _overflow,
    **{f"backward backbone.{name}": _backward(f"backbone.{name}") for name in BACKWARD},
    **{f"gradient backbone.{name}": _gradient(f"backbone.{name}") for name in PARAMETERS},
    "loss first-batch": _loss(0),
    "loss second-batch": _loss(1),
    "weight ffn.up": _weight,
    **{f"moment {key}": _moment(key) for key in MOMENTS},
}
