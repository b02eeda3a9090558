"""CTranslate2 on what its converter makes of a Marian directory."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ctranslate2
from benchmarks.peers.job import Job, timed
from ctranslate2.converters import TransformersConverter


def versions() -> dict[str, str]:
    """Of what computes here."""
    return {"ctranslate2": ctranslate2.__version__}


class _Numbers:
    """A vocabulary whose tokens are their own ids: the model has no words."""

    bos_token = eos_token = "0"
    unk_token = "1"

    def __init__(self, size: int) -> None:
        self.size = size

    def get_vocab(self) -> dict[str, int]:
        # Padding is last, and has no place in CTranslate2's own vocabulary.
        return {str(number): number for number in range(self.size - 1)} | {"<pad>": self.size - 1}


class _Converter(TransformersConverter):
    def load_model(self, model_class: Any, model_name_or_path: str, **settings: Any) -> Any:
        made = super().load_model(model_class, model_name_or_path, **settings)
        self.vocab_size = made.config.vocab_size
        return made

    def load_tokenizer(self, tokenizer_class: Any, name: str, **settings: Any) -> Any:
        return _Numbers(self.vocab_size)


def translate(
    model: str, form: str, folder: str, sources: list[list[int]], beams: int, tokens: int
) -> Job:
    """Sources of one batch to texts of just so many tokens, by beams. form: its compute type."""
    converted = Path(folder) / f"{Path(model).name}-ct2"
    if not (converted / "model.bin").exists():
        _Converter(model).convert(str(converted), force=True)
    made = ctranslate2.Translator(
        str(converted), device="cpu", compute_type=form, inter_threads=1,
        intra_threads=int(os.environ["OMP_NUM_THREADS"]),
    )  # fmt: skip
    words = [[str(token) for token in source] for source in sources]

    def write() -> list[list[int]]:
        found = made.translate_batch(
            words, beam_size=beams, max_decoding_length=tokens, min_decoding_length=tokens
        )
        return [[int(word) for word in each.hypotheses[0]] for each in found]

    return Job(lambda: timed(write), write)


JOBS: dict[str, Callable[..., Job]] = {"translate": translate}
