"""Bytes in, named tensors out: safetensors, GGUF, local paths, the hub. Nothing is executed."""
