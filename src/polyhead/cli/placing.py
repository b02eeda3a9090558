"""What the verbs that write a model share: its place, what travels with it, inputs to compare."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyhead.cli.common import note
from polyhead.errors import FileError, PolyheadError

if TYPE_CHECKING:
    from torch import Tensor

    from polyhead.models.model import TaskModel
    from polyhead.text.tokenizer import Tokenizer

# Globs of what a converted model writes, or removes when it was another model's.
_WRITTEN = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "preprocessor_config.json",
)
_PROMPTS, _PROMPT_TOKENS, _SEED = 4, 32, 0


def check_places(source: Path, dest: Path, *, is_gguf: bool, force: bool) -> None:
    """FileError for a destination that is the source, of the wrong kind, or in the way."""
    if dest.exists() and dest.resolve() == source.resolve():
        raise FileError(f"{dest} is the source; name another place")
    if is_gguf and dest.is_dir():
        raise FileError(f"{dest} is a directory; name a file, as in {dest / 'model.gguf'}")
    if not is_gguf and dest.suffix == ".gguf":
        raise FileError(f"{dest} ends in .gguf; name a directory, or use --to gguf")
    if force:
        return
    if is_gguf and dest.exists():
        raise FileError(f"{dest} is there already; use --force, or name another place")
    if not is_gguf and (there := next((f for n in _WRITTEN for f in dest.glob(n)), None)):
        raise FileError(f"{there} is there already; use --force, or name another place")


def prove(source: Path, dest: Path, model: "TaskModel") -> None:
    """`carry_over`, and beside it what the model in memory answers, for whoever loads it."""
    from polyhead.models.probes import write_probes

    words = carry_over(source, dest, model.config.max_tokens)
    if words is not None or getattr(model.config, "kind", "") == "vision":
        write_probes(model, words, dest)


def carry_over(source: Path, dest: Path, max_tokens: int | None) -> "Tokenizer | None":
    """Copy a model's tokenizer and image settings beside another, which reads so many tokens; the
    tokenizer, if there is one."""
    from polyhead.images.processor import Processor
    from polyhead.models.load import tokenizer
    from polyhead.text.directory import state_length

    if (source / "preprocessor_config.json").exists():
        Processor.load(source).save(dest)
    try:
        words = tokenizer(source)
    except PolyheadError as error:
        note(f"no tokenizer travels: {error}")
        return None
    words.save(dest, force=True)
    state_length(dest, max_tokens)
    return words


def tokenizer_metadata(source: Path, vocab_size: int | None) -> Mapping[str, Any]:
    """GGUF's metadata of a directory's tokenizer; none where there is no tokenizer."""
    from polyhead.models.gguf_tokenizer import tokenizer_of

    try:
        return tokenizer_of(source if source.is_dir() else source.parent, vocab_size)
    except PolyheadError as error:
        note(f"no tokenizer travels: {error}")
        return {}


def ends(generation: Mapping[str, Any]) -> dict[str, Any]:
    """The ids that only the generation settings name, which belong into a GGUF file as well."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: generation[name] for name in names if isinstance(generation.get(name), int)}


def size_of(path: Path) -> int:
    """Bytes of a file, or of all in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def random_inputs(config: Any) -> "dict[str, Tensor]":
    """Random arguments for a model of any kind, in a batch of a few."""
    import torch

    from polyhead.models.vision_config import pair

    kind = getattr(config, "kind", "decoder")
    random = torch.Generator().manual_seed(_SEED)
    given: dict[str, Tensor] = {}
    if kind != "vision":
        length = min(_PROMPT_TOKENS, config.max_tokens or _PROMPT_TOKENS)
        ids = torch.randint(config.vocab_size, (_PROMPTS, length), generator=random)
        if kind == "image-text":
            image, room = config.image_token_id, config.tokens_per_image
            ids[ids == image] = (image + 1) % config.vocab_size
            spare = max(1, config.max_seq_len - room)
            ids = torch.cat([ids.new_full((_PROMPTS, room), image), ids[:, :spare]], dim=1)
        given["input_ids"] = ids
        if kind == "encoder-decoder":
            target = getattr(config, "target_vocab_size", config.vocab_size)
            given["decoder_input_ids"] = ids.flip(1) % target
    if kind in ("vision", "two towers", "image-text"):
        tower = config if kind == "vision" else config.vision
        size = pair("image_size", tower.image_size)
        shape = (_PROMPTS, tower.num_channels, *size)
        given["pixel_values"] = torch.randn(shape, generator=random)
    return given
