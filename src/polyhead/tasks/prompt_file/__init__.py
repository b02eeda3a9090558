"""A file of prompts to a file of answers, however often the work is stopped."""
