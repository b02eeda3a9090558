"""Sentence-transformers directories: how a checkpoint makes one vector of a text.

`modules.json` lists the steps; each has a folder of its own (Reimers and Gurevych 2019).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from polyhead.errors import ConfigError
from polyhead.files.jsons import read_json
from polyhead.files.safetensors import open_checkpoint
from polyhead.files.safetensors_write import write_checkpoint
from polyhead.nn.pooling import KINDS, Activated, Pooling

LEGACY = {
    "cls_token": "cls",
    "max_tokens": "max",
    "mean_tokens": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "weightedmean_tokens": "weightedmean",
    "lasttoken": "lasttoken",
}
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "Identity": nn.Identity, "Tanh": nn.Tanh, "ReLU": nn.ReLU, "GELU": nn.GELU,
}  # fmt: skip
_MOST_TOKENS = 1 << 20  # tokenizers without a limit write an astronomical one
_STEPS = ("Transformer", "Pooling", "Dense", "Normalize")


@dataclass(frozen=True)
class Sentences:
    """What a sentence-transformers directory says beside the model.

    max_tokens: a longer text is cut, None: at the model's own limit. lowercase: before the
    tokenizer. prompts: what stands before a text, by name; `prompt` names the usual one.
    """

    pooling: Pooling = field(default_factory=Pooling)
    max_tokens: int | None = None
    lowercase: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict[str, str])
    prompt: str | None = None


def read_sentences(folder: Path) -> Sentences | None:
    """What the directory says; None where it is no sentence-transformers directory.

    Raises ConfigError for a step that is not known here, FileError for one that is missing.
    """
    if not (folder / "modules.json").exists():
        return None
    steps = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    kinds: tuple[str, ...] = ("mean",)
    dense: list[nn.Module] = []
    normalize = False
    for step in steps:
        name = str(step["type"]).rpartition(".")[2]
        place = folder / str(step["path"])
        if name == "Pooling":
            kinds = _kinds(read_json(place / "config.json"), place)
        elif name == "Dense":
            dense.append(_dense(place))
        elif name == "Normalize":
            normalize = True
        elif name not in _STEPS:
            raise ConfigError(
                f"{folder / 'modules.json'} has the step {name!r}, which is not supported; "
                f"supported are {', '.join(_STEPS)}"
            )
    said = read_json(folder / "config_sentence_transformers.json")
    pooling = Pooling(kinds, dense, normalize, said.get("truncate_dim"))
    old = read_json(folder / "sentence_bert_config.json")
    limit = old.get("max_seq_length") or read_json(folder / "tokenizer_config.json").get(
        "model_max_length"
    )
    return Sentences(
        pooling.eval(),
        int(limit) if limit and limit < _MOST_TOKENS else None,
        bool(old.get("do_lower_case")),
        cast("Mapping[str, str]", said.get("prompts") or {}),
        said.get("default_prompt_name"),
    )


def write_sentences(folder: Path, sentences: Sentences, d_model: int) -> None:
    """The files of `read_sentences`, in names that every version of the library reads."""
    pooling = sentences.pooling
    steps = ["Transformer", "Pooling", *["Dense" for _ in pooling.dense]]
    steps += ["Normalize"] if pooling.normalize else []
    listed: list[dict[str, Any]] = []
    dense = iter(pooling.dense)
    for number, name in enumerate(steps):
        path = "" if number == 0 else f"{number}_{name}"
        kind = f"sentence_transformers.models.{name}"
        listed.append({"idx": number, "name": str(number), "path": path, "type": kind})
        (folder / path).mkdir(exist_ok=True)
        if name == "Pooling":
            modes = {f"pooling_mode_{key}": kind in pooling.kinds for key, kind in LEGACY.items()}
            _write(folder / path / "config.json", {"word_embedding_dimension": d_model, **modes})
        elif name == "Dense":
            layer = next(dense)
            assert isinstance(layer, Activated)
            _write_dense(folder / path, layer)
    _write(folder / "modules.json", listed)
    _write(
        folder / "sentence_bert_config.json",
        {"max_seq_length": sentences.max_tokens, "do_lower_case": sentences.lowercase},
    )
    said: dict[str, Any] = {
        "prompts": dict(sentences.prompts),
        "default_prompt_name": sentences.prompt,
    }
    if pooling.width is not None:
        said["truncate_dim"] = pooling.width
    _write(folder / "config_sentence_transformers.json", said)


def _kinds(config: Mapping[str, Any], place: Path) -> tuple[str, ...]:
    said = config.get("pooling_mode")
    if said is None:
        said = [kind for key, kind in LEGACY.items() if config.get(f"pooling_mode_{key}")]
    kinds = (said,) if isinstance(said, str) else tuple(said or ("mean",))
    for kind in kinds:
        if kind not in KINDS:
            raise ConfigError(f"{place} pools by {kind!r}; supported are {', '.join(KINDS)}")
    return kinds


def _dense(place: Path) -> Activated:
    config = read_json(place / "config.json")
    name = str(config.get("activation_function", "Tanh")).rpartition(".")[2]
    if name not in ACTIVATIONS:
        raise ConfigError(f"{place} has the activation {name!r}; known are {list(ACTIVATIONS)}")
    tensors = open_checkpoint(place)
    weight = tensors["linear.weight"]
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias="linear.bias" in tensors)
    state = {key.removeprefix("linear."): value.float() for key, value in tensors.items()}
    linear.load_state_dict(state, assign=True)
    return Activated(linear, ACTIVATIONS[name]())


def _write_dense(place: Path, layer: Activated) -> None:
    tensors = {f"linear.{name}": value for name, value in layer.linear.state_dict().items()}
    write_checkpoint(place, tensors)
    kind = type(layer.activation)
    config = {
        "in_features": layer.linear.in_features,
        "out_features": layer.linear.out_features,
        "bias": layer.linear.bias is not None,  # pyright: ignore[reportUnnecessaryComparison]
        "activation_function": f"{kind.__module__}.{kind.__name__}",
    }
    _write(place / "config.json", config)


def _write(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
