"""What all contenders of a row are given: weights, ids and texts, made once and kept."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from benchmarks.encoders import ragged
from benchmarks.peers.client import ROOT

import polyhead as ph
from polyhead.cli.main import main as polyhead
from polyhead.files.hub import resolve

BIBLE = ROOT.parent / "shared" / "data" / "bible.en-es.tsv"
# Llamas of about 1.2, 4.8 and 12.3 M parameters, tables and heads tied.
SMALL: dict[str, dict[str, int]] = {
    "1.2M": dict(vocab_size=2048, d_model=128, d_ff=448, num_layers=4, num_heads=4),
    "4.8M": dict(vocab_size=4096, d_model=256, d_ff=640, num_layers=5, num_heads=8),
    "12.3M": dict(vocab_size=8192, d_model=384, d_ff=1088, num_layers=5, num_heads=6),
}
_BANNED = -1e4  # a bias under which a token is never written


@dataclass(frozen=True)
class Inputs:
    """Lazily made; `folder` holds what is made."""

    folder: Path

    def model(self, name: str) -> str:
        """The path of a model by the name that rows use."""
        if name == "smollm2-135m":
            return name
        if name == "smollm2.gguf":
            return str(resolve("smollm2-135m"))
        if name == "smollm2":
            return self._made("smollm2", _convert)
        if name == "minilm":
            return str(resolve("minilm-l6"))
        if name == "marian":
            return self._made("marian", _marian)
        return self._made(f"llama-{name}", lambda path: _small(name, path))

    def in_few_bits(self, name: str, form: str) -> str:
        """The path of the same weights as Polyhead keeps them in few bits, a tokenizer beside."""
        if (name, form) == ("smollm2.gguf", "int4"):
            return self.model(name)  # its blocks are such
        command = ["compress", self.model(name), "--to", form, "--unmeasured", "--out"]
        return self._made(f"{name}-{form}", lambda path: _run(*command, str(path)))

    def _made(self, name: str, make: Any) -> str:
        path = self.folder / name
        if not (path / "config.json").exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            make(path)
        return str(path)

    @cached_property
    def ids(self) -> list[int]:
        """English as SmolLM2 reads it: the Bible, or what Python's manual says of itself."""
        if BIBLE.exists():
            verses = BIBLE.read_text(encoding="utf-8").splitlines()[20000:20600]
            text = " ".join(verse.split("\t")[0] for verse in verses)
        else:
            from pydoc_data.topics import topics

            text = " ".join(topics.values())[:80000]
        return ph.tokenizer("smollm2-135m").encode(text, add_special_tokens=False)

    def windows(self, count: int, length: int) -> list[list[int]]:
        """So many stretches of the ids, side by side."""
        assert count * length <= len(self.ids), f"{len(self.ids)} ids are too few"
        return [self.ids[i * length : (i + 1) * length] for i in range(count)]

    @cached_property
    def sentences(self) -> list[str]:
        """1000 of ragged lengths, 30 tokens in the mean."""
        return ragged(1000, 2.32)


def _convert(path: Path) -> None:
    _run("convert", "smollm2-135m", str(path), "--to", "hf", "--dtype", "bfloat16")


def _run(*words: str) -> None:
    code = polyhead(list(words))
    assert not code, f"polyhead {' '.join(words)} failed"


def _marian(path: Path) -> None:
    """Random weights that are sure of themselves; neither padding nor an end is ever written."""
    model = ph.build(
        "marian", seed=0, vocab_size=8192, d_model=256, d_ff=1024, num_layers=3, num_heads=8,
        max_seq_len=512, activation="relu", scale_embeddings=True, init_std=0.06,
    )  # fmt: skip
    with torch.no_grad():
        model.backbone.embedding.weight[-1] = 0  # pad, with which the decoder starts
        model.head.bias[0, [0, -1]] = _BANNED
    model.save(path)


def _small(name: str, path: Path) -> None:
    model = ph.build(
        "llama", seed=0, **SMALL[name], num_kv_heads=SMALL[name]["num_heads"],
        tie_embeddings=True, max_seq_len=512,
    )  # fmt: skip
    model.save(path)
