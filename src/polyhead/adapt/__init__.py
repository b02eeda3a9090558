"""Adapters: what learns beside the weights of a model that stays as it is."""
