"""From logits to text: transforms, draws, batches that decode together, and chat."""
