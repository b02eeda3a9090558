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
        if config.seed is None:
            seeds.append(secrets.randbits(63))
            continue
        key = str(config.seed).encode() + b":" + array("q", prompt).tobytes()
        time = times.get(key, 0) if shared else 0
        times[key] = time + 1
        digest = hashlib.blake2b(key, digest_size=8, salt=time.to_bytes(16)).digest()
        seeds.append(int.from_bytes(digest) >> 1)
    return seeds
