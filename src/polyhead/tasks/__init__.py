"""What a finished model is used for: scoring text, embedding it."""
