"""Compression: models in fewer bits."""
