"""What a saved model says to ten prompts, so that whoever loads it can tell that it is that one.

`probes.json` stands beside the weights: the prompts, their ids, the logits that the model in memory
gave to them, and the hashes of all files. A template that was edited, a tokenizer of another
version, weights that were lost on the way or a kernel that computes something else show at once.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyhead.errors import FileError, PolyheadError
from polyhead.files.disk import atomic_file
from polyhead.files.jsons import read_json
from polyhead.models.model import TaskModel
from polyhead.nn.head import Heads
from polyhead.nn.mode import evaluating
from polyhead.text.tokenizer import Tokenizer

FILE, FORMAT = "probes.json", 1
TEXTS = (
    "The capital of France is",
    "def add(a, b):\n    return",
    "1 2 3 4 5 6 7",
    "Übergröße, naïve café: 日本語 и русский 🙂",
    "   spaces  and\ttabs\n\nlines   ",
    "Once upon a time there was a small dragon who could not breathe fire, and",
    "{\"name\": \"Ada\", \"born\": 1815}",
    "A",
    "What is the sum of two and two?",
    "Say hello.",
)  # fmt: skip
_CHATS = 2  # the last ones are messages, where there is a template
_KEPT = 8  # logits of each
_LONGEST = 48  # tokens of each
_ROUNDING = {torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}  # of the largest
_NOT_HASHED = (FILE, "manifest.json", "README.md")


def write_probes(
    model: TaskModel, tokenizer: Tokenizer | None, folder: str | Path, hashed: bool = True
) -> Path:
    """Say what a model, as it is in memory, answers, beside where it was saved.

    hashed: with the hashes of what stands there; False where a checkpoint's manifest has them.
    Errors: FileError for what cannot be written.
    """
    folder = Path(folder)
    said: dict[str, Any] = {
        "format": FORMAT,
        "dtype": str(model.dtype),
        "probes": probes_of(model, tokenizer),
    }
    if hashed:
        said["files"] = {name: _hash(folder / name) for name in _names(folder)}
    try:
        with atomic_file(folder / FILE) as file:
            file.write((json.dumps(said, indent=1, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise FileError(f"{folder / FILE} cannot be written ({error.strerror})") from None
    return folder / FILE


def probes_of(model: TaskModel, tokenizer: Tokenizer | None) -> list[dict[str, Any]]:
    """The prompts with their ids, and the largest logits at the last of these."""
    found: list[dict[str, Any]] = []
    for number in range(len(TEXTS)) if tokenizer is not None else [0]:
        ids = None if tokenizer is None else _ids(tokenizer, number)
        if ids is not None and max(ids, default=0) >= getattr(model.config, "vocab_size", math.inf):
            continue  # of a tokenizer with more tokens than the model has
        logits = answer(model, ids)
        best = logits.topk(min(_KEPT, len(logits))).indices.tolist()
        values = [round(float(logits[i]), 6) for i in best]
        prompt = {"number": number, "prompt": TEXTS[number], "ids": ids}
        found.append({**prompt, "best": best, "logits": values})
    return found


def check_probes(
    folder: Path, model: TaskModel, tokenizer: Tokenizer | None, logits: bool = True
) -> list[str]:
    """What of a directory's probes does not hold, one line each; nothing where it has none.

    logits: whether the model is as it was saved, so that they must be the same but for rounding.
    Errors: FileError for probes that cannot be read.
    """
    if not (folder / FILE).is_file():
        return []
    said = read_json(folder / FILE)
    if said.get("format") != FORMAT or not isinstance(said.get("probes"), list):
        raise FileError(f"{folder / FILE} is no file of probes that this polyhead reads")
    wrong = _altered(folder, said)
    for probe in said["probes"]:
        number = int(probe["number"])
        ids = None if tokenizer is None else _ids(tokenizer, number)
        if ids != probe["ids"]:
            wrong.append(f"probe {number} ({probe['prompt'][:20]!r}) has other ids than when saved")
        elif logits and (error := _difference(model, probe)) > _allowed(said, model):
            wrong.append(
                f"probe {number} ({probe['prompt'][:20]!r}) has logits that are {error:.2g} of the "
                f"largest away from those of when it was saved"
            )
    return wrong


@torch.no_grad()
def answer(model: TaskModel, ids: Sequence[int] | None) -> Tensor:
    """What a model says to ids, at their last, `[V]`; one that reads images is shown waves."""
    kind = getattr(model.config, "kind", "decoder")
    rows = [] if ids is None else [_row(model, ids)]
    if kind == "encoder-decoder":
        rows.append(rows[0][:, :2])
    with evaluating(model):
        if kind == "two towers":
            # Their product may be next to zero, and rounding would be all of it.
            found = model.encode_text(rows[0])[0], model.encode_image(_waves(model))[0]
            said = torch.cat(found)
        else:
            given = [_waves(model)] if kind == "vision" else rows
            several = model.head is None or isinstance(model.head, Heads)
            said = model.hidden(*given) if several else model(*given)
    while said.dim() > 1:
        said = said[-1]
    return said.float().cpu()


def _row(model: TaskModel, ids: Sequence[int]) -> Tensor:
    return torch.tensor([ids[: model.config.max_tokens]], device=model.device)


def _waves(model: TaskModel) -> Tensor:
    vision = getattr(model.config, "vision", model.config)
    size = getattr(vision, "image_size", 32)
    height, width = size if isinstance(size, tuple | list) else (size, size)
    shape = int(getattr(vision, "num_channels", 3)), int(height), int(width)
    count = torch.arange(math.prod(shape), dtype=torch.float32)
    return (count * 0.37).sin().view(1, *shape).to(model.device, model.dtype)


def _ids(tokenizer: Tokenizer, number: int) -> list[int]:
    text = TEXTS[number]
    if number >= len(TEXTS) - _CHATS and tokenizer.chat_template is not None:
        try:
            message = {"role": "user", "content": text}
            text = tokenizer.apply_chat_template([message], add_generation_prompt=True)
            return tokenizer.encode(text, add_special_tokens=False)[:_LONGEST]
        except PolyheadError:
            text = TEXTS[number]  # a template that takes no such message
    return tokenizer.encode(text)[:_LONGEST]


def _difference(model: TaskModel, probe: Mapping[str, Any]) -> float:
    """The largest, relative to the largest logit."""
    now, then = answer(model, probe["ids"]), torch.tensor(probe["logits"])
    if max(probe["best"]) >= len(now):
        return math.inf
    return float((now[probe["best"]] - then).abs().max() / then.abs().max().clamp_min(1e-6))


def _allowed(said: Mapping[str, Any], model: TaskModel) -> float:
    dtypes = {str(dtype): error for dtype, error in _ROUNDING.items()}
    return max(dtypes.get(str(said.get("dtype")), 6e-2), _ROUNDING.get(model.dtype, 6e-2))


def _altered(folder: Path, said: Mapping[str, Any]) -> list[str]:
    files: Mapping[str, str] | None = said.get("files")
    if files is None and (folder / "manifest.json").is_file():
        entries = read_json(folder / "manifest.json")["files"]
        files = {name: entry["sha256"] for name, entry in entries.items() if name != FILE}
    wrong: list[str] = []
    for name, stated in (files or {}).items():
        if "/" in name:
            continue  # what a run goes on from
        if not (folder / name).is_file():
            wrong.append(f"{name} is missing")
        elif _hash(folder / name) != stated:
            wrong.append(f"{name} was altered")
    return wrong


def _names(folder: Path) -> list[str]:
    files = (path for path in folder.iterdir() if path.is_file())
    return sorted(path.name for path in files if path.name not in _NOT_HASHED)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
