"""A run from top to bottom: the trainer, what it needs before the weights, and what becomes of its result."""
