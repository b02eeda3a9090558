"""What travels with a model that is written anew: tokenizer, template and image settings."""

from pathlib import Path

from polyhead.cli.opening import note
from polyhead.errors import PolyheadError


def take_along(source: Path, dest: Path, max_tokens: int | None) -> None:
    """Write the tokenizer and the image settings of `source` into the directory `dest`."""
    from polyhead.images.processor import Processor
    from polyhead.models.load import tokenizer
    from polyhead.text.directory import state_length

    if (source / "preprocessor_config.json").exists():
        Processor.load(source).save(dest)
    try:
        words = tokenizer(source)
    except PolyheadError as error:
        note(f"no tokenizer travels: {error}")
        return
    words.save(dest, force=True)
    state_length(dest, max_tokens)
