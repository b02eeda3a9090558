"""Training: one loop, objectives as functions, data whose order is arithmetic."""
