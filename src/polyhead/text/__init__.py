"""Text in, token ids out, and back: tokenizers, batches, chat templates."""
