"""From logits to tokens: transforms that compose, each row with its own."""
