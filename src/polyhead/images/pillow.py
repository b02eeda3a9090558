"""Pillow, imported when an image is met: it is an extra."""

from typing import Any

from polyhead.errors import ConfigError


def pillow() -> Any:
    """The package `PIL`; raises ConfigError where it is not installed."""
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError:
        raise ConfigError("images need Pillow; pip install 'polyhead[images]'") from None
    return PIL
