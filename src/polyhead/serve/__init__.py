"""A server for every family, and how a model is opened to be used."""
