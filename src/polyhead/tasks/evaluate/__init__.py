"""How well language models do: what they predict, what they choose, and what they answer."""
