"""Models for other runtimes: graphs of tensors in, tensors out, with no Python left in them."""
