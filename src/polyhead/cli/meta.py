"""Models without their weights: of a preset, a family or a checkpoint, on the meta device."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from polyhead.errors import ConfigError
from polyhead.serve.opening import model_path

if TYPE_CHECKING:
    from polyhead.models.config import Config
    from polyhead.models.model import TaskModel
    from polyhead.models.presets import Preset


@dataclass(frozen=True)
class Outline:
    """A model whose weights are not there. path: of a checkpoint; preset: a published model."""

    name: str
    model: "TaskModel"
    path: Path | None = None
    preset: "Preset | None" = None


def outline(name: str, settings: Sequence[str] = ()) -> Outline:
    """What a name stands for: a path, a preset or a family with its default sizes, or the hub's.

    settings: fields of a family's config, `name=value`. Errors: ConfigError for a family that needs
    sizes, FileError for what is not there.
    """
    from polyhead.models.presets import PRESETS
    from polyhead.models.registry import families

    is_there = Path(name).exists()
    if settings and (is_there or name not in families()):
        raise ConfigError(f"--set is for families ({', '.join(families())}), not for a checkpoint")
    if not settings and name in PRESETS and not is_there:
        row = PRESETS[name]
        kind = row.arguments()
        head = str(kind.pop("head"))
        return Outline(name, _on_meta(_fresh(kind.pop("family"), kind), head), preset=row)
    if name in families() and not is_there:
        from polyhead.cli.fields import parse_fields
        from polyhead.models.registry import family_of

        config = family_of(name).config
        made = _fresh(name, parse_fields(config, settings))
        return Outline(name, _on_meta(made, next(iter(made.row(name).heads), "none")))
    return of_checkpoint(name)


def _fresh(model_type: str, values: dict[str, object]) -> "Config":
    from polyhead.models.registry import family_of

    return family_of(model_type).config.fresh(model_type, **values)


def of_checkpoint(name: str) -> Outline:
    """What stands at a path or under a name; of an adapter, the model that it goes on."""
    from polyhead.adapt.load import base_of, is_adapter
    from polyhead.compress.saved import read
    from polyhead.files.hub import resolve
    from polyhead.models.config_json import from_hf
    from polyhead.models.registry import family_of

    path = model_path(resolve(name))
    if is_adapter(path):
        return of_checkpoint(base_of(path))
    data, _ = read(path)
    if not isinstance(data.get("model_type"), str):
        raise ConfigError(f"{path} says no model_type in its config.json; it is needed")
    config = from_hf(family_of(data["model_type"]).config, data)
    row = config.row(config.model_type)
    first = next(iter(row.heads), "none")
    named = data.get("architectures") or [row.architecture(first)]
    head = row.head_of(str(named[0] if isinstance(named, list) else named))
    return Outline(name, _on_meta(config, head or first), path=path)


def _on_meta(config: "Config", head: str) -> "TaskModel":
    import torch

    from polyhead.models.assemble import assemble
    from polyhead.models.registry import family_of

    with torch.device("meta"):
        return assemble(family_of(config.model_type), config, head)
