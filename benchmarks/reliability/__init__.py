"""Training that is killed, stopped, filled up, reshaped and repeated, and what it left."""
