"""Activations by Hugging Face's names and ours."""

from polyhead.errors import ConfigError

ACTIVATION_NAMES = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "relu2": "relu2",
    "quick_gelu": "quick_gelu",
    "tanh": "tanh",
}


def read_activation(name: str) -> str:
    """Hugging Face's name of an activation to ours."""
    if name not in ACTIVATION_NAMES:
        raise ConfigError(f"activation {name!r} is not one of {', '.join(ACTIVATION_NAMES)}")
    return ACTIVATION_NAMES[name]


def write_activation(name: str) -> str:
    """Our name of an activation to Hugging Face's."""
    return next(theirs for theirs, ours in ACTIVATION_NAMES.items() if ours == name)
