"""The seed of each row."""

import hashlib
import secrets
from array import array
from collections.abc import Sequence

from polyhead.generate.config import GenerationConfig


def row_seeds(
    configs: Sequence[GenerationConfig], prompts: Sequence[Sequence[int]], shared: bool
) -> list[int]:
    """One seed a row, from its config's seed and its prompt alone.

    Where one config is `shared` by all rows, equal prompts also count which of them it is, so that
    asking for one prompt several times gives several texts.
    """
    times: dict[bytes, int] = {}
    seeds: list[int] = []
    for config, prompt in zip(configs, prompts, strict=True):
        key = _key(config, prompt)
        time = times.get(key, 0) if shared else 0
        times[key] = time + 1
        seeds.append(row_seed(config, prompt, time))
    return seeds


def row_seed(config: GenerationConfig, prompt: Sequence[int], time: int) -> int:
    """The seed of a prompt that was asked `time` times before; anew where the config has none."""
    if config.seed is None:
        return secrets.randbits(63)
    digest = hashlib.blake2b(_key(config, prompt), digest_size=8, salt=time.to_bytes(16)).digest()
    return int.from_bytes(digest) >> 1


def _key(config: GenerationConfig, prompt: Sequence[int]) -> bytes:
    return f"{config.seed}:".encode() + array("q", prompt).tobytes()
