"""Images in, pixel values out: opened with care, resized, cropped and normed as a model expects."""

from polyhead.images.processor import Processor

__all__ = ["Processor"]
